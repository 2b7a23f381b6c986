"""Step values to the host, one report interval late. May import levels 0 to 2."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxtrainer.hooks import CallbackList
from jaxtrainer.memory import host_bytes, rss_bytes
from jaxtrainer.metrics import Totals
from jaxtrainer.run import Run

_FULL = 0.9
"""Share of the host's memory above which there is a warning."""

Point = tuple[int, int, int, int]
"""Row of a metrics buffer, and the step, batch and samples of the run that it belongs to."""


class Reporter:
    """Keeps the rows of the newest report on the device until the next one is due.

    By then they have long been computed, so that fetching them waits for nothing, and the
    device already has the following steps in its queue.

    Args:
        totals: Meaning of a row.
        every: Report every this many batches.
        hooks: `on_report` gets the values.
    """

    def __init__(self, totals: Totals, every: int, hooks: CallbackList) -> None:
        self.totals = totals
        self.every = every
        self.hooks = hooks
        self._pending: tuple[jax.Array, Sequence[Point]] | None = None
        self._last: tuple[jax.Array, Point] | None = None
        self._host_bytes = host_bytes()

    def after(self, run: Run, rows: jax.Array, first_row: int, steps: Sequence[int]) -> None:
        """Take the rows of a dispatch; `steps` is the optimiser step after each of its batches."""
        count, before = len(steps), run.total_batches - len(steps)
        # All batches of a dispatch have as many rows.
        size, seen = run.batch_size, run.samples - count * run.batch_size
        self._last = (rows, (first_row + count - 1, steps[-1], run.total_batches, run.samples))
        due = self.every - before % self.every
        if due <= count:
            at = range(due - 1, count, self.every)
            points = [(first_row + i, steps[i], before + i + 1, seen + (i + 1) * size) for i in at]
            self.flush(run)
            self._pending = (rows, points)
            if points[-1] == self._last[1]:
                self._last = None

    def flush(self, run: Run) -> None:
        """Fetch the pending report, in one transfer, and hand it on."""
        if self._pending is None:
            return
        (rows, points), self._pending = self._pending, None
        with run.timings.phase("device"):
            values = np.asarray(rows)
        for row, step, batch, samples in points:
            metrics = self.totals.step_values(values[row], batch)
            run.record("step", metrics, step, samples)
            self.hooks.on_report(run, metrics, step)
        if rss_bytes() > _FULL * self._host_bytes:
            run.notice(
                f"the process has over {_FULL:.0%} of the host's memory, "
                f"{self._host_bytes / 2**30:.1f} GiB: the system may end it; a checkpoint goes on"
            )

    def finish(self, run: Run) -> None:
        """Report what is pending, and the last step if it fell between two reports."""
        self.flush(run)
        if self._last is not None:
            rows, point = self._last
            self._pending, self._last = (rows, [point]), None
            self.flush(run)
