"""The control vector of a dispatch: which batches of a chunk to run, and where windows end.

May import levels 0 to 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtrainer.feed import Chunk
from jaxtrainer.run import Run

FLAGS = 3
"""Length of the control vector before its flags: start, stop, reset."""


class Controls:
    """Makes control vectors: int32 `[3 + capacity]`.

    Those of single steps differ by their place in the chunk and little else: each is kept on the
    device after its first use, which spares every later step a transfer.

    Args:
        capacity: Batches of a chunk.
        place: Puts a vector on the device.
    """

    def __init__(self, capacity: int, place: Callable[[np.ndarray], jax.Array]) -> None:
        self._capacity = capacity
        self._place = place
        self._kept: dict[tuple[int, bool, bool], jax.Array] = {}

    def single(self, run: Run, chunk: Chunk, start: int) -> tuple[Any, list[int]]:
        """Return the vector for one batch, and the optimiser step after it."""
        is_last = chunk.is_last and start + 1 == chunk.size
        # A window that the epoch's end cuts short is applied there, weighted by what it has.
        applies = is_last or (run.batch_idx + 1) % run.accumulate == 0
        key = (start, run.batch_idx == 0, applies)
        control = self._kept.get(key)
        if control is None:
            vector, _ = self.several(run, chunk, start, 1)
            control = self._kept[key] = self._place(vector)
        return control, [run.global_step + applies]

    def several(
        self, run: Run, chunk: Chunk, start: int, count: int
    ) -> tuple[np.ndarray, list[int]]:
        """Return the vector for `count` batches, and the optimiser step after each of them."""
        control = np.zeros(FLAGS + self._capacity, np.int32)
        control[:FLAGS] = start, start + count, run.batch_idx == 0
        ends = (run.batch_idx + 1 + np.arange(count)) % run.accumulate == 0
        if chunk.is_last and start + count == chunk.size:
            ends[-1] = True
        control[FLAGS + start : FLAGS + start + count] = ends
        return control, (run.global_step + ends.cumsum()).tolist()
