"""A series of numbers as one line of blocks, or of ASCII where the terminal has no blocks.

Knows numbers, strings and rich.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

from jaxtrainer.display.svg import share_of

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-=+*%#"
NOT_FINITE = "!"
MAX_WIDTH = 40


def sparkline(values: Sequence[float], width: int = MAX_WIDTH, levels: str = BLOCKS) -> str:
    """Return a line of so many characters at most, from the lowest value to the highest.

    More values than that are put together, each character the mean of as many neighbours. Where
    one of them is NaN or infinite there is a `!`.

    Args:
        values: The series.
        width: Characters at most.
        levels: The characters, from low to high.

    Example:
        >>> sparkline([3.0, 2.0, 1.0, 1.5]), sparkline([0.0, 1.0], levels=ASCII)
        ('█▅▁▃', '_#')
    """
    means = _resampled(values, width)
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    top = len(levels) - 1
    if not high > low:
        return "".join(levels[top // 2] if math.isfinite(m) else NOT_FINITE for m in means)
    return "".join(
        levels[round(share_of(mean, low, high) * top)] if math.isfinite(mean) else NOT_FINITE
        for mean in means
    )


@final
class Sparkline:
    """A sparkline as a part of a table: as wide as there is room, in what can be encoded."""

    def __init__(self, values: Sequence[float], max_width: int = MAX_WIDTH) -> None:
        self.values = values
        self.max_width = max_width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one line."""
        levels = ASCII if options.ascii_only else BLOCKS
        yield Segment(sparkline(self.values, min(options.max_width, self.max_width), levels))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return that it can be as narrow as a few characters."""
        width = min(len(self.values), self.max_width, options.max_width)
        return Measurement(min(8, width), width)


def _resampled(values: Sequence[float], width: int) -> list[float]:
    count = len(values)
    if count <= width:
        return [float(value) for value in values]
    edges = [round(i * count / width) for i in range(width + 1)]
    return [_mean(values[start:end]) for start, end in itertools.pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values)
