"""In-memory arrays as a Grain `MapDataset` whose elements are whole batches.

Separate from `data`, because importing Grain takes longer than a small model's compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np

from jaxtrainer.errors import DataError
from jaxtrainer.types import PyTree


class ArrayDataset(grain.MapDataset[Any]):
    """Batches gathered from arrays in memory; made by `data.from_arrays`.

    Element `i` is batch `i % len(self)` of epoch `i // len(self)`, each epoch with its own
    permutation. Batches are cut from a permutation of rows and gathered with one vectorised
    index, several times faster than reading records one by one.
    """

    def __init__(
        self,
        arrays: PyTree,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_remainder: bool,
        device_transform: Callable[[PyTree], PyTree] | None,
        device_resident: bool | None,
    ) -> None:
        super().__init__()
        self.arrays = jax.tree.map(np.asarray, arrays)
        self.num_samples = _common_length(self.arrays)
        self.batch_size = _checked_batch_size(batch_size, self.num_samples, drop_remainder)
        # Grain's datasets have methods `shuffle` and `seed`, which these must not hide.
        self.is_shuffled = shuffle
        self.order_seed = seed
        self.drop_remainder = drop_remainder
        self.device_transform = device_transform
        self.device_resident = device_resident
        self._cached: tuple[int, np.ndarray] | None = None

    def with_batch_size(self, batch_size: int) -> ArrayDataset:
        """Return the same arrays in batches of another size."""
        return ArrayDataset(
            self.arrays,
            batch_size=batch_size,
            shuffle=self.is_shuffled,
            seed=self.order_seed,
            drop_remainder=self.drop_remainder,
            device_transform=self.device_transform,
            device_resident=self.device_resident,
        )

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole if self.drop_remainder or not rest else whole + 1

    def batch_indices(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in order: `[num_samples]`, int32."""
        if not self.is_shuffled:
            epoch = 0
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._order(epoch))
        return self._cached[1]

    def _order(self, epoch: int) -> np.ndarray:
        order = np.arange(self.num_samples, dtype=np.int32)
        if self.is_shuffled:
            np.random.Generator(np.random.PCG64([self.order_seed, epoch])).shuffle(order)
        return order

    def __getitem__(self, index: Any) -> PyTree:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, batch = divmod(int(index), len(self))
        start = batch * self.batch_size
        rows = self.batch_indices(epoch)[start : start + self.batch_size]
        return jax.tree.map(lambda a: a.take(rows, axis=0), self.arrays)


def _common_length(arrays: PyTree) -> int:
    lengths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (a.shape[0] if a.ndim else None)
        for path, a in jax.tree_util.tree_flatten_with_path(arrays)[0]
    }
    if not lengths:
        raise DataError(
            'from_arrays got no arrays; pass e.g. `{"image": images, "label": labels}`.'
        )
    length, *others = set(lengths.values())
    if others or length is None:
        found = ", ".join(f"{name}: {n}" for name, n in lengths.items())
        raise DataError(f"from_arrays needs arrays with the same number of rows; got {found}.")
    return length


def _checked_batch_size(batch_size: int, num_samples: int, drop_remainder: bool) -> int:
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise DataError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if num_samples == 0:
        raise DataError(
            "from_arrays got arrays without a row; pass at least one. Did a selection, e.g. "
            "`images[labels == 7]`, find any?"
        )
    if drop_remainder and num_samples < batch_size:
        raise DataError(
            f"{num_samples} samples make no batch of {batch_size} with drop_remainder=True; "
            f"use `batch_size={num_samples}` or less."
        )
    return int(batch_size)
