"""When to validate: the schedules that the training loop asks after each dispatch.

Integers, a clock and the run's record; reads no device. May import levels 0 to 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from jaxtrainer.errors import ConfigError
from jaxtrainer.every import Every
from jaxtrainer.run import Run

ANY_NUMBER = 1 << 30
"""Batches that may run where a schedule does not ask for control."""


class Schedule:
    """When validation is due.

    Args:
        at_end: Whether the state in which training ends is validated, if it has not been:
            `"always"`, `"within"` an epoch only, or `"never"`.
    """

    def __init__(self, at_end: str) -> None:
        self._at_end = at_end

    def start(self, run: Run) -> None:
        """Training starts, or goes on after a resume."""

    def is_due(self, run: Run, is_last: bool) -> bool:
        """Return whether to validate now; `is_last` is whether the epoch ends here."""
        return self._is_time(run, is_last) or self.is_due_at_end(run, is_last)

    def is_due_at_end(self, run: Run, is_last: bool) -> bool:
        """Return whether training ends here with a state that is still to be validated."""
        if run.stop_reason == "interrupted" or run.validated_batches == run.total_batches:
            return False
        if self._at_end == "always":
            return run.is_done or (is_last and run.epoch + 1 == run.limits.max_epochs)
        return self._at_end == "within" and run.is_done and not is_last

    def _is_time(self, run: Run, is_last: bool) -> bool:
        raise NotImplementedError

    def room(self, run: Run) -> int:
        """Return how many batches may run before a dispatch must end."""
        return ANY_NUMBER


@final
class EpochSchedule(Schedule):
    """Within every n-th epoch after each `period` batches, or at its end."""

    def __init__(self, at_end: str, *, every_n_epochs: int, period: int | None = None) -> None:
        super().__init__(at_end)
        self._every_n_epochs = every_n_epochs
        self._period = period

    def _is_time(self, run: Run, is_last: bool) -> bool:
        if (run.epoch + 1) % self._every_n_epochs:
            return False
        return is_last if self._period is None else run.batch_idx % self._period == 0

    def room(self, run: Run) -> int:
        """See `Schedule.room`."""
        return ANY_NUMBER if self._period is None else self._period - run.batch_idx % self._period


@final
class CountSchedule(Schedule):
    """At every multiple of so many steps or batches of the run."""

    def __init__(self, at_end: str, *, period: int, of_steps: bool) -> None:
        super().__init__(at_end)
        self._period = period
        self._count: Callable[[Run], int] = _steps if of_steps else _batches
        self._room: Callable[[Run, int], int] = _until_step if of_steps else _until_batch
        self._next = period

    def start(self, run: Run) -> None:
        """See `Schedule.start`."""
        self._next = (self._count(run) // self._period + 1) * self._period

    def _is_time(self, run: Run, is_last: bool) -> bool:
        # No remainder: between two optimiser steps several batches see the same count.
        if self._count(run) < self._next:
            return False
        self.start(run)
        return True

    def room(self, run: Run) -> int:
        """See `Schedule.room`."""
        return self._room(run, self._next)


@final
class TimeSchedule(Schedule):
    """When so many seconds have passed since the last validation ended."""

    def __init__(self, at_end: str, *, period_s: float) -> None:
        super().__init__(at_end)
        self._period_s = period_s

    def start(self, run: Run) -> None:
        """See `Schedule.start`."""
        # What this call has spent so far is start-up and compilation.
        run.validated_at_s += run.timings.elapsed_s

    def _is_time(self, run: Run, is_last: bool) -> bool:
        return run.agree("validate", run.elapsed_s - run.validated_at_s >= self._period_s)


def _steps(run: Run) -> int:
    return run.global_step


def _batches(run: Run) -> int:
    return run.total_batches


def _until_step(run: Run, step: int) -> int:
    return run.batches_until(step)


def _until_batch(run: Run, batch: int) -> int:
    return batch - run.total_batches


def build_schedule(interval: Any, every_n_epochs: int, num_batches: int | None) -> Schedule:
    """Return the schedule of `val_check_interval` and `check_val_every_n_epoch`.

    Args:
        interval: `Every`, batches (int), a fraction of an epoch (float), or None.
        every_n_epochs: Validate in every n-th epoch only.
        num_batches: Batches of an epoch, if known.

    Raises:
        ConfigError: For an interval that cannot work.
    """
    if not isinstance(interval, Every):
        period = _period_in_epoch(interval, num_batches)
        return EpochSchedule("within", every_n_epochs=every_n_epochs, period=period)
    at_end = "always" if interval.at_end else "never"
    if interval.unit == "epochs":
        return EpochSchedule(at_end, every_n_epochs=interval.value)
    if interval.unit == "minutes":
        return TimeSchedule(at_end, period_s=60.0 * interval.value)
    return CountSchedule(at_end, period=interval.value, of_steps=interval.unit == "steps")


def _period_in_epoch(interval: Any, num_batches: int | None) -> int | None:
    """Return every how many batches of an epoch to validate; None for at its end only."""
    if interval is None or (isinstance(interval, float) and interval == 1.0):
        return None
    if isinstance(interval, bool) or not isinstance(interval, int | float) or not interval > 0:
        raise ConfigError(
            f"val_check_interval={interval!r}: pass an integer (batches), a fraction of an epoch, "
            "or an interval with its unit: `Every(steps=500)`."
        )
    if isinstance(interval, float):
        if interval > 1.0 or num_batches is None:
            raise ConfigError(
                f"val_check_interval={interval} is a fraction of an epoch"
                f"{' of unknown length' if num_batches is None else ' above 1'}; for a number of "
                f"batches pass an integer: `val_check_interval={int(interval) or 100}`."
            )
        return max(1, int(interval * num_batches))
    if num_batches is not None and interval > num_batches:
        raise ConfigError(
            f"val_check_interval={interval} is more than the {num_batches} batches of an epoch; "
            f"to count on through the epochs pass `Every(batches={interval})`, to validate in some "
            "epochs only `check_val_every_n_epoch`."
        )
    return interval
