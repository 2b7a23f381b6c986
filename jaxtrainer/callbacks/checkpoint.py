"""`Checkpoint`: saves the whole state of a run, without stopping it, and keeps the best."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxtrainer.callback import Callback
from jaxtrainer.checkpoint import CheckpointStore, find_checkpoint, read_record, saved_steps
from jaxtrainer.duration import Duration, parse_duration
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.run import Run

_SIGN = {"min": 1.0, "max": -1.0}


class Checkpoint(Callback):
    """Save params, optimiser, RNG, metrics, position in the data and callback states.

    A save copies the arrays from the device and writes them in the background. At a point where
    validation is due too, it comes after it, and after every other callback.

    Args:
        dirpath: Run directory; each checkpoint is a directory `step_N` in it.
        monitor: Series that decides which are best, e.g. `"val/accuracy"`.
        mode: Whether less (`"min"`) or more (`"max"`) of it is better.
        save_top_k: Keep this many of the best; -1 keeps all, 0 none but the last.
        save_last: Keep the newest too, whatever its value. Without `monitor` it is all there is.
        every_n_epochs: Save at the end of each n-th epoch; the default, with 1.
        every_n_train_steps: Save every this many optimiser steps instead.
        train_time_interval: Save when this much time has passed since the last save instead: a
            timedelta, `"DD:HH:MM:SS"` or seconds.

    Raises:
        ConfigError: If more than one trigger is given, or the monitored series looks misspelt.
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
        self.given_dirpath = os.fspath(dirpath)
        self.dirpath = self.given_dirpath
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = 1 if all(t is None for t in triggers) else every_n_epochs
        self.interval_s = (
            None if train_time_interval is None else parse_duration(train_time_interval)
        )
        self.scores: dict[int, float] = {}
        self.last_step: int | None = None
        self._store: CheckpointStore | None = None
        self._saved_at_s = 0.0
        self._due_step = 0

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

    def find(self, which: str) -> Path:
        """Return the directory of the `"last"` or `"best"` checkpoint.

        Raises:
            CheckpointNotFoundError: If nothing was saved yet.
        """
        last = find_checkpoint(self.dirpath)
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
            self.scores, self.last_step = {}, None
            self._store = CheckpointStore(self.dirpath, resumed_step=run.resumed_step)

    def on_fit_start(self, run: Run) -> None:
        """Count the triggers from here, and say what a resumed run has saved before."""
        self._saved_at_s = run.clock()
        self._count_from(run.global_step)
        if run.resumed_step is not None and self._store and self.last_step is not None:
            run.last_checkpoint = str(self._store.path(self.last_step))
            run.best_checkpoint = self.best_model_path

    def on_save_point(self, run: Run) -> None:
        """Save if a trigger says so, or the run is being interrupted."""
        if self._store is not None:
            self._store.poll()
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
                self._store.wait()

    def teardown(self, run: Run) -> None:
        """Release the run directory."""
        if self._store is not None:
            store, self._store = self._store, None
            store.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of what is kept."""
        scores = {str(step): score for step, score in self.scores.items()}
        return {"scores": scores, "last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the scores of the checkpoints that are still there."""
        there = saved_steps(Path(self.dirpath))
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
        return run.clock() - self._saved_at_s >= (self.interval_s or 0.0)

    def _save(self, run: Run) -> None:
        step = run.global_step
        if self._store is None or run.capture is None or step == self.last_step:
            return
        self._count_from(step)
        self._saved_at_s = run.clock()
        score = self._score(run)
        if not self.save_last and not self._is_among_best(score):
            return
        if score is not None:
            self.scores[step] = score
        previous, self.last_step = self.last_step, step
        dropped = self._to_drop(previous)
        with run.timings.phase("checkpoint"):
            self._store.save(step, run.capture(), replaces=dropped)
        run.last_checkpoint = str(self._store.path(step))
        run.best_checkpoint = self.best_model_path

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
        return run.metrics.get(self.monitor)

    def _rank(self, step: int) -> tuple[float, int]:
        """Return a key that is smaller for a better checkpoint; NaN is never better."""
        score = self.scores[step]
        return (math.inf if math.isnan(score) else score * _SIGN[self.mode], step)

    def _is_among_best(self, score: float | None) -> bool:
        if score is None or self.save_top_k == -1 or len(self.scores) < self.save_top_k:
            return True
        worst = max(self._rank(step) for step in self.scores) if self.scores else (-math.inf, 0)
        return score * _SIGN[self.mode] < worst[0]

    def _to_drop(self, previous: int | None) -> list[int]:
        """Return which checkpoints to delete once the newest is saved."""
        if self.save_top_k == -1:
            return []
        ranked = sorted(self.scores, key=self._rank)
        keep = {*ranked[: self.save_top_k], self.last_step}
        dropped = [s for s in ({*self.scores, previous} - keep) if s is not None]
        self.scores = {s: v for s, v in self.scores.items() if s in keep}
        return sorted(dropped)
