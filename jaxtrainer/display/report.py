"""The tables of where the time went: by phase, and by hook.

Knows numbers, strings and rich.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from jaxtrainer.display.text import format_seconds

PHASES: dict[str, str] = {
    "init": "initialisation",
    "compile": "compilation",
    "tune": "tuning",
    "data": "waiting for data",
    "device": "waiting for the device",
    "dispatch": "dispatch",
    "validate": "validation",
    "checkpoint": "checkpoints",
}
"""How the report calls the phases of `run.timings`, in its order."""


def named_phases(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of `run.timings` by what the report calls the phases, in its order."""
    known = {name: seconds.get(key, 0.0) for key, name in PHASES.items()}
    return {**known, **{key: s for key, s in seconds.items() if key not in PHASES}}


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


def hook_table(times: Mapping[str, tuple[int, float]], total_s: float) -> Table:
    """Return the calls and the time of each hook, those that took longest first.

    Beyond the first ten, those with less than a two-thousandth of the whole are put together.

    Args:
        times: Calls and seconds by hook.
        total_s: Seconds of the whole, of which the shares are.
    """
    ranked = sorted(times.items(), key=lambda item: -item[1][1])
    count = max(10, sum(seconds >= total_s / 2000 for _, (_, seconds) in ranked))
    shown, rest = ranked[:count], [time for _, time in ranked[count:]]
    if rest:
        calls, seconds = zip(*rest, strict=True)
        shown.append((f"{len(rest)} others", (sum(calls), sum(seconds))))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("hook", overflow="fold")
    for name in ("calls", "total ms", "mean us", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, (calls, seconds) in shown:
        mean_us = 1e6 * seconds / calls if calls else 0.0
        share = seconds / total_s if total_s > 0.0 else 0.0
        table.add_row(
            name, f"{calls:,}", f"{1e3 * seconds:,.1f}", f"{mean_us:,.1f}", f"{share:.1%}"
        )
    return table
