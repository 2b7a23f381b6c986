"""`TerminateOnNaN`: ends a run whose loss is no number any more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.run import Run


class TerminateOnNaN(Callback):
    """Stop when the monitored series is NaN or infinite.

    Looks at what the host gets to know anyway, the reports and the ends of epochs, and so costs
    nothing in a step: a NaN is seen up to two report intervals late. The trainer's `min_epochs`
    and `min_steps` hold the stop back.

    Args:
        monitor: Series to watch.

    Raises:
        ConfigError: If `monitor` is no name, or looks misspelt when training starts.

    Example:
        >>> callbacks = [TerminateOnNaN(), TerminateOnNaN(monitor="train/grad_norm")]
    """

    order = 1
    may_log = False
    _elsewhere: ClassVar[dict[str, str]] = {
        "patience": "It stops at the first one; `EarlyStopping` has patience.",
    }

    @checks_options
    def __init__(self, monitor: str = "train/loss") -> None:
        if not isinstance(monitor, str) or not monitor:
            raise ConfigError(f"TerminateOnNaN needs the name of a series, got {monitor!r}.")
        self.monitor = monitor

    def on_report(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        """Look at the value of the step."""
        self._check(run, metrics.get(self.monitor, 0.0), "at step", step)

    def on_validation_epoch_end(self, run: Run) -> None:
        """Look at the newest value."""
        self._check(run, run.metrics.get(self.monitor, 0.0), "at step", run.global_step)

    def on_train_epoch_end(self, run: Run) -> None:
        """Look at the mean of the epoch."""
        self._check(run, run.metrics.get(self.monitor, 0.0), "in epoch", run.epoch)

    def on_train_end(self, run: Run) -> None:
        """Say so if there never was a value to look at."""
        if self.monitor not in run.metrics:
            run.notice(f"TerminateOnNaN monitors {self.monitor!r}, which nothing has logged")

    def _check(self, run: Run, value: Any, where: str, index: int) -> None:
        if not math.isfinite(value):
            run.stop(f"terminate_on_nan: {self.monitor} is {value} {where} {index}")
