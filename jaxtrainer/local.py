"""Loaders that give each process its own part of every batch; see `data.process_local`.

May import levels 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from jaxtrainer.types import PyTree


class ProcessLocal:
    """A loader of which each process reads its own part; made by `data.process_local`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[PyTree]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class LocalSource:
    """How to read one: the parts of all processes make up the batch.

    Args:
        source: Of this process's loader.
    """

    is_partial = is_own = True

    def __init__(self, source: Any) -> None:
        self.loader = getattr(source, "loader", None)
        self._source = source

    @property
    def num_batches(self) -> int | None:
        """See `data.Source`."""
        return self._source.num_batches

    @property
    def is_one_shot(self) -> bool:
        """Whether there is no second pass over it."""
        return getattr(self._source, "is_one_shot", False)

    def rows_of(self, batch_idx: int, num_read: int) -> int:
        """Return how many rows the batch has."""
        return num_read * jax.process_count()

    def open(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[PyTree, Any]]:
        """See `data.Source`."""
        return self._source.open(epoch, start, state)
