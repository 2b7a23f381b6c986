"""Spans of time as users write them, in seconds.

Imports `errors` only. `Trainer(max_time=...)` and `Timer(duration=...)` share it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import TypeAlias

from jaxtrainer.errors import ConfigError, did_you_mean

Duration: TypeAlias = str | timedelta | Mapping[str, float] | float
"""`"DD:HH:MM:SS"`, a timedelta, its keywords in a dict, or seconds."""

_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")
_TEXT = re.compile(r"(\d+):(\d{1,2}):(\d{1,2}):(\d{1,2})")
_FORMS = "write `'DD:HH:MM:SS'`, `timedelta(hours=2)`, `{'hours': 2}` or seconds as a number"


def parse_duration(value: Duration) -> float:
    """Return a span of time in seconds.

    Args:
        value: `"DD:HH:MM:SS"` (days, hours, minutes, seconds), a `timedelta`, a dict of
            `timedelta` keywords, or a number of seconds.

    Raises:
        ConfigError: The value is none of these, or not a positive, finite time.

    Example:
        >>> parse_duration("00:12:00:00"), parse_duration({"minutes": 1.5}), parse_duration(7)
        (43200.0, 90.0, 7.0)
    """
    seconds = _seconds(value)
    if not 0.0 < seconds < math.inf:
        raise ConfigError(
            f"The duration {value!r} is {seconds:g} s; it must be positive and finite."
        )
    return seconds


def _seconds(value: object) -> float:
    match value:
        case str():
            return _from_text(value)
        case timedelta():
            return value.total_seconds()
        case Mapping():
            return _from_mapping(value)
        case bool():
            pass
        case int() | float():
            return float(value)
    raise ConfigError(f"Got {value!r} as a duration; {_FORMS}.")


def _from_text(text: str) -> float:
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"Got {text!r} as a duration; {_FORMS}, e.g. '00:01:30:00' for 1.5 h.")
    days, hours, minutes, seconds = (int(part) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _from_mapping(parts: Mapping[str, float]) -> float:
    for unit in parts:
        if unit not in _UNITS:
            hint = did_you_mean(str(unit), _UNITS) or f" Units: {', '.join(_UNITS)}."
            raise ConfigError(f"The duration {dict(parts)!r} has an unknown unit {unit!r}.{hint}")
    try:
        return timedelta(**parts).total_seconds()
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"Got {dict(parts)!r} as a duration ({error}); {_FORMS}.") from None
