"""What the processes of a run know of each other, and when one of them counts as stuck.

No thread, no device and no network here: `peers.py` brings the rows and the time. May import level
0 and `whereabouts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtrainer.types import Clock
from jaxtrainer.whereabouts import Place

_LIMITED = ("hook", "save", "host")
"""Phases in which a process keeps the others waiting by itself, without a limit of their own."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a process says of itself: one row of the table.

    Attributes:
        beat: Grows each time it says something.
        stage: As in `Run`.
        step: Optimiser steps so far.
        batches: Batches trained on so far.
        phase: Where its main thread is, see `whereabouts`.
        detail: Which hook.
        since_s: For how long it has been there without any progress.
        is_armed: Whether its first step has run.
        elapsed_s: Seconds since the call began.
        data_s: Of these, waiting for the loader.
        waited_s: Of these, waiting for its devices, and so for the slowest process.
    """

    beat: int
    stage: str
    step: int
    batches: int
    phase: str
    detail: str = ""
    since_s: float = 0.0
    is_armed: bool = False
    elapsed_s: float = 0.0
    data_s: float = 0.0
    waited_s: float = 0.0

    @property
    def is_running(self) -> bool:
        """Whether its call goes on."""
        return self.phase not in ("ended", "ending")

    def to_text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Progress:
        """Return what `to_text` was made from."""
        return cls(**json.loads(text))


class Watchdog:
    """Looks at where this process is, and at the rows of the others.

    Args:
        index: Which process this is.
        count: How many there are.
        timeout_s: How long a process may keep the others waiting; None for ever.
        silence_s: How long it may say nothing; None as `timeout_s`.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        index: int,
        count: int,
        *,
        timeout_s: float | None,
        silence_s: float | None = None,
        clock: Clock,
    ) -> None:
        self.index, self.count = index, count
        self.timeout_s = timeout_s
        self.silence_s = timeout_s if silence_s is None else silence_s
        self.clock = clock
        self.rows: dict[int, Progress] = {}
        self._heard_s: dict[int, float] = {}
        self._state: tuple[Any, ...] = ()
        self._since_s = clock()
        self._beat = 0
        self._first: Any = None
        self.is_armed = False

    def look(self, place: Place, counters: tuple[Any, ...]) -> float:
        """Return for how long this process has been in one place, in seconds.

        Args:
            place: Where its main thread is.
            counters: What any progress changes; the first of them when a step has run.
        """
        if self._first is None:
            self._first = counters[0]
        self.is_armed = self.is_armed or counters[0] != self._first
        if (state := (place, counters)) != self._state:
            self._state, self._since_s = state, self.clock()
        return self.clock() - self._since_s

    def next_beat(self) -> int:
        """Return the number of the next row."""
        self._beat += 1
        return self._beat

    def take(self, rows: Mapping[int, Progress]) -> None:
        """Take the table; rows are of the age at which they were first seen here."""
        now = self.clock()
        for process, row in rows.items():
            if process not in self.rows or row.beat != self.rows[process].beat:
                self._heard_s[process] = now
            self.rows[process] = row

    def own_verdict(self, place: Place, since_s: float, step: int) -> str | None:
        """Return what is wrong with this process, if it is stuck by itself."""
        if not self.is_armed or self.timeout_s is None or place.phase not in _LIMITED:
            return None
        if since_s < self.timeout_s:
            return None
        return f"{self.name(self.index)} has been in {_where(place, step)} for {since_s:.0f} s"

    def verdict(self) -> str | None:
        """Return what is wrong with another process, or with all of them."""
        armed = {p: r for p, r in self.rows.items() if r.is_armed and r.is_running}
        for process, row in armed.items():
            silent_s = self.silent_for(process)
            if process != self.index and self.silence_s and silent_s >= self.silence_s:
                return self.silence(process, row, silent_s)
        if self.timeout_s is None or len(self.rows) < self.count:
            return None
        waiting = [r for r in armed.values() if r.phase == "device"]
        if not waiting or min(r.since_s for r in waiting) < self.timeout_s:
            return None
        ended = [p for p, r in self.rows.items() if not r.is_running]
        if len(waiting) + len(ended) < self.count:
            return None
        waited = f"waited for their devices in step {waiting[0].step} for {self.timeout_s:.0f} s"
        if ended:
            return f"{self.name(ended[0])} has ended its call, and the others have {waited}"
        return f"all {self.count} processes have {waited}: what they compute together hangs"

    def silent_for(self, process: int) -> float:
        """Return for how long nothing new was heard of a process, in seconds."""
        return self.clock() - self._heard_s.get(process, self.clock())

    def silent(self, for_s: float) -> str | None:
        """Return what is known of the processes that have said nothing for so long, if any."""
        found = [
            self.silence(process, row, self.silent_for(process))
            for process, row in self.rows.items()
            if process != self.index and row.is_running and self.silent_for(process) >= for_s
        ]
        return "; ".join(found) or None

    def silence(self, process: int, row: Progress, silent_s: float) -> str:
        """Return the sentence about a process that says nothing."""
        where = _where(Place(row.phase, row.detail), row.step)
        return f"{self.name(process)} gives no sign of life for {silent_s:.0f} s, last in {where}"

    def name(self, process: int) -> str:
        """Return how a process is called in messages."""
        return f"process {process} of {self.count}"


def _where(place: Place, step: int) -> str:
    detail = f" ({place.detail})" if place.detail else ""
    return f"phase {place.phase}{detail} of step {step}"
