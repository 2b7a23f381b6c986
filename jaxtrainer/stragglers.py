"""Which process the others wait for, from what they say of their times.

May import `watchdog`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from jaxtrainer.watchdog import Progress

FACTOR = 2.0
"""A process is slow if a batch takes it this many times as much time of its own as the others."""

_SHARE = 0.1
"""And if this is at least such a part of the time of a batch."""


@dataclass(frozen=True, kw_only=True)
class ProcessTimes:
    """Time of one process for a batch, over the last report interval.

    Attributes:
        process: Its index.
        step: Optimiser steps so far.
        own_s: Seconds of its own: all but waiting for the devices.
        data_s: Of these, waiting for its loader.
        batch_s: Seconds of a batch altogether.
    """

    process: int
    step: int
    own_s: float
    data_s: float
    batch_s: float


class Stragglers:
    """Compares what a batch costs each process, once in a report interval.

    In a synchronous step all wait for the slowest: it alone does not wait for its devices. What is
    slow in two intervals in a row is told, once.

    Args:
        every: Batches of an interval.
        name: Says how a process is called.
    """

    def __init__(self, every: int, name: Callable[[int], str]) -> None:
        self.every = every
        self.name = name
        self._before: dict[int, Progress] = {}
        self._told: set[int] = set()
        self._suspects: set[int] = set()

    def compare(self, rows: Mapping[int, Progress]) -> tuple[list[ProcessTimes], list[str]]:
        """Return the times of all processes if an interval is over, and what is new to tell."""
        rows = {p: r for p, r in rows.items() if r.stage == "train" and r.is_running}
        # What was compiled before the first step is of no interval.
        for process, row in rows.items():
            if row.is_armed:
                self._before.setdefault(process, row)
        done = [r.batches - self._before[p].batches for p, r in rows.items() if p in self._before]
        if len(done) < len(rows) or not done or min(done) < self.every:
            return [], []
        times = [_times(p, self._before[p], rows[p]) for p in sorted(rows)]
        self._before = dict(rows)
        slow = {one.process: one for one in times if _is_slow(one, times)}
        news = (slow.keys() & self._suspects) - self._told
        self._told, self._suspects = self._told | news, {*slow}
        return times, [self._sentence(slow[process], times) for process in sorted(news)]

    def _sentence(self, one: ProcessTimes, times: list[ProcessTimes]) -> str:
        return (
            f"{self.name(one.process)} holds the others up: a batch takes it "
            f"{1e3 * one.own_s:.3g} ms of its own, {1e3 * one.data_s:.3g} ms of these waiting for "
            f"its loader, and the others {1e3 * _usual_s(one, times):.3g} ms"
        )


def _is_slow(one: ProcessTimes, times: list[ProcessTimes]) -> bool:
    usual_s = _usual_s(one, times)
    return one.own_s > FACTOR * usual_s and one.own_s - usual_s > _SHARE * one.batch_s


def _usual_s(one: ProcessTimes, times: list[ProcessTimes]) -> float:
    others = [t.own_s for t in times if t.process != one.process]
    return median(others) if others else one.own_s


def _times(process: int, before: Progress, now: Progress) -> ProcessTimes:
    batches = now.batches - before.batches
    spent_s = now.elapsed_s - before.elapsed_s
    return ProcessTimes(
        process=process,
        step=now.step,
        own_s=max(0.0, spent_s - (now.waited_s - before.waited_s)) / batches,
        data_s=(now.data_s - before.data_s) / batches,
        batch_s=spent_s / batches,
    )
