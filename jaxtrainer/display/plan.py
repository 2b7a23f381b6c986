"""Tables of a plan for several devices: bytes, collectives, the least time of a step.

Knows numbers and strings only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rich import box
from rich.table import Table

from jaxtrainer.display.text import format_bytes


class Row(NamedTuple):
    """Collectives of one kind: what they do, along which axes, how many, and their bytes."""

    op: str
    axes: tuple[str, ...]
    num: int
    size_bytes: float
    sent_bytes: float


def bytes_table(parts: Mapping[str, int], peak_bytes: int) -> Table:
    """Return the bytes of each part on one device, and the peak."""
    table = _table(("bytes on a device", "", "share"))
    for name, size in {**parts, "at the peak": peak_bytes}.items():
        share = f"{size / peak_bytes:.1%}" if peak_bytes else ""
        table.add_row(name, format_bytes(size), share)
    return table


def traffic_table(rows: Iterable[Row]) -> Table:
    """Return the collectives of a step."""
    table = _table(("collectives of a step", "axes", "count", "results", "sent"))
    for row in rows:
        axes = ", ".join(row.axes) or "other"
        sizes = format_bytes(row.size_bytes), format_bytes(row.sent_bytes)
        table.add_row(row.op, axes, str(row.num), *sizes)
    return table


def estimate_table(title: str, rows: Mapping[str, str]) -> Table:
    """Return an estimate, one figure a row."""
    table = _table((title, ""), right=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _table(names: tuple[str, ...], *, right: bool = True) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, name in enumerate(names):
        is_number = right and index > 0 and name != "axes"
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    return table
