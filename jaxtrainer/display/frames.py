"""What one frame of the display can show: a bar with its numbers, or a phase that takes time.

Each is a rich renderable of exactly one line, and has the same as plain text. A frame builds
its segments itself: a table of columns costs several times more CPU, which XLA needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar as RichBar
from rich.segment import Segment

from jaxtrainer.display.text import fit, format_clock, format_rate, format_seconds

MIN_BAR, MAX_BAR = 8, 40
# Columns left free: the terminal echoes Ctrl-C as `^C` behind the line, and what does not fit
# goes to a line of its own, which rich would then erase instead of the frame's.
MARGIN = 2


class Frame(Protocol):
    """One line of the display."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the segments of the line."""
        ...

    def plain(self) -> str:
        """Return the line for a log file."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Bar:
    """A count on its way to a total.

    Attributes:
        label: What is counted, `"Epoch 2/5"`.
        total: Where the count ends; None if not known, then the bar pulses.
        elapsed_s: Seconds so far.
        rate: Counts per second, if known.
        unit: What the rate counts, `"steps/s"`.
        metrics: Formatted metrics; cut where the line ends.
    """

    label: str
    done: int
    total: int | None
    elapsed_s: float
    rate: float | None = None
    unit: str = "steps/s"
    metrics: str = ""

    @property
    def remaining_s(self) -> float | None:
        """Seconds to go at this rate; None if rate or total is not known."""
        if self.total is None or not self.rate:
            return None
        return max(self.total - self.done, 0) / self.rate

    @property
    def count(self) -> str:
        """The count as `120/235`, as wide for every count of a total."""
        if self.total is None:
            return str(self.done)
        return f"{self.done:>{len(str(self.total))}}/{self.total}"

    @property
    def times(self) -> str:
        """Elapsed and remaining time, `0:06<0:12`."""
        if self.total is None:
            return format_clock(self.elapsed_s)
        left = self.remaining_s
        return f"{format_clock(self.elapsed_s)}<{'-:--' if left is None else format_clock(left)}"

    @property
    def speed(self) -> str:
        """The rate with its unit."""
        return f"{format_rate(self.rate)} {self.unit}"

    def plain(self) -> str:
        """Return the line for a log file."""
        parts = (self.label, self.count, self.times, self.speed, self.metrics)
        return "  ".join(part for part in parts if part)

    def summary(self, width: int | None = None) -> str:
        """Return the line that stays when the count has ended.

        Args:
            width: Columns there are, if limited: the metrics matter more than the count of a
                whole epoch and its speed, which are then left out in turn.
        """
        time = format_seconds(self.elapsed_s)
        count = "" if self.done == self.total else self.count
        line = ""
        for parts in ((self.count, time, self.speed), (count, time, self.speed), (count, time)):
            line = "  ".join(part for part in (self.label, *parts, self.metrics) if part)
            if width is None or cell_len(line) <= width:
                break
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one line, as wide as the console at most."""
        width = options.max_width - MARGIN
        numbers = [
            (f" {self.count}", "progress.download"),
            (f" {self.times}", "progress.remaining"),
            (f" {self.speed}", "progress.data.speed"),
        ]
        room = width - cell_len(self.label) - sum(len(text) for text, _ in numbers) - 1
        wanted = cell_len(self.metrics) + 1 if self.metrics else 0
        bar_width = _clamp(room - wanted, MIN_BAR, MAX_BAR) if room >= MIN_BAR else 0
        line = [Segment(f"{self.label} ", console.get_style("progress.description"))]
        line += self._bar(console, options, bar_width)
        line += [Segment(text, console.get_style(style)) for text, style in numbers]
        if wanted:
            ellipsis = "." if options.ascii_only else "…"
            line.append(Segment(fit(f" {self.metrics}", room - bar_width, ellipsis)))
        yield from Segment.adjust_line_length(line, width, pad=False)
        yield Segment.line()

    def _bar(self, console: Console, options: ConsoleOptions, width: int) -> list[Segment]:
        if width == 0:
            return []
        bar = RichBar(
            total=self.total, completed=self.done, width=width, animation_time=self.elapsed_s
        )
        segments = [s for s in bar.__rich_console__(console, options) if isinstance(s, Segment)]
        return Segment.adjust_line_length(segments, width)


@final
@dataclass(frozen=True, kw_only=True)
class Status:
    """A phase without a count, such as a compilation.

    Attributes:
        label: `"compiling train step"`.
        elapsed_s: Seconds so far.
    """

    label: str
    elapsed_s: float

    def plain(self) -> str:
        """Return the line for a log file."""
        return f"{self.label} ... {self.elapsed_s:.1f} s"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one line, as wide as the console at most."""
        line = [Segment(self.plain(), console.get_style("progress.remaining"))]
        yield from Segment.adjust_line_length(line, options.max_width - MARGIN, pad=False)
        yield Segment.line()


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
