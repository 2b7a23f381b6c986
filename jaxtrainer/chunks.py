"""From a loader to stacked chunks of batches in host memory, checked and in order.

`IndexedChunks` cuts them from arrays in memory, `StackedChunks` stacks what any other loader
yields. May import levels 0 and 1.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxtrainer.data import (
    IndexedSource,
    Source,
    as_host_batch,
    check_spec,
    num_rows,
    spec_of,
)
from jaxtrainer.errors import BatchSpecError, DataError
from jaxtrainer.remedies import ALLOW
from jaxtrainer.rows import Held, first_rows, with_rows
from jaxtrainer.shapes import Shape, Shapes, shape_of
from jaxtrainer.types import PyTree
from jaxtrainer.workers import close_iterator, why_empty


class HostChunk(NamedTuple):
    """Consecutive batches of one epoch.

    Attributes:
        tree: Leaves `[capacity, held, ...]`, NumPy: of each batch the rows that this process
            holds. Past `size` they are not defined.
        size: Batches in it.
        rows: Samples of each, those of other processes too.
        is_last: Whether the epoch ends with it.
        states: The loader's own state after each batch, where it has one.
        shape: Of a batch, where a loader may have several and it is not cut short.
        digest: Of the first row of each batch, where the processes compare theirs.
    """

    tree: PyTree
    size: int
    rows: int
    is_last: bool
    states: list[Any]
    shape: Shape | None = None
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read a loader.

    Attributes:
        stage: For messages.
        limit: At most this many batches an epoch.
        keep_ragged: Hand out a last batch with fewer rows (evaluation) or leave it out
            (training, where it would cost a second compilation and an uneven step).
        max_recompiles: Other shapes than the first one that batches may have.
        shapes: Those that a run which is resumed has used.
        check_rows: Raises for a number of rows that cannot be run, of such batches.
        held: Which part of a batch of so many rows this process holds; None for all of it.
        signs: Whether a chunk has a digest.
    """

    stage: str
    limit: int | None = None
    keep_ragged: bool = False
    max_recompiles: int = 0
    shapes: Sequence[Any] = ()
    check_rows: Callable[[int], None] = lambda rows: None
    held: Callable[[int], Held | None] = lambda rows: None
    signs: bool = False

    def name_of(self, batch_idx: int, epoch: int) -> str:
        """Return what a batch is called in messages."""
        return f"{self.stage} batch {batch_idx} of epoch {epoch}"


class Chunks(Protocol):
    """A way to read a loader in chunks.

    Attributes:
        first: The first batch, NumPy.
        spec: Shapes and dtypes of a batch.
        rows: Samples of a whole batch.
        num_batches: Batches an epoch, if known.
        ragged_rows: Samples of a last batch that is left out, as far as known.
        options: How the loader is read.
        shapes: What shapes the batches may have; None if all have that of `first`.
        reading: Which batch is being read, for messages.
    """

    first: PyTree
    spec: PyTree
    rows: int
    ragged_rows: int
    options: ReadOptions
    shapes: Shapes | None
    reading: str

    @property
    def num_batches(self) -> int | None:
        """See the class."""
        ...

    def read(self, epoch: int, start: int, state: Any, capacity: int) -> Iterator[HostChunk]:
        """Yield the chunks of an epoch from batch `start`, or the loader's `state` there."""
        ...

    def limited(self, limit: int | None) -> Chunks:
        """Return the same with at most this many batches an epoch."""
        ...

    def close(self) -> None:
        """End what was opened of the loader; by the thread that reads it, or when none does."""
        ...


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
        return _limited(self, limit)

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


class StackedChunks:
    """Chunks of the batches that a loader yields, each checked against the first.

    Args:
        source: The loader.
        options: How to read it.
        epoch: First epoch that will be read.
        start: First batch of it.
        state: State of the loader there, if it has one.

    Raises:
        DataError: If there is no batch, or it cannot be trained on.
    """

    def __init__(
        self, source: Source, options: ReadOptions, *, epoch: int, start: int, state: Any
    ) -> None:
        self.options = options
        self.ragged_rows = 0
        self._source = source
        # Of the copies too, which `limited` makes.
        self._opened: list[Any] = []
        self.reading = where = options.name_of(start, epoch)
        batches = self._open(epoch, start, state)
        try:
            first = next(batches, None)
        except Exception as error:
            _noted(error, where)
            raise
        if first is None:
            raise DataError(
                f"the {options.stage} loader yielded no batch in epoch {epoch} from batch {start}. "
                f"{why_empty(getattr(source, 'loader', None))}"
            )
        # Looked at, but not lost: a loader that can be read once only has no second iterator.
        self._peeked: Iterator[Any] | None = itertools.chain([first], batches)
        self.first = as_host_batch(first[0], where)
        self.rows = num_rows(self.first, where)
        self.spec = spec_of(self.first)
        # Of a part of each batch the whole is told.
        self._rows_of = source.rows_of if getattr(source, "is_partial", False) else None
        if self._rows_of is not None:
            self.rows = self._rows_of(start, self.rows)
            self.spec = with_rows(self.spec, self.rows)
        self.shapes: Shapes | None = None
        if options.max_recompiles:
            self.shapes = Shapes(self.spec, options.max_recompiles, options.shapes)

    @property
    def num_batches(self) -> int | None:
        """See `Chunks`."""
        known = [n for n in (self.options.limit, self._source.num_batches) if n is not None]
        return min(known, default=None)

    def limited(self, limit: int | None) -> StackedChunks:
        """See `Chunks.limited`."""
        limited = _limited(self, limit)
        self._peeked = None
        return limited

    def close(self) -> None:
        """See `Chunks.close`."""
        while self._opened:
            close_iterator(self._opened.pop())

    def _open(self, epoch: int, start: int, state: Any) -> Iterator[Any]:
        self.close()
        batches = self._source.open(epoch, start, state)
        self._opened.append(batches)
        return batches

    def read(self, epoch: int, start: int, state: Any, capacity: int) -> Iterator[HostChunk]:
        """See `Chunks.read`."""
        group: list[_Read] = []
        for read, is_last in with_last(self._usable(epoch, start, state)):
            is_failed = isinstance(read, _Failed)
            # Training takes what was read before an error: it is saved, and resumed, from there.
            takes_rest = not (is_failed and self.options.keep_ragged)
            if group and takes_rest and (is_failed or not read.is_like(group[0])):
                yield self._chunk(group, capacity, is_last=False)
                group = []
            if is_failed:
                raise read.error
            group.append(read)
            if len(group) == capacity or is_last:
                yield self._chunk(group, capacity, is_last=is_last)
                group = []

    def _usable(self, epoch: int, start: int, state: Any) -> Iterator[_Read | _Failed]:
        for i, (read, is_last) in enumerate(with_last(self._checked(epoch, start, state))):
            if isinstance(read, _Failed):
                yield read
                return
            if self.shapes is not None:
                where = self.options.name_of(start + i, epoch)
                is_cut = is_last and self.options.keep_ragged and self.shapes.is_cut(read.shape)
                if not is_cut and (error := self.shapes.refuse(read.shape, where)):
                    yield _Failed(error)
                    return
                yield read._replace(is_whole=not is_cut)
                continue
            if read.rows != self.rows and not is_last:
                yield _Failed(
                    BatchSpecError(
                        f"{self.options.name_of(start + i, epoch)} has {read.rows} rows, expected "
                        f"{self.rows}; only the last batch of an epoch may be smaller. Use one "
                        f"batch size, or {ALLOW}."
                    )
                )
                return
            if read.rows != self.rows and not self.options.keep_ragged:
                self.ragged_rows = read.rows
                return
            yield read

    def _checked(self, epoch: int, start: int, state: Any) -> Iterator[_Read | _Failed]:
        batches, self._peeked = self._peeked, None
        batches = batches or self._open(epoch, start, state)
        limit = self.options.limit
        limit = None if limit is None else max(limit - start, 0)
        self.reading = where = self.options.name_of(start, epoch)
        try:
            for i, (batch, after) in enumerate(itertools.islice(batches, limit), start):
                host = as_host_batch(batch, where)
                yield self._read(host, after, where, i)
                self.reading = where = self.options.name_of(i + 1, epoch)
        except Exception as error:
            # An item like the others: generators that read ahead would lose what they hold.
            yield _Failed(_noted(error, where))
        self.close()

    def _read(self, batch: PyTree, state: Any, where: str, batch_idx: int) -> _Read:
        if self._rows_of is not None:
            got = jax.tree.leaves(batch)[0].shape[0]
            rows = self._rows_of(batch_idx, got)
            held = self.options.held(rows)
            part = rows if held is None else len(held.rows)
            if got != part:
                raise BatchSpecError(
                    f"{where} has {rows} rows, of which the devices of this process hold {part}; "
                    f"its loader gave {got}. With `data.process_local` each process reads as many "
                    "rows as the others, and they must divide over its devices; or let every "
                    "process read whole batches, without it."
                )
            check_spec(batch, with_rows(self.spec, part), where)
            return _Read(batch, rows, state, is_whole=rows == self.rows)
        if self.shapes is None:
            is_whole = check_spec(batch, self.spec, where)
            rows = self.rows if is_whole else num_rows(batch, where)
            return _Read(batch, rows, state, is_whole=is_whole)
        rows = self.shapes.check(batch, where)
        self.options.check_rows(rows)
        return _Read(batch, rows, state, shape_of(batch))

    def _chunk(self, group: list[_Read], capacity: int, *, is_last: bool) -> HostChunk:
        first = group[0]
        capacity = capacity if first.is_whole else 1
        batches, held = [read.batch for read in group], self.options.held(first.rows)
        digest = first_rows(batches) if self.options.signs else ""
        if held is not None:
            part = held.of if self._rows_of is None else held.padded
            batches = jax.tree.map(part, batches)
        tree = jax.tree.map(lambda *leaves: _stack(leaves, capacity), *batches)
        states = [read.state for read in group]
        shape = first.shape if first.shape and first.is_whole else None
        return HostChunk(tree, len(group), first.rows, is_last, states, shape, digest)


class _Read(NamedTuple):
    """A batch that was read; `shape` only where the loader's batches may have several."""

    batch: PyTree
    rows: int
    state: Any
    shape: Shape = ()
    is_whole: bool = True

    def is_like(self, other: _Read) -> bool:
        return self.rows == other.rows and self.shape == other.shape


class _Failed(NamedTuple):
    error: Exception


def _noted(error: Exception, where: str) -> Exception:
    """Return the error with where it came from, unless it says so itself."""
    if not isinstance(error, DataError):
        error.add_note(f"while reading {where}")
    return error


def _limited(chunks: Any, limit: int | None) -> Any:
    limits = [n for n in (limit, chunks.options.limit) if n is not None]
    limited = copy.copy(chunks)
    limited.options = dataclasses.replace(chunks.options, limit=min(limits, default=None))
    return limited


def _gather(array: np.ndarray, block: np.ndarray, capacity: int) -> np.ndarray:
    size, rows = block.shape
    chunk = np.empty((capacity, rows, *array.shape[1:]), array.dtype)
    # Never read on the device, but looked at like the rest for numbers that do not fit.
    chunk[size:] = 0
    flat = chunk[:size].reshape(size * rows, *array.shape[1:])
    array.take(block.reshape(-1), axis=0, out=flat, mode="clip")
    return chunk


def _stack(leaves: tuple[Any, ...], capacity: int) -> np.ndarray:
    first = np.asarray(leaves[0])
    if capacity == 1:
        return first[None]
    chunk = np.empty((capacity, *first.shape), first.dtype)
    for i, leaf in enumerate(leaves):
        chunk[i] = leaf
    return chunk


def with_last(items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item with whether it is the last; reads one ahead.

    Example:
        >>> list(with_last(iter("ab")))
        [('a', False), ('b', True)]
    """
    held = next(items, with_last)
    while held is not with_last:
        following = next(items, with_last)
        yield held, following is with_last
        held = following
