"""`EarlyStopping`: ends a run whose monitored series no longer improves.

Reads values that are on the host anyway; the run's history tells when there is a new one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options, did_you_mean
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree, Stage

_SIGN = {"min": 1.0, "max": -1.0}


class EarlyStopping(Callback):
    """Stop when a series has not improved for `patience` checks.

    A check is a new value of the series: after each validation that logs it, or at the end of
    each training epoch. The tests come in Lightning's order: not finite, better than
    `stopping_threshold`, worse than `divergence_threshold`, improved by more than `min_delta`.
    `min_epochs` and `min_steps` of the trainer hold a stop back until they are reached.

    Args:
        monitor: Series to watch, e.g. `"val/loss"`.
        mode: Whether less (`"min"`) or more (`"max"`) of it is better.
        patience: Stop after this many checks in a row without improvement.
        min_delta: What improves by no more than this has not improved.
        check_finite: Stop at once when the value is NaN or infinite; otherwise NaN is a check
            without improvement.
        stopping_threshold: Stop at once when the value is better than this.
        divergence_threshold: Stop at once when the value is worse than this.
        verbose: Keep a notice of every improvement.

    Attributes:
        best_score: The best value so far, infinitely bad before the first check.
        wait_count: Checks since the last improvement.
        stopped_epoch: Index of the epoch in which it asked to stop; None if it did not.

    Raises:
        ConfigError: For a value that cannot work, or a series that nothing logs.

    Example:
        >>> stopping = EarlyStopping("val/accuracy", mode="max", patience=5, min_delta=0.001)
    """

    order = 1
    may_log = False
    _elsewhere: ClassVar[dict[str, str]] = {
        "strict": "A series that nothing logs is always an error.",
        "check_on_train_epoch_end": "A check is made when the series has a new value.",
        "log_rank_zero_only": "Notices are kept with `verbose=True`.",
    }

    @checks_options
    def __init__(
        self,
        monitor: str,
        *,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        verbose: bool = False,
    ) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise ConfigError(f"EarlyStopping needs the name of a series, got {monitor!r}.")
        if mode not in _SIGN:
            raise ConfigError(f"mode={mode!r}: use 'min' or 'max'.")
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 0:
            raise ConfigError(f"patience must be an integer, 0 or more, got {patience!r}.")
        if not min_delta >= 0.0:
            raise ConfigError(f"min_delta must be 0 or more in both modes, got {min_delta!r}.")
        self.monitor = monitor
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.verbose = verbose
        self._is_fit = False
        self._reset()

    def _reset(self) -> None:
        self.best_score = _SIGN[self.mode] * math.inf
        self.wait_count = 0
        self.stopped_epoch: int | None = None
        self._seen = 0
        self._awaits_validation = False

    @property
    def state_key(self) -> str:
        """Name of this callback's state: one for each series and mode."""
        return f"EarlyStopping[{self.monitor},{self.mode}]"

    def setup(self, run: Run) -> None:
        """Start afresh; a resumed run gets its counts from the checkpoint."""
        self._is_fit = run.stage == "fit"
        if self._is_fit:
            self._reset()

    def check_batch(self, stage: Stage, batch: PyTree, outputs: Mapping[str, Any]) -> None:
        """Note that there will be a validation, which may be the one to log the series."""
        self._awaits_validation |= stage == "validate"

    def on_validation_end(self, run: Run) -> None:
        """Check, if the validation has logged the series."""
        if self._is_fit and run.stage != "sanity":
            self._awaits_validation = False
            self._check(run, len(run.history.epoch.get(self.monitor, ())))

    def on_train_epoch_end(self, run: Run) -> None:
        """Check, if the epoch has logged the series; raise if nothing does."""
        # An epoch cut short has no mean to compare, and a resumed run would count it twice.
        if not run.is_epoch_end or not run.batch_idx:
            return
        history = run.history
        series = history.epoch.get(self.monitor, history.step.get(self.monitor))
        if series is not None:
            self._check(run, len(series))
        elif not self._awaits_validation:
            names = list(history)
            raise ConfigError(
                f"EarlyStopping monitors {self.monitor!r}, which nothing has logged in epoch "
                f"{run.epoch}; logged: {', '.join(names) or 'nothing'}."
                f"{did_you_mean(self.monitor, names)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the checks since."""
        return {
            "best_score": self.best_score,
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self.best_score = state["best_score"]
        self.wait_count = state["wait_count"]
        self.stopped_epoch = state["stopped_epoch"]

    def _check(self, run: Run, num_values: int) -> None:
        if num_values == self._seen:
            return
        self._seen = num_values
        best, value = self.best_score, run.metrics[self.monitor]
        reason = self._judge(value)
        if reason is not None:
            # While `min_epochs` holds the stop back, the first reason stands, and its epoch.
            self.stopped_epoch = self.stopped_epoch if run.should_stop else run.epoch
            run.stop(f"early_stopping: {self.monitor} {reason}")
        elif self.verbose and self.best_score != best:
            run.notice(
                f"early_stopping: {self.monitor} improved from {best:.5g} to {value:.5g} in epoch "
                f"{run.epoch}"
            )

    def _judge(self, value: float) -> str | None:
        """Count one check, and return why to stop, if so."""
        if self.check_finite and not math.isfinite(value):
            return f"is {value}"
        if self._is_better(value, self.best_score, by=self.min_delta):
            self.best_score, self.wait_count = value, 0
        else:
            self.wait_count += 1
        stopping, divergence = self.stopping_threshold, self.divergence_threshold
        if stopping is not None and self._is_better(value, stopping):
            return f"is {value:.5g}, better than stopping_threshold={stopping:g}"
        if divergence is not None and self._is_better(divergence, value):
            return f"is {value:.5g}, worse than divergence_threshold={divergence:g}"
        if self.wait_count and self.wait_count >= self.patience:
            checks = "check" if self.wait_count == 1 else "checks"
            return f"did not improve for {self.wait_count} {checks} (best {self.best_score:.5g})"
        return None

    def _is_better(self, value: float, than: float, by: float = 0.0) -> bool:
        sign = _SIGN[self.mode]
        return sign * value + by < sign * than
