"""Chunks of arrays in memory, cut from the order of their rows. May import levels 0 to 2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxtrainer.chunks import HostChunk, ReadOptions, with_limit
from jaxtrainer.data import IndexedSource, as_host_batch, num_rows, spec_of
from jaxtrainer.shapes import Shapes


class IndexedChunks:
    """Chunks of arrays in memory: gathered by row index, or the indices themselves.

    Args:
        source: The arrays.
        options: How to read them.
        gathers: Whether to gather the rows here; if not, chunks are int32 indices.
    """

    def __init__(self, source: IndexedSource, options: ReadOptions, *, gathers: bool) -> None:
        self.options = options
        self.reading = f"a {options.stage} batch"
        self.shapes: Shapes | None = None
        self.gathers = gathers
        self._loader = source.loader
        self._num_samples = len(jax.tree.leaves(self._loader.arrays)[0])
        # An epoch of fewer samples than one batch is one smaller batch.
        self._batch = min(self._loader.batch_size, self._num_samples)
        self.first = as_host_batch(source.gather(self._loader.batch_indices(0)[: self._batch]))
        self.spec = spec_of(self.first)
        self.rows = num_rows(self.first, f"{options.stage} batch 0")
        has_ragged = len(self._loader) * self._batch > self._num_samples
        self.ragged_rows = self._num_samples % self._batch if has_ragged else 0

    @property
    def num_batches(self) -> int | None:
        """See `Chunks`."""
        length = self._num_samples // self._batch + bool(
            self.ragged_rows and self.options.keep_ragged
        )
        return length if self.options.limit is None else min(self.options.limit, length)

    def limited(self, limit: int | None) -> IndexedChunks:
        """See `Chunks.limited`."""
        return with_limit(self, limit)

    def close(self) -> None:
        """See `Chunks.close`."""

    def read(self, epoch: int, start: int, state: Any, capacity: int) -> Iterator[HostChunk]:
        """See `Chunks.read`."""
        order, batch = self._loader.batch_indices(epoch), self._batch
        length = self.num_batches or 0
        whole = min(length, self._num_samples // batch)
        for i in range(start, whole, capacity):
            size = min(capacity, whole - i)
            block = order[i * batch : (i + size) * batch].reshape(size, batch)
            yield self._chunk(block, capacity, is_last=i + size == length)
        if length > max(whole, start):
            yield self._chunk(order[None, whole * batch :], 1, is_last=True)

    def _chunk(self, block: np.ndarray, capacity: int, *, is_last: bool) -> HostChunk:
        size, rows = block.shape
        held = self.options.held(rows)
        block = block if held is None else held.of_indices(block)
        if self.gathers:
            arrays = jax.tree.map(lambda a: _gather(a, block, capacity), self._loader.arrays)
            tree = as_host_batch(arrays)
        else:
            # Rows past the last batch are never read, but must be valid indices.
            tree = np.zeros((capacity, block.shape[1]), np.int32)
            tree[:size] = block
        return HostChunk(tree, size, rows, is_last, [None] * size)


def _gather(array: np.ndarray, block: np.ndarray, capacity: int) -> np.ndarray:
    size, rows = block.shape
    chunk = np.empty((capacity, rows, *array.shape[1:]), array.dtype)
    # Never read on the device, but looked at like the rest for numbers that do not fit.
    chunk[size:] = 0
    flat = chunk[:size].reshape(size * rows, *array.shape[1:])
    array.take(block.reshape(-1), axis=0, out=flat, mode="clip")
    return chunk
