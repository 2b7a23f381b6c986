"""The table of where the time went.

Knows numbers, strings and rich.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from jaxtrainer.display.text import format_seconds


def phase_table(seconds: Mapping[str, float], total_s: float) -> Table:
    """Return the time and the share of each phase; what no phase explains is `other`.

    Args:
        seconds: Seconds by phase, in the order of the rows; phases of no time are left out.
        total_s: Seconds of the whole.
    """
    other = {"other": max(total_s - sum(seconds.values()), 0.0)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("where the time went", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for name, spent in {**seconds, **other}.items():
        if spent > 0.0:
            share = spent / total_s if total_s > 0.0 else 0.0
            table.add_row(name, format_seconds(spent), f"{share:.1%}")
    table.add_section()
    table.add_row("total", format_seconds(total_s), "")
    return table
