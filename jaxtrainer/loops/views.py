"""One batch of a chunk, looked at only if a hook does. Imports `types` only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxtrainer.types import PyTree


class BatchView:
    """Batch `index` of a stacked chunk; slicing the device arrays waits until `get` is used."""

    def __init__(self, tree: PyTree, resident: PyTree, index: int) -> None:
        self._tree = tree
        self._resident = resident
        self._index = index

    def get(self) -> PyTree:
        """Return the batch: a lazy mapping if it is a dict, else a pytree of device arrays."""
        shown = self._tree if self._resident is None else self._resident
        return _LazyDict(shown, self._leaf) if isinstance(shown, dict) else self._leaf(shown)

    def _leaf(self, tree: PyTree) -> PyTree:
        if self._resident is None:
            return jax.tree.map(lambda a: a[self._index], tree)
        return jax.tree.map(lambda a: a[self._tree[self._index]], tree)


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
