"""Loaders: what the trainer accepts, and how it reads, positions and measures them.

Any iterable of pytrees of arrays is a loader; Grain's are recognised without importing Grain.
Imports `errors`, `remedies` and `types` only.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxtrainer.errors import BatchSpecError, CheckpointMismatchError, DataError
from jaxtrainer.grain_source import MapSource
from jaxtrainer.local import LocalSource, ProcessLocal
from jaxtrainer.remedies import allowance, is_shorter, remedy
from jaxtrainer.types import IndexedLoader, PyTree, StatefulIterator
from jaxtrainer.workers import close_iterator, why_empty, why_forked


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
        batch_size: Rows of a batch. Of several processes each has the same order; the trainer
            gathers the rows of a batch that are of its own devices.
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

    def __getattr__(self, name: str) -> Any:
        if name != "with_batch_size":
            raise AttributeError(f"OnDevice has no attribute {name!r}")
        make = self.loader.with_batch_size
        return lambda batch_size: OnDevice(make(batch_size), self.device_transform)


def on_device(loader: Any, transform: Callable[[PyTree], PyTree]) -> OnDevice:
    """Return the loader with a pure JAX function applied to each batch inside the step.

    A loader that has a transform already keeps it: `transform` comes after it.

    Example:
        >>> loader = on_device([{"x": np.zeros((2, 3), np.uint8)}], lambda b: {"x": b["x"] / 255})
    """
    first = device_transform_of(loader)
    inner = loader.loader if isinstance(loader, OnDevice) else loader
    return OnDevice(inner, transform if first is None else lambda batch: transform(first(batch)))


def process_local(loader: Any) -> Any:
    """Mark a loader that gives each process its own part of every batch.

    Without the mark every process reads the same batches, and the trainer takes the rows that
    are of its own devices; `from_arrays` and a Grain `MapDataset` that ends in `.batch(n)` then
    read no other rows. Mark what cannot do so and is slow, such as a stream that is divided
    already. The parts of a batch, process after process, are the batch; they must be of one size.

    Example:
        >>> part = process_local([{"x": np.zeros(4)}])  # of a batch of 8, in two processes
    """
    if isinstance(loader, OnDevice):
        return OnDevice(process_local(loader.loader), loader.device_transform)
    if isinstance(loader, IndexedLoader):
        raise DataError(
            "process_local got arrays of `from_arrays`, which give each process its rows of one "
            "order already; pass them as they are, the same on every process."
        )
    return ProcessLocal(loader)


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
    """Arrays in memory, read by row index (`chunks.IndexedChunks`) instead of opened."""

    def __init__(self, loader: IndexedLoader) -> None:
        self.loader = loader
        self.num_batches = len(loader)

    def gather(self, rows: np.ndarray) -> PyTree:
        """Return the rows of every array, in NumPy."""
        return jax.tree.map(lambda a: a.take(rows, axis=0), self.loader.arrays)


class IterableSource:
    """Any other iterable: Grain's `IterDataset` and `DataLoader`, lists, PyTorch loaders.

    Attributes:
        is_one_shot: Whether it was found, when opened, to be an iterator: there is no second one.
    """

    def __init__(self, loader: Iterable[PyTree]) -> None:
        self.loader = loader
        self.num_batches = _length(loader)
        self.is_one_shot = False

    def open(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[PyTree, Any]]:
        """See `Source.open`."""
        iterator = iter(self.loader)
        if self.is_one_shot:
            raise DataError(
                f"the loader is a {type(self.loader).__name__}, which can be read once only, and "
                "a second pass over it was asked for. Pass something that makes a new iterator "
                "each time: a list, a Grain dataset, or an object with `__iter__`."
            )
        self.is_one_shot = iterator is self.loader
        try:
            yield from self._batches(iterator, start, state)
        finally:
            if not self.is_one_shot:
                close_iterator(iterator)

    def _batches(self, iterator: Any, start: int, state: Any) -> Iterator[tuple[PyTree, Any]]:
        if not isinstance(iterator, StatefulIterator):
            # Batches are read ahead: a loader that fills one buffer again and again would
            # overwrite them. Those of a list stay as they are.
            keeps = isinstance(self.loader, list | tuple)
            for batch in itertools.islice(iterator, start, None):
                yield batch if keeps else jax.tree.map(_copied, batch), None
            return
        if state is not None:
            _go_back(iterator, state)
            start = 0
        for batch in itertools.islice(iterator, start, None):
            yield batch, iterator.get_state()


def _go_back(iterator: StatefulIterator, state: Any) -> None:
    try:
        iterator.set_state(state)
    except Exception as error:
        raise CheckpointMismatchError(
            f"the loader, a {type(iterator).__name__}, cannot go back to where the checkpoint was "
            f"saved: {error!r}. Its state belongs to one number of workers, one sampler and one "
            "source: use the same, or start a new run from the checkpoint's weights."
        ) from error


def _copied(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def open_source(loader: Any, stage: str) -> Source | IndexedSource:
    """Return how to read a loader.

    Raises:
        DataError: If it cannot be iterated, or has no batches.
    """
    loader = loader.loader if isinstance(loader, OnDevice) else loader
    if isinstance(loader, ProcessLocal):
        return LocalSource(open_source(loader.loader, stage))
    if why := _why_no_loader(loader):
        raise DataError(f"the {stage} loader is {why}")
    if isinstance(loader, IndexedLoader):
        source: Source | IndexedSource = IndexedSource(loader)
    elif _is_grain(loader, "MapDataset"):
        source = MapSource(loader)
    else:
        source = IterableSource(loader)
    if source.num_batches == 0:
        raise DataError(f"the {stage} loader has no batches. {why_empty(loader)}")
    return source


def first_batches(source: Source | IndexedSource, limit: int | None) -> Source | IndexedSource:
    """Return a source whose epoch 0 always has the same first batches, in the same order.

    Only a loader that is iterated anew may give others each time: of it they are kept in memory.
    """
    if limit is None or not isinstance(source, IterableSource):
        return source
    return IterableSource([batch for batch, _ in itertools.islice(source.open(0, 0), limit)])


def _why_no_loader(loader: Any) -> str:
    """Return what is wrong with something that cannot be a loader, or an empty string."""
    from_arrays = "for arrays in memory write `data.from_arrays(arrays, batch_size=...)`."
    if isinstance(loader, type):
        return f"the class {loader.__name__}; make one: `{loader.__name__}(...)`."
    if isinstance(loader, jax.Array | np.ndarray):
        return f"an array, expected an iterable of batches; {from_arrays}"
    if isinstance(loader, list | tuple) and all(isinstance(x, np.ndarray) for x in loader):
        shapes = [list(x.shape) for x in loader]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            return f"arrays of shapes {shapes}, expected an iterable of batches; {from_arrays}"
    if hasattr(loader, "__iter__") and not isinstance(loader, Mapping | str | bytes):
        return why_forked(loader)
    if callable(loader) and not hasattr(loader, "__iter__"):
        return f"a {type(loader).__name__}, expected an iterable of batches; call it."
    return f"of type {type(loader).__name__}, expected an iterable of batches; {from_arrays}"


def device_transform_of(loader: Any) -> Callable[[PyTree], PyTree] | None:
    """Return the transform that the loader wants inside the step, if any."""
    transform = getattr(loader, "device_transform", None)
    # `from_arrays(...).map(...)` is another dataset, of the same batches.
    parents = getattr(loader, "_parents", ()) if transform is None else ()
    return next(filter(None, map(device_transform_of, parents)), transform)


def as_host_batch(batch: PyTree, where: str = "batch") -> PyTree:
    """Return the batch with NumPy leaves, 64-bit numbers narrowed unless JAX computes in them.

    `where` is the batch's name, for messages.

    Raises:
        DataError: For a leaf that is no number, or has one beyond 32 bits, naming it.
    """

    def convert(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        array = np.asarray(leaf)
        if array.dtype.kind in "OUSMm":
            raise DataError(
                f"{where}: leaf {leaf_name(path)} has dtype {array.dtype}, which no device can "
                "hold; drop or encode it in the loader."
            )
        narrow = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        if narrow is not array and array.dtype.kind in "iu" and not np.array_equal(narrow, array):
            wrong = array[narrow != array].flat[0]
            raise DataError(
                f"{where}: leaf {leaf_name(path)} holds {wrong}, which does not fit {narrow.dtype};"
                " JAX computes in 32 bits unless `jax_enable_x64` is set. Map such numbers to "
                "smaller ones in the loader."
            )
        return narrow

    return jax.tree_util.tree_map_with_path(convert, batch)


def spec_of(batch: PyTree) -> PyTree:
    """Return the batch's shapes and dtypes, as `jax.ShapeDtypeStruct` leaves."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def num_rows(batch: PyTree, where: str) -> int:
    """Return the number of samples in a batch: the leading axis that its leaves share.

    `where` is the batch's name, for messages.

    Raises:
        DataError: If there are no arrays or no samples, or the leading axes differ.
    """
    flat = jax.tree_util.tree_flatten_with_path(batch)[0]
    if not flat:
        raise DataError(
            f"{where} has no arrays, got {reprlib.repr(batch)}; expected a pytree of arrays, e.g. "
            "`{'image': images, 'label': labels}`."
        )
    shared, *others = {leaf.shape[:1] for _, leaf in flat}
    if others or shared in ((), (0,)):
        found = ", ".join(f"{leaf_name(path)}: {_shown(leaf)}" for path, leaf in flat)
        raise DataError(
            f"{where}: expected leaves that share their first axis, the samples, at least one; "
            f"got {found}."
        )
    return shared[0]


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
            f"{where} has another structure than the first batch: {_difference(batch, spec)}."
        )
    if all(g.shape == w.shape and g.dtype == w.dtype for g, w in zip(got, want, strict=True)):
        return True
    paths = [leaf_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(spec)[0]]
    wrong = [x for x in zip(paths, got, want, strict=True) if not is_shorter(*x[1:])]
    if wrong:
        leaves = "\n".join(
            f"  leaf {name}: expected {_shown(w)}, got {_shown(g)}; {remedy(g, w)}"
            for name, g, w in wrong
        )
        raise BatchSpecError(
            f"{where} differs from the first batch, and the step is compiled for batches like "
            f"that one:\n{leaves}{allowance(x[1:] for x in wrong)}"
        )
    return False


def _difference(batch: PyTree, spec: PyTree) -> str:
    got, want = (
        {leaf_name(p): _shown(leaf) for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (batch, spec)
    )
    missing = [f"{name} ({want[name]}) is missing" for name in want if name not in got]
    new = [f"{name} ({got[name]}) is new" for name in got if name not in want]
    types = [f"expected {jax.tree.structure(spec)}, got {jax.tree.structure(batch)}"]
    return ", ".join(missing + new or types)


def _shown(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


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
