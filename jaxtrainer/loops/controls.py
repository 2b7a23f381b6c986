"""The control vectors of training: which batches of a chunk to run, and where windows end.

May import levels 0 to 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import jax
import numpy as np

from jaxtrainer.control import APPLY, ENDS_EPOCH, ENDS_WINDOW, LEFT_OUT
from jaxtrainer.feed import Chunk
from jaxtrainer.run import Run


@final
class Controls:
    """Makes control vectors, laid out as `control` says.

    Those of an epoch's single steps differ by their place in the chunk and little else: each is
    kept on the device after its first use, which spares later steps a transfer.

    Args:
        capacity: Batches of a chunk.
        place: Puts a vector on the device.
        counts_epochs: Whether the step reads the epoch's index; 0 stands there if not, and the
            vectors that are kept serve every epoch.
    """

    def __init__(
        self, capacity: int, place: Callable[[np.ndarray], jax.Array], *, counts_epochs: bool
    ) -> None:
        self._capacity = capacity
        self._place = place
        self._counts_epochs = counts_epochs
        self._epoch = 0
        self._kept: dict[tuple[int, bool, int], jax.Array] = {}

    def single(self, run: Run, chunk: Chunk, start: int) -> tuple[Any, list[int]]:
        """Return the vector for one batch, and the optimiser step after it."""
        if self._counts_epochs and run.epoch != self._epoch:
            self._epoch, self._kept = run.epoch, {}
        ends_window = (run.batch_idx + 1) % run.accumulate == 0
        is_last = chunk.is_last and start + 1 == chunk.size
        # A window that the epoch's end cuts short is applied there, weighted by what it has.
        flag = ENDS_WINDOW | ENDS_EPOCH if is_last else ENDS_WINDOW * ends_window
        if run.total_batches in run.left_out:
            flag |= LEFT_OUT
        key = (start, run.batch_idx == 0, flag)
        control = self._kept.get(key)
        if control is None:
            vector = self._vector(run, start, 1)
            vector[APPLY + start] = flag
            control = self._kept[key] = self._place(vector)
        return control, [run.global_step + (flag & ENDS_WINDOW)]

    def several(
        self, run: Run, chunk: Chunk, start: int, count: int
    ) -> tuple[np.ndarray, list[int]]:
        """Return the vector for `count` batches, and the optimiser step after each of them."""
        control = self._vector(run, start, count)
        flags = control[APPLY + start : APPLY + start + count]
        flags[:] = ENDS_WINDOW
        if run.accumulate > 1:
            flags *= (run.batch_idx + 1 + np.arange(count)) % run.accumulate == 0
        if chunk.is_last and start + count == chunk.size:
            flags[-1] = ENDS_WINDOW | ENDS_EPOCH
        for i in run.left_out:
            if 0 <= i - run.total_batches < count:
                flags[i - run.total_batches] |= LEFT_OUT
        return control, (run.global_step + (flags & ENDS_WINDOW).cumsum()).tolist()

    def _vector(self, run: Run, start: int, count: int) -> np.ndarray:
        control = np.zeros(APPLY + self._capacity, np.int32)
        epoch = run.epoch if self._counts_epochs else 0
        control[:APPLY] = start, start + count, run.batch_idx == 0, epoch
        return control
