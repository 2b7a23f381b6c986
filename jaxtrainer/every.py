"""`Every`: an interval that says its unit. Imports `errors` and `duration` only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from jaxtrainer.duration import parse_duration
from jaxtrainer.errors import ConfigError, checks_options

_UNITS = ("steps", "batches", "epochs", "minutes")


@dataclass(frozen=True, kw_only=True)
class Every:
    """How often to validate: `Trainer(val_check_interval=Every(steps=500))`.

    Exactly one unit is given. Steps and batches are counted over the whole run, so that the
    interval may be longer than an epoch, and a resumed run keeps it.

    Attributes:
        steps: Optimiser steps.
        batches: Training batches.
        epochs: Epochs; validation then comes at the end of each such.
        minutes: Minutes of this run since the last validation ended, looked at after each
            dispatch. Those before a resume count; the time in between, start-up and compilation
            do not.
        at_end: Validate once more when training ends, if the last state has not been.

    Raises:
        ConfigError: If not exactly one unit is given, or it is not positive.

    Example:
        >>> Every(minutes=10), Every(epochs=2, at_end=False)
        (Every(minutes=10), Every(epochs=2, at_end=False))
    """

    steps: int | None = None
    batches: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    at_end: bool = True

    def __post_init__(self) -> None:
        if len(self._given) != 1:
            got = ", ".join(f"{unit}={value!r}" for unit, value in self._given.items())
            raise ConfigError(
                f"Every({got}): pass one unit, e.g. `Every(steps=500)`; there are "
                f"{', '.join(_UNITS)}."
            )
        kinds = int | float if self.unit == "minutes" else int
        is_number = isinstance(self.value, kinds) and not isinstance(self.value, bool)
        if not is_number or not 0 < self.value < math.inf:
            kind = "a number" if self.unit == "minutes" else "an integer"
            raise ConfigError(f"Every({self.unit}={self.value!r}): pass {kind} above 0.")

    @property
    def _given(self) -> dict[str, Any]:
        values = {unit: getattr(self, unit) for unit in _UNITS}
        return {unit: value for unit, value in values.items() if value is not None}

    @property
    def unit(self) -> str:
        """`"steps"`, `"batches"`, `"epochs"` or `"minutes"`."""
        return next(iter(self._given))

    @property
    def value(self) -> Any:
        """How many of them."""
        return self._given[self.unit]

    def __repr__(self) -> str:
        return f"Every({self.unit}={self.value!r}{'' if self.at_end else ', at_end=False'})"


# A dataclass writes its own `__init__`, which would not name the close match.
Every.__init__ = checks_options(Every.__init__)


def as_interval(value: Any) -> Any:
    """Return the interval, a span of time (`"DD:HH:MM:SS"`, timedelta, dict) as `Every`."""
    if isinstance(value, str | timedelta | Mapping):
        return Every(minutes=parse_duration(value) / 60.0)
    return value
