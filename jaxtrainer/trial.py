"""What a training step would be fed at another batch size, from specs alone.

Reads one batch of a loader, for its shapes, and places nothing. May import levels 0 to 3.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrainer.chunks import ReadOptions, StackedChunks
from jaxtrainer.data import IndexedSource, open_source
from jaxtrainer.dispatch import chunk_capacity
from jaxtrainer.feed import FeedSpec, is_resident, resident_specs
from jaxtrainer.indexed import IndexedChunks
from jaxtrainer.sharding import num_data_shards
from jaxtrainer.types import PyTree

_CHUNKS_ALIVE = 5
"""Chunks on the device beside the one that is trained on: queued, being placed, dispatched."""


class TrialSpecs:
    """The specs of a loader's batches at any batch size.

    Args:
        loader: The loader; its first batch is read.
        mesh: Where the batches would go.

    Attributes:
        rows: Samples of a batch as the loader gives it.
        num_samples: Samples of an epoch, if known.
        resident: Specs of arrays that would live on the device, or None.
    """

    def __init__(self, loader: Any, mesh: Mesh) -> None:
        self.loader, self.mesh = loader, mesh
        source, options = open_source(loader, "train"), ReadOptions(stage="train")
        self.resident: PyTree | None = None
        if isinstance(source, IndexedSource):
            chunks: Any = IndexedChunks(source, options, gathers=True)
            self.num_samples: int | None = len(jax.tree.leaves(source.loader.arrays)[0])
            if is_resident(source.loader):
                self.resident = resident_specs(source.loader.arrays, chunks.spec, mesh)
        else:
            chunks = StackedChunks(source, options, epoch=0, start=0, state=None)
            length = source.num_batches
            self.num_samples = None if length is None else length * chunks.rows
        self.rows: int = chunks.rows
        self._batch = chunks.spec

    def feed_spec(self, batch_size: int) -> FeedSpec:
        """Return what the step would get in batches of that size."""
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), self._batch
        )
        indices = jax.ShapeDtypeStruct((batch_size,), np.int32)
        fed = batch if self.resident is None else indices
        return FeedSpec(batch=batch, fed=fed, rows=batch_size, resident=self.resident)

    def waiting_bytes(self, batch_size: int, steps_per_dispatch: int | str) -> int:
        """Return the bytes of a device that chunks hold which are not trained on yet."""
        fed = self.feed_spec(batch_size).fed
        length = None if self.num_samples is None else max(1, self.num_samples // batch_size)
        size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(fed))
        batches = chunk_capacity(steps_per_dispatch, fed, length) * _CHUNKS_ALIVE
        return batches * size // num_data_shards(self.mesh)
