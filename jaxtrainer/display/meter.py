"""How fast a count grows: elapsed time, rate, time remaining.

Imports `types` only; the clock is injected.
"""

from __future__ import annotations

from collections import deque
from typing import final

from jaxtrainer.types import Clock


@final
class Meter:
    """Watches a count that starts now; time spent in a pause does not count for the rate.

    Args:
        clock: Seconds, monotonic.
        first: The count now; not 0 in an epoch that was resumed midway.
        window_s: The rate is that of about the last so many seconds, so that the time
            remaining follows a run that slows down.
    """

    def __init__(self, clock: Clock, *, first: int = 0, window_s: float = 30.0) -> None:
        self._clock = clock
        self._first = first
        self._window_s = window_s
        self._started = clock()
        self._paused_s = 0.0
        self._paused_at: float | None = None
        self._samples: deque[tuple[float, int]] = deque([(0.0, first)])

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, pauses included."""
        return self._clock() - self._started

    @property
    def active_s(self) -> float:
        """Seconds since the start, less the pauses."""
        paused_at = self._paused_at
        now = self._clock() if paused_at is None else paused_at
        return now - self._started - self._paused_s

    def pause(self) -> None:
        """Stop the clock of the rate; a second call changes nothing."""
        if self._paused_at is None:
            self._paused_at = self._clock()

    def resume(self) -> None:
        """End a pause, if there is one."""
        if self._paused_at is not None:
            self._paused_s += self._clock() - self._paused_at
            self._paused_at = None

    def mean_rate(self, count: int) -> float | None:
        """Return counts per second since the start; None before the first."""
        active_s = self.active_s
        return (count - self._first) / active_s if active_s > 0 and count > self._first else None

    def rate(self, count: int) -> float | None:
        """Take a sample and return the recent counts per second; None before the first."""
        samples = self._samples
        if count != samples[-1][1]:
            samples.append((self.active_s, count))
        # Two samples always stay: a step may take longer than the window.
        while len(samples) > 2 and samples[-1][0] - samples[1][0] > self._window_s:
            samples.popleft()
        (start, before), (end, now) = samples[0], samples[-1]
        return (now - before) / (end - start) if end > start else None
