"""Loaders: what the trainer accepts, and how it reads, positions and measures them.

Any iterable of pytrees of arrays is a loader; Grain's are recognised without importing Grain.
Imports `errors` and `types` only.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from jaxtrainer.errors import BatchSpecError, DataError
from jaxtrainer.types import IndexedLoader, PyTree, StatefulIterator

_NARROW = {"int64": np.int32, "uint64": np.uint32, "float64": np.float32, "complex128": np.complex64}


def from_arrays(
    arrays: PyTree,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    drop_remainder: bool = False,
    device_transform: Callable[[PyTree], PyTree] | None = None,
    device_resident: bool | None = None,
) -> Any:
    """Return a Grain `MapDataset` of batches gathered from arrays in memory.

    Args:
        arrays: Pytree of `[num_samples, ...]` arrays. Keep them small (uint8 images): what
            travels to the device is what is stored here.
        batch_size: Rows of a batch.
        shuffle: Draw a new permutation each epoch, from `seed` and the epoch.
        seed: Seed of the permutations.
        drop_remainder: Leave out a last batch that is not full.
        device_transform: Traced into the compiled step: cast, normalise, augment there.
        device_resident: Put the arrays on the device whole, so that only row indices travel.
            None does so up to 1 GiB. Order and position in the data are the same either way.

    Raises:
        DataError: If the arrays differ in length, or make no batch.

    Example:
        >>> loader = from_arrays({"x": np.arange(5.0)}, batch_size=2)
        >>> [batch["x"].tolist() for batch in loader]
        [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """
    from jaxtrainer.arrays import ArrayDataset

    return ArrayDataset(
        arrays,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_remainder=drop_remainder,
        device_transform=device_transform,
        device_resident=device_resident,
    )


class OnDevice:
    """A loader together with a transform that is traced into the step; see `on_device`."""

    def __init__(self, loader: Any, transform: Callable[[PyTree], PyTree]) -> None:
        self.loader = loader
        self.device_transform = transform

    def __iter__(self) -> Iterator[PyTree]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def on_device(loader: Any, transform: Callable[[PyTree], PyTree]) -> OnDevice:
    """Return the loader with a pure JAX function applied to each batch inside the step.

    Example:
        >>> loader = on_device([{"x": np.zeros((2, 3), np.uint8)}], lambda b: {"x": b["x"] / 255})
    """
    return OnDevice(loader, transform)


class Source(Protocol):
    """How the feed reads a loader."""

    @property
    def num_batches(self) -> int | None:
        """Batches an epoch, if known."""
        ...

    def open(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[PyTree, Any]]:
        """Yield the epoch's batches from index `start`, each with the loader's state after it.

        The state is None where epoch and index say everything; `state` is one to go back to.
        """
        ...


class IndexedSource:
    """Arrays in memory, read by row index."""

    def __init__(self, loader: IndexedLoader) -> None:
        self.loader = loader
        self.num_batches = len(loader)

    def open(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[PyTree, Any]]:
        """See `Source.open`."""
        rows, size = self.loader.batch_indices(epoch), self.loader.batch_size
        for i in range(start, self.num_batches):
            yield self.gather(rows[i * size : (i + 1) * size]), None

    def gather(self, rows: np.ndarray) -> PyTree:
        """Return the rows of every array, in NumPy."""
        return jax.tree.map(lambda a: a.take(rows, axis=0), self.loader.arrays)


class MapSource:
    """A Grain `MapDataset`: random access, so that any position is reached at once."""

    def __init__(self, dataset: Any) -> None:
        # A dataset that the user repeated without end has one endless epoch.
        is_endless = len(dataset) > sys.maxsize // 2
        self.num_batches = None if is_endless else len(dataset)
        self._endless = dataset if is_endless or not len(dataset) else dataset.repeat()

    def open(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[PyTree, Any]]:
        """See `Source.open`."""
        # Grain counts on through the epochs, and reshuffles at each multiple of the length.
        iterator = iter(self._endless.to_iter_dataset())
        iterator.set_state({"next_index": epoch * (self.num_batches or 0) + start})
        rest = None if self.num_batches is None else self.num_batches - start
        for batch in itertools.islice(iterator, rest):
            yield batch, None


class IterableSource:
    """Any other iterable: Grain's `IterDataset` and `DataLoader`, lists, PyTorch loaders."""

    def __init__(self, loader: Iterable[PyTree]) -> None:
        self.loader = loader
        self.num_batches = _length(loader)
        self._is_spent = False

    def open(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[PyTree, Any]]:
        """See `Source.open`."""
        iterator = iter(self.loader)
        if iterator is self.loader:
            if self._is_spent:
                raise DataError(
                    f"the loader is a {type(self.loader).__name__}, which can be read once only, "
                    "and a second epoch was asked for. Pass something that makes a new iterator "
                    "each time: a list, a Grain dataset, or an object with `__iter__`."
                )
            self._is_spent = True
        if not isinstance(iterator, StatefulIterator):
            yield from ((batch, None) for batch in itertools.islice(iterator, start, None))
            return
        if state is not None:
            iterator.set_state(state)
            start = 0
        for batch in itertools.islice(iterator, start, None):
            yield batch, iterator.get_state()


def open_source(loader: Any, stage: str) -> Source:
    """Return how to read a loader.

    Raises:
        DataError: If it cannot be iterated, or has no batches.
    """
    loader = loader.loader if isinstance(loader, OnDevice) else loader
    if isinstance(loader, IndexedLoader):
        source: Source = IndexedSource(loader)
    elif _is_grain(loader, "MapDataset"):
        source = MapSource(loader)
    elif hasattr(loader, "__iter__") and not isinstance(loader, dict | str | np.ndarray | jax.Array):
        source = IterableSource(loader)
    else:
        raise DataError(
            f"the {stage} loader is a {type(loader).__name__}, not an iterable of batches. "
            "For arrays in memory: `data.from_arrays(arrays, batch_size=...)`."
        )
    if source.num_batches == 0:
        raise DataError(
            f"the {stage} loader has no batches. A loader that drops its remainder is empty when "
            "there are fewer samples than one batch: use a smaller batch size."
        )
    return source


def device_transform_of(loader: Any) -> Callable[[PyTree], PyTree] | None:
    """Return the transform that the loader wants inside the step, if any."""
    transform = getattr(loader, "device_transform", None)
    # `from_arrays(...).map(...)` is another dataset, of the same batches.
    parents = getattr(loader, "_parents", ()) if transform is None else ()
    return next(filter(None, map(device_transform_of, parents)), transform)


def as_host_batch(batch: PyTree) -> PyTree:
    """Return the batch with NumPy leaves, 64-bit numbers narrowed to what JAX computes in.

    Raises:
        DataError: For a leaf that is no number, naming it.
    """

    def convert(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        array = np.asarray(leaf)
        if array.dtype.kind in "OUSMm":
            raise DataError(
                f"batch leaf {leaf_name(path)} has dtype {array.dtype}, which no device can hold; "
                "drop or encode it in the loader."
            )
        return array.astype(_NARROW.get(array.dtype.name, array.dtype), copy=False)

    return jax.tree_util.tree_map_with_path(convert, batch)


def spec_of(batch: PyTree) -> PyTree:
    """Return the batch's shapes and dtypes, as `jax.ShapeDtypeStruct` leaves."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def num_rows(batch: PyTree, stage: str) -> int:
    """Return the number of samples in a batch: the leading axis that its leaves share.

    Raises:
        DataError: If there are no arrays, or their leading axes differ.
    """
    flat = jax.tree_util.tree_flatten_with_path(batch)[0]
    if not flat:
        raise DataError(f"the first {stage} batch has no arrays: {batch!r}")
    rows = {leaf_name(path): (leaf.shape[0] if leaf.shape else None) for path, leaf in flat}
    shared, *others = set(rows.values())
    if others or shared is None:
        found = ", ".join(f"{name}: {n}" for name, n in rows.items())
        raise DataError(
            f"the leaves of a {stage} batch must share their leading axis, the samples; "
            f"got {found}."
        )
    return shared


def check_spec(batch: PyTree, spec: PyTree, where: str) -> bool:
    """Compare a batch with the first one; return whether it is whole.

    A batch with fewer rows, and otherwise equal, is not whole.

    Raises:
        BatchSpecError: If structure, dtype or shape differ, naming the leaf.
    """
    got, treedef = jax.tree.flatten(batch)
    want, wanted_def = jax.tree.flatten(spec)
    if treedef != wanted_def:
        raise BatchSpecError(
            f"{where} has another structure than the first: expected {wanted_def}, got {treedef}."
        )
    if all(g.shape == w.shape and g.dtype == w.dtype for g, w in zip(got, want, strict=True)):
        return True
    paths = [leaf_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(spec)[0]]
    for name, g, w in zip(paths, got, want, strict=True):
        same_rest = g.shape[1:] == w.shape[1:] and len(g.shape) == len(w.shape)
        if g.dtype != w.dtype or not same_rest or g.shape[0] > w.shape[0]:
            raise BatchSpecError(
                f"{where}: leaf {name} differs from the first batch: "
                f"expected {w.dtype}{list(w.shape)}, got {g.dtype}{list(g.shape)}. "
                "The compiled step takes one shape; pad or crop in the loader."
            )
    return False


def leaf_name(path: Any) -> str:
    """Return a readable name of a pytree path, e.g. `image` or `0/label`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the batch itself)"


def _is_grain(loader: Any, name: str) -> bool:
    return any(
        t.__name__ == name and t.__module__.startswith("grain") for t in type(loader).__mro__
    )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
