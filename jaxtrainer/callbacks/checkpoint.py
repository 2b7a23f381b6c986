"""`Checkpoint`: saves the whole state of a run, without stopping it, and keeps the best."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxtrainer import distributed
from jaxtrainer.callback import Callback
from jaxtrainer.checkpoint import find_checkpoint, last_whole, read_record
from jaxtrainer.duration import Duration, parse_duration
from jaxtrainer.errors import (
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    RunDirError,
    checks_options,
)
from jaxtrainer.guard import unfit
from jaxtrainer.places import check_place, place
from jaxtrainer.run import Run
from jaxtrainer.rundir import check_space, saved_steps
from jaxtrainer.store import CheckpointStore

_SIGN = {"min": 1.0, "max": -1.0}


class Checkpoint(Callback):
    """Save params, optimiser, RNG, metrics, position in the data and callback states.

    A save copies the arrays from the device and writes them in the background. At a point where
    validation is due too, it comes after it, and after every other callback. A state that is not
    finite is not saved, so that the last checkpoint is always one to go on from.

    Args:
        dirpath: Run directory; each checkpoint is a directory `step_N` in it. Also in an object
            store, as `"gs://bucket/runs/mnist"` or `"s3://..."`, with `jaxtrainer[gcs]` or
            `jaxtrainer[s3]` installed; what holds there is in `docs/guarantees.md`.
        monitor: Series that decides which are best, e.g. `"val/accuracy"`.
        mode: Whether less (`"min"`) or more (`"max"`) of it is better.
        save_top_k: Keep this many of the best; -1 keeps all, 0 none but the last.
        save_last: Keep the newest too, whatever its value. Without `monitor` it is all there is.
        every_n_epochs: Save at the end of each n-th epoch; the default, with 1.
        every_n_train_steps: Save every this many optimiser steps instead.
        train_time_interval: Save when this much time has passed since the last save instead: a
            timedelta, `"DD:HH:MM:SS"` or seconds.
        allow_non_finite: Save a state with NaN or infinite parameters all the same.
        on_save_error: What a save that fails does to the run, after those that it replaces have
            made room and a second try has failed too: `"raise"`, at the next step, or `"warn"`
            and train on. What was saved before stays either way.
        on_corrupt: What `fit(ckpt_path="last")` does if the last checkpoint is damaged:
            `"fall_back"` to the one before it, with a warning, or `"raise"`. The damaged one is
            renamed to `damaged_step_N`.
        durable: Delete what a checkpoint replaces only when it is on the disk itself, so that
            also a power loss leaves one. Saves take longer in the background.

    Raises:
        ConfigError: If more than one trigger is given, or the monitored series looks misspelt.
        MissingExtraError: For a URL, without the package that talks to its store.
        RunDirError: If the directory cannot be written, or has checkpoints of another run.

    Example:
        >>> checkpoint = Checkpoint("runs/mnist", monitor="val/accuracy", mode="max")
    """

    order = 2
    may_log = False

    @checks_options
    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: Duration | None = None,
        allow_non_finite: bool = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        on_corrupt: Literal["fall_back", "raise"] = "fall_back",
        durable: bool = False,
    ) -> None:
        triggers = (every_n_epochs, every_n_train_steps, train_time_interval)
        if sum(t is not None for t in triggers) > 1:
            raise ConfigError(
                "Checkpoint takes one of every_n_epochs, every_n_train_steps and "
                "train_time_interval; for several triggers use several Checkpoints, each with its "
                "own directory."
            )
        if not isinstance(dirpath, str | os.PathLike):
            raise ConfigError(f"Checkpoint needs a run directory, got {dirpath!r}.")
        if mode not in ("min", "max"):
            raise ConfigError(f"mode={mode!r}: use 'min' or 'max'.")
        if not isinstance(save_top_k, int) or save_top_k < -1:
            raise ConfigError(f"save_top_k must be -1 (all), 0 or more, got {save_top_k!r}.")
        if save_top_k > 1 and monitor is None:
            raise ConfigError(
                f"save_top_k={save_top_k} keeps the best by a series; pass e.g. "
                "`monitor='val/loss'`, or `save_top_k=-1` to keep all."
            )
        if save_top_k == 0 and not save_last:
            raise ConfigError("save_top_k=0 with save_last=False saves nothing; pass one of them.")
        for name, value in (
            ("every_n_epochs", every_n_epochs),
            ("every_n_train_steps", every_n_train_steps),
        ):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
        _check_word("on_save_error", on_save_error, ("raise", "warn"))
        _check_word("on_corrupt", on_corrupt, ("fall_back", "raise"))
        _check_word("durable", durable, (True, False))
        if "\0" in os.fspath(dirpath):
            raise ConfigError(f"{os.fspath(dirpath)!r} is no path.")
        check_place(dirpath)
        self.given_dirpath = os.fspath(dirpath)
        self.dirpath = self.given_dirpath
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.allow_non_finite = allow_non_finite
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = 1 if all(t is None for t in triggers) else every_n_epochs
        self.interval_s = (
            None if train_time_interval is None else parse_duration(train_time_interval)
        )
        self.on_save_error = on_save_error
        self.on_corrupt = on_corrupt
        self.durable = durable
        self.scores: dict[int, float] = {}
        self.last_step: int | None = None
        self._before: tuple[dict[int, float], int | None] = {}, None
        self._damaged: dict[int, str] = {}
        self._store: CheckpointStore | None = None
        self._saved_at_s = 0.0
        self._due_step = 0
        self._is_refusing = False

    @property
    def state_key(self) -> str:
        """Name of this callback's state: one for each directory name."""
        return f"Checkpoint[{os.path.basename(os.path.normpath(self.dirpath))}]"

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint so far; the newest without `monitor`."""
        return min(self.scores, key=self._rank) if self.scores else self.last_step

    @property
    def best_model_path(self) -> str | None:
        """Directory of the best checkpoint."""
        return (
            None if self.best_step is None else os.path.join(self.dirpath, f"step_{self.best_step}")
        )

    @property
    def best_model_score(self) -> float | None:
        """Value of the monitored series at the best checkpoint."""
        return self.scores.get(self.best_step) if self.best_step is not None else None

    def find(self, which: str, *, may_fall_back: bool = False) -> Path:
        """Return the directory of the `"last"` or `"best"` checkpoint.

        Args:
            which: One of these words.
            may_fall_back: Take the last one that is not damaged, if `on_corrupt` says so.

        Raises:
            CheckpointNotFoundError: If nothing was saved yet.
            CheckpointCorruptError: If all are damaged.
        """
        self._damaged = {}
        last = find_checkpoint(self.dirpath)
        if which == "last" and may_fall_back and self.on_corrupt == "fall_back":
            last, self._damaged = last_whole(place(self.dirpath))
        if which == "best":
            states = read_record(last)["callbacks"]
            self.load_state_dict(states.get(self.state_key, {"scores": {}, "last_step": None}))
            if self.best_model_path is not None:
                return find_checkpoint(self.best_model_path)
        return last

    def setup(self, run: Run) -> None:
        """Open the run directory, before anything compiles."""
        if run.stage == "fit":
            # Of an earlier call of `fit`; a resumed run gets its own from the checkpoint.
            self.scores, self.last_step, self._is_refusing = {}, None, False
            damaged, self._damaged = self._damaged, {}
            for error in damaged.values() if run.resumed_step is not None else ():
                _warn(run, f"{error} Going on from step {run.resumed_step}.")
            self._store = CheckpointStore(
                self.dirpath,
                resumed_step=run.resumed_step,
                damaged_steps=[*damaged] if run.resumed_step is not None else (),
                durable=self.durable,
            )
            self._tell_notes(run)

    def on_compile_start(self, run: Run, name: str) -> None:
        """Refuse a disk that is too small, as soon as the size of the state is known."""
        if self._store is not None and run.state_bytes and run.stage == "fit":
            check_space(self._store.directory, run.state_bytes)

    def on_fit_start(self, run: Run) -> None:
        """Count the triggers from here, and say what a resumed run has saved before."""
        self._saved_at_s = run.clock()
        self._count_from(run.global_step)
        if run.resumed_step is not None and self._store and self.last_step is not None:
            self._publish(run)

    def on_save_point(self, run: Run) -> None:
        """Save if a trigger says so, or the run is being interrupted."""
        store = self._store
        # Of a save that fails only the process that has written it knows.
        if store is not None and run.agree(f"{self.state_key} failed", store.has_failed):
            self._settle(run, store.wait)
        if run.stop_reason == "interrupted" or self._is_due(run):
            self._save(run)

    def on_train_end(self, run: Run) -> None:
        """Save the final state, if it is not saved yet."""
        if self.save_last and run.global_step:
            self._save(run)

    def on_fit_end(self, run: Run) -> None:
        """Wait until everything is on disk."""
        if self._store is not None:
            with run.timings.phase("checkpoint"):
                self._settle(run, self._store.wait)

    def teardown(self, run: Run) -> None:
        """Release the run directory."""
        if self._store is not None:
            try:
                self._settle(run, self._store.close)
            finally:
                self._store = None

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of what is kept."""
        scores = {str(step): score for step, score in self.scores.items()}
        return {"scores": scores, "last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the scores of the checkpoints that are still there."""
        there = distributed.broadcast(saved_steps(place(self.dirpath)), self.state_key)
        self.scores = {int(k): v for k, v in state["scores"].items() if int(k) in there}
        self.last_step = state["last_step"] if state["last_step"] in there else None

    def _count_from(self, step: int) -> None:
        if self.every_n_train_steps is not None:
            self._due_step = (step // self.every_n_train_steps + 1) * self.every_n_train_steps

    def _is_due(self, run: Run) -> bool:
        if self.every_n_epochs is not None:
            return run.is_epoch_end and (run.epoch + 1) % self.every_n_epochs == 0
        if self.every_n_train_steps is not None:
            return run.global_step >= self._due_step
        passed_s = run.clock() - self._saved_at_s
        return run.agree(self.state_key, passed_s >= (self.interval_s or 0.0))

    def _save(self, run: Run) -> None:
        step = run.global_step
        if self._store is None or run.capture is None or step == self.last_step:
            return
        with run.timings.phase("checkpoint"):
            self._settle(run, self._store.wait)
        self._count_from(step)
        self._saved_at_s = run.clock()
        if not self.allow_non_finite and self._refuses(run):
            return
        score = self._score(run)
        if not self.save_last and not self._is_among_best(score):
            return
        self._before = dict(self.scores), self.last_step
        if score is not None:
            self.scores[step] = score
        previous, self.last_step = self.last_step, step
        dropped = self._to_drop(previous)
        store, snapshot = self._store, run.capture()
        with run.timings.phase("checkpoint"):
            self._settle(run, lambda: store.save(step, snapshot, replaces=dropped))
        self._publish(run)

    def _settle(self, run: Run, act: Callable[[], None]) -> None:
        """Call what may say that a save has failed, and do about it what the policy is."""
        try:
            act()
        except CheckpointError as error:
            # As if it had not been tried; those that it was to replace may be gone.
            self.scores, self.last_step = self._before
            # An object store that cannot be reached cannot say what it has, either.
            with contextlib.suppress(RunDirError):
                self.load_state_dict(self.state_dict())
            self._publish(run)
            if self.on_save_error == "raise":
                raise
            _warn(run, f"{error}. Training goes on; the last checkpoint is {run.last_checkpoint}.")
        self._tell_notes(run)

    def _publish(self, run: Run) -> None:
        store, best, last = self._store, self.best_step, self.last_step
        run.best_checkpoint = None if store is None or best is None else str(store.path(best))
        run.last_checkpoint = None if store is None or last is None else str(store.path(last))

    def _tell_notes(self, run: Run) -> None:
        while self._store is not None and self._store.notes:
            run.notice(self._store.notes.popleft())

    def _refuses(self, run: Run) -> bool:
        """Return whether the state is none to go on from, and say so the first time."""
        why = unfit(run.state)
        if why and not self._is_refusing:
            last = "none" if self.last_step is None else f"that of step {self.last_step}"
            run.notice(
                f"Checkpoint: nothing is saved from step {run.global_step} on: {why}. The last "
                f"good one is {last}. `NonFinite()` in the callbacks finds the batch; "
                "`Checkpoint(..., allow_non_finite=True)` saves all the same"
            )
        self._is_refusing = bool(why)
        return self._is_refusing

    def _score(self, run: Run) -> float | None:
        if self.monitor is None:
            return None
        if self.monitor not in run.metrics:
            # A run may end, or save, before its first validation: no reason to lose it.
            logged = ", ".join(name for name in run.metrics if "/_" not in name) or "nothing"
            run.notice(
                f"Checkpoint monitors {self.monitor!r}, which is not logged yet (but {logged}); "
                "saved without a value"
            )
        # A series that a hook logs may differ between hosts, and what is kept may not.
        return distributed.broadcast(run.metrics.get(self.monitor), self.state_key)

    def _rank(self, step: int) -> tuple[float, int]:
        """Return a key that is smaller for a better checkpoint."""
        return self._value(self.scores[step]), step

    def _value(self, score: float) -> float:
        """Return a number that is smaller for a better score; what is not finite never is."""
        return score * _SIGN[self.mode] if math.isfinite(score) else math.inf

    def _is_among_best(self, score: float | None) -> bool:
        if score is None or self.save_top_k == -1 or len(self.scores) < self.save_top_k:
            return True
        worst = max(self._rank(step) for step in self.scores) if self.scores else (-math.inf, 0)
        return self._value(score) < worst[0]

    def _to_drop(self, previous: int | None) -> list[int]:
        """Return which checkpoints to delete once the newest is saved."""
        if self.save_top_k == -1:
            return []
        ranked = sorted(self.scores, key=self._rank)
        keep = {*ranked[: self.save_top_k], self.last_step}
        dropped = [s for s in ({*self.scores, previous} - keep) if s is not None]
        self.scores = {s: v for s, v in self.scores.items() if s in keep}
        return sorted(dropped)


def _check_word(name: str, value: Any, words: tuple[Any, ...]) -> None:
    if value not in words:
        known = " or ".join(repr(word) for word in words)
        raise ConfigError(f"{name}={value!r}: use {known}.")


def _warn(run: Run, text: str) -> None:
    # A notice is seen where there is a bar only, and this must not be missed.
    run.notice(text)
    warnings.warn(text, CheckpointWarning, stacklevel=2)
