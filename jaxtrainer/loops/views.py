"""One batch of a chunk, looked at only if a hook does. May import levels 0 to 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxtrainer.feed import Chunk
from jaxtrainer.rows import local_batch, on_this_process
from jaxtrainer.types import PyTree


class BatchView:
    """Batch `index` of a stacked chunk; slicing the device arrays waits until `get` is used.

    Of several processes each sees the rows that it holds.
    """

    def __init__(self, chunk: Chunk, resident: PyTree, index: int) -> None:
        self._tree = chunk.tree
        self._num_held = chunk.num_held
        self._resident = resident
        self._index = index

    def get(self) -> PyTree:
        """Return the batch: a lazy mapping if it is a dict, else a pytree of device arrays."""
        shown = self._tree if self._resident is None else self._resident
        return _LazyDict(shown, self._leaf) if isinstance(shown, dict) else self._leaf(shown)

    def _leaf(self, tree: PyTree) -> PyTree:
        if self._resident is None:
            return jax.tree.map(lambda a: local_batch(a, self._index, self._num_held), tree)
        rows = local_batch(self._tree, self._index, self._num_held)
        return jax.tree.map(lambda a: on_this_process(a)[rows], tree)


class _LazyDict(Mapping[str, Any]):
    def __init__(self, tree: dict[str, Any], slice_leaf: Any) -> None:
        self._tree = tree
        self._slice = slice_leaf

    def __getitem__(self, key: str) -> Any:
        return self._slice(self._tree[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)
