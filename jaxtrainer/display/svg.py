"""Curves as SVG that is put into a page: polylines, axes, and titles that show on hovering.

Colours are classes (`c0`, `c1`, ...), which the style of the page defines. Knows numbers and
strings only.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 20, 36
NUM_COLORS = 8
_MOST_POINTS = 1000
_MOST_DOTS = 200

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One polyline.

    Attributes:
        label: What it shows.
        points: `(x, y)` in order; a `y` that is not finite interrupts it.
        color: Number of its colour.
        is_faint: Drawn thin, without dots.
    """

    label: str
    points: Sequence[Point]
    color: int
    is_faint: bool = False


def share_of(value: float, low: float, high: float) -> float:
    """Return where between two numbers a third one is, from 0 to 1, for floats of any size."""
    # The difference of two large ones is infinite, half of the smallest ones 0.
    half = 0.5 if math.isinf(high - low) else 1.0
    return (value * half - low * half) / (high * half - low * half)


@final
class Axis:
    """A range of numbers on a range of pixels.

    Args:
        low: The least number.
        high: The greatest.
        start: Pixel of the least.
        end: Pixel of the greatest.
        is_log: Whether equal factors have equal lengths.
    """

    def __init__(
        self, low: float, high: float, start: float, end: float, *, is_log: bool = False
    ) -> None:
        if low == high:
            room = abs(low) * 0.1 or 1.0
            low, high = (low / 2, high * 2) if is_log else (low - room, high + room)
        self.low, self.high, self.start, self.end, self.is_log = low, high, start, end, is_log

    def __call__(self, value: float) -> float:
        """Return the pixel of a number."""
        share = share_of(self._scaled(value), self._scaled(self.low), self._scaled(self.high))
        return self.start + share * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    @property
    def ticks(self) -> list[float]:
        """Round numbers within the range."""
        if self.is_log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            every = max(1, -(-(last - first + 1) // 6))
            return [10.0**power for power in range(first, last + 1, every)]
        return round_ticks(self.low, self.high)


def round_ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten within a range.

    Example:
        >>> round_ticks(0.0, 1.0), round_ticks(93.0, 407.0)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [100.0, 200.0, 300.0, 400.0])
    """
    rough = high / at_most - low / at_most
    if not (math.isfinite(rough) and rough > 0.0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(size)))
    return [round(i * size, digits) for i in range(first, last + 1)]


def chart(
    curves: Sequence[Curve], *, title: str, marks: Mapping[float, str] | None = None, is_log: bool
) -> str:
    """Return an `<svg>` of curves over one x axis.

    Args:
        curves: What to draw; faint ones lie below.
        title: For those who have it read to them.
        marks: Positions on the x axis that get a vertical line, and its label.
        is_log: Whether the y axis is logarithmic.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points if math.isfinite(y)]
    x_axis = Axis(min(xs, default=0.0), max(xs, default=1.0), LEFT, WIDTH - RIGHT)
    bottom = HEIGHT - BOTTOM
    y_axis = Axis(min(ys, default=0.0), max(ys, default=1.0), bottom, TOP, is_log=is_log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_y_tick(y_axis, value) for value in y_axis.ticks),
        *(_x_tick(x_axis, value, bottom) for value in x_axis.ticks),
        *(_mark(x_axis(x), label, bottom) for x, label in (marks or {}).items()),
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>',
    ]
    for curve in sorted(curves, key=lambda curve: not curve.is_faint):
        parts += _curve(curve, x_axis, y_axis)
    return "\n".join([*parts, "</svg>"])


def escape(text: object) -> str:
    """Return text that is safe in HTML, in an attribute too, and can be encoded.

    Example:
        >>> escape('<a href="x">')
        '&lt;a href=&quot;x&quot;&gt;'
    """
    known = str(text).encode("utf-8", "replace").decode("utf-8")
    printable = "".join(
        c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in known
    )
    return html.escape(printable)


def format_tick(value: float) -> str:
    """Return a short text for a round number.

    Example:
        >>> [format_tick(v) for v in (0.0, 0.2, 1500.0, 20000.0, 2e6, 1e-5)]
        ['0', '0.2', '1500', '20k', '2M', '1e-05']
    """
    for limit, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if limit <= abs(value) < 1e12:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"


def thinned(points: Sequence[Point], at_most: int = _MOST_POINTS) -> Sequence[Point]:
    """Return so many points at most: the lowest and the highest of each stretch, in order."""
    if len(points) <= at_most:
        return points
    stretches = at_most // 2
    edges = [round(i * len(points) / stretches) for i in range(stretches + 1)]
    kept: list[Point] = []
    for start, end in itertools.pairwise(edges):
        stretch = points[start:end]
        broken = [point for point in stretch if not math.isfinite(point[1])]
        finite = [point for point in stretch if math.isfinite(point[1])]
        ends = [min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])] if finite else []
        kept += broken[:1] + sorted(dict.fromkeys(ends))
    return kept


def _curve(curve: Curve, x_axis: Axis, y_axis: Axis) -> list[str]:
    look = f"c{curve.color % NUM_COLORS}{' faint' if curve.is_faint else ''}"
    look += " dense" if len(curve.points) > _MOST_DOTS else ""
    parts: list[str] = []
    for run in _unbroken(thinned(curve.points)):
        at = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in run)
        parts.append(f'<polyline class="{look}" points="{at}"/>')
    if not curve.is_faint and len(curve.points) <= _MOST_DOTS:
        parts += [
            f'<circle class="{look}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3">'
            f"<title>{escape(f'{curve.label} at step {x:g}: {y:.6g}')}</title></circle>"
            for x, y in curve.points
            if math.isfinite(y)
        ]
    return parts


def _unbroken(points: Sequence[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _y_tick(axis: Axis, value: float) -> str:
    y = axis(value)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
        f"{format_tick(value)}</text>"
    )


def _x_tick(axis: Axis, value: float, bottom: float) -> str:
    return (
        f'<text class="axis" x="{axis(value):.1f}" y="{bottom + 16}" text-anchor="middle">'
        f"{format_tick(value)}</text>"
    )


def _mark(x: float, label: str, bottom: float) -> str:
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
        f'<text class="axis" x="{x:.1f}" y="{TOP - 6}" text-anchor="middle">{escape(label)}</text>'
    )
