"""The background feed: loader -> checked batch -> stacked chunk -> arrays on the device.

One thread reads ahead, a bounded queue hands chunks to the loop. May import levels 0 and 1.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrainer.data import (
    IndexedSource,
    Source,
    as_host_batch,
    check_spec,
    num_rows,
    spec_of,
)
from jaxtrainer.errors import BatchSpecError, DataError
from jaxtrainer.sharding import batch_sharding, place, replicated
from jaxtrainer.types import IndexedLoader, PyTree

_POLL_S = 0.2


@dataclass(kw_only=True)
class Chunk:
    """Some consecutive batches of one epoch, stacked on the device.

    Attributes:
        tree: Leaves `[capacity, batch, ...]`; the rows beyond `size` are not defined.
        size: Batches in it.
        rows: Samples of each batch.
        epoch: Epoch it belongs to.
        is_last: Whether the epoch ends with it.
        states: The loader's own state after each batch, where it has one.
        was_throttled: Whether the feed had to wait for the device, not for the loader.
    """

    tree: PyTree
    size: int
    rows: int
    epoch: int
    is_last: bool
    states: list[Any]
    was_throttled: bool


@dataclass(kw_only=True)
class FeedSpec:
    """What the feed hands to the compiled step.

    Attributes:
        batch: Spec of one batch as the step sees it, before the device transform.
        fed: Spec of what travels for one batch: the batch, or int32 row indices.
        resident: Arrays that live on the device, from which the indices take rows, or None.
    """

    batch: PyTree
    fed: PyTree
    rows: int
    resident: PyTree | None


@dataclass(frozen=True, kw_only=True)
class FeedOptions:
    """How a feed reads.

    Attributes:
        stage: For messages.
        mesh: Where the batches go.
        limit: At most this many batches an epoch.
        keep_ragged: Hand out a last batch with fewer rows (evaluation) or leave it out
            (training, where it would cost a second compilation and an uneven step).
        resident_bytes: Arrays in memory up to this size are put on the device whole.
    """

    stage: str
    mesh: Mesh
    limit: int | None = None
    keep_ragged: bool = False
    resident_bytes: int = 0


class Feed:
    """Reads a source ahead of the loop.

    Args:
        source: The loader.
        options: How to read it.
        epochs: Which epochs to read, in order.
        start: First batch of the first epoch.
        state: State of the loader at that batch, if it has one.

    Attributes:
        spec: What the step will get.
        first: The first batch, NumPy.

    Raises:
        DataError: If there is no batch, or the first one cannot be trained on.
    """

    def __init__(
        self,
        source: Source,
        options: FeedOptions,
        *,
        epochs: Iterable[int] = (0,),
        start: int = 0,
        state: Any = None,
    ) -> None:
        self.source = source
        self.options = options
        self.dropped_rows = 0
        self._epochs = iter(epochs)
        self._first_epoch = next(self._epochs)
        self._start = start
        self._state = state
        self._peeked: Iterator[Any] | None = None
        self._thread: threading.Thread | None = None
        self.spec = self._open()
        self.rows = self.spec.rows

    def _open(self) -> FeedSpec:
        if isinstance(self.source, IndexedSource):
            return self._open_indexed(self.source)
        stage, epoch = self.options.stage, self._first_epoch
        batches = self.source.open(epoch, self._start, self._state)
        first = next(batches, None)
        if first is None:
            raise DataError(
                f"the {stage} loader yielded no batch in epoch {epoch} from batch {self._start}. "
                "One that drops its remainder is empty when there are fewer samples than a batch."
            )
        self._peeked = itertools.chain([first], batches)
        self.first = as_host_batch(first[0])
        spec = spec_of(self.first)
        return FeedSpec(batch=spec, fed=spec, rows=num_rows(self.first, stage), resident=None)

    def _open_indexed(self, source: IndexedSource) -> FeedSpec:
        indices = source.loader.batch_indices(self._first_epoch)[: source.loader.batch_size]
        self.first = as_host_batch(source.gather(indices))
        spec, rows = spec_of(self.first), num_rows(self.first, self.options.stage)
        if not self._is_resident(source.loader):
            return FeedSpec(batch=spec, fed=spec, rows=rows, resident=None)
        arrays = place(as_host_batch(source.loader.arrays), replicated(self.options.mesh))
        fed = jax.ShapeDtypeStruct((rows,), np.int32)
        return FeedSpec(batch=spec, fed=fed, rows=rows, resident=arrays)

    def _is_resident(self, loader: IndexedLoader) -> bool:
        asked = getattr(loader, "device_resident", None)
        size = sum(a.nbytes for a in jax.tree.leaves(loader.arrays))
        return size <= self.options.resident_bytes if asked is None else asked

    @property
    def num_whole_batches(self) -> int | None:
        """Batches an epoch that are full, as far as known before the epoch's end."""
        if isinstance(self.source, IndexedSource):
            return self._num_samples // self.rows
        return self.source.num_batches

    @property
    def num_batches(self) -> int | None:
        """Batches an epoch that the feed hands out, as far as known before the epoch's end."""
        length = self.source.num_batches if self.options.keep_ragged else self.num_whole_batches
        known = [n for n in (self.options.limit, length) if n is not None]
        return min(known, default=None)

    @property
    def ragged_rows(self) -> int:
        """Rows of a last batch that is not full, as far as known."""
        if isinstance(self.source, IndexedSource) and not getattr(
            self.source.loader, "drop_remainder", False
        ):
            return self._num_samples % self.rows
        return self.dropped_rows

    @property
    def _num_samples(self) -> int:
        assert isinstance(self.source, IndexedSource)
        return len(jax.tree.leaves(self.source.loader.arrays)[0])

    def again(self, limit: int | None = None) -> Feed:
        """Return a feed of the same epoch from its start, with the same arrays on the device.

        The batch that was looked at is handed to the first one, so that a loader that can be
        read once only is not asked for a second iterator.
        """
        feed = copy.copy(self)
        self._peeked = None
        limits = [n for n in (limit, self.options.limit) if n is not None]
        feed.options = dataclasses.replace(self.options, limit=min(limits, default=None))
        feed._epochs, feed._start, feed._state, feed._thread = iter(()), 0, None, None
        return feed

    def start(self, capacity: int) -> Feed:
        """Start reading ahead, `capacity` batches to a chunk."""
        self.capacity = capacity
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._in_flight: queue.SimpleQueue[jax.Array] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name=f"jaxtrainer-{self.options.stage}-feed", daemon=True
        )
        self._thread.start()
        return self

    def __iter__(self) -> Iterator[Chunk]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def dispatched(self, token: jax.Array) -> None:
        """Tell the feed an output of the newest dispatch, by which it bounds its run-ahead."""
        self._in_flight.put(token)

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        if self._thread is not None:
            self._closed.set()
            self._thread.join()

    def _work(self) -> None:
        try:
            start, state = self._start, self._state
            for epoch in itertools.chain([self._first_epoch], self._epochs):
                chunk = None
                for chunk in self._epoch_chunks(epoch, start, state):
                    if not self._put(chunk):
                        return
                if chunk is None:
                    raise DataError(
                        f"the {self.options.stage} loader has no batch left in epoch {epoch} from "
                        f"batch {start}. If it can be read once only, pass something that makes a "
                        "new iterator each epoch: a list, or a Grain dataset."
                    )
                start, state = 0, None
            self._put(None)
        except BaseException as error:
            error.add_note(f"while reading the {self.options.stage} loader")
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def _throttle(self) -> bool:
        # Two dispatches in flight keep the device busy; more would only pile up memory.
        waited = False
        while self._in_flight.qsize() > 2:
            token = self._in_flight.get()
            waited = waited or not token.is_ready()
            token.block_until_ready()
        return waited

    def _epoch_chunks(self, epoch: int, start: int, state: Any) -> Iterator[Chunk]:
        group: list[_Read] = []
        for read, is_last in _with_last(self._usable(epoch, start, state)):
            if read.rows != self.rows and group:
                yield self._chunk(group, epoch, is_last=False)
                group = []
            group.append(read)
            if len(group) == self.capacity or is_last:
                yield self._chunk(group, epoch, is_last=is_last)
                group = []

    def _usable(self, epoch: int, start: int, state: Any) -> Iterator[_Read]:
        for i, (read, is_last) in enumerate(_with_last(self._read(epoch, start, state))):
            if read.rows != self.rows and not is_last:
                raise BatchSpecError(
                    f"{self.options.stage} batch {start + i} of epoch {epoch} has {read.rows} rows,"
                    f" expected {self.rows}; only the last batch of an epoch may be smaller."
                )
            if read.rows != self.rows and not self.options.keep_ragged:
                self.dropped_rows = read.rows
                return
            yield read

    def _read(self, epoch: int, start: int, state: Any) -> Iterator[_Read]:
        batches, self._peeked = self._peeked, None
        batches = batches or self.source.open(epoch, start, state)
        limit = self.options.limit
        limit = None if limit is None else max(limit - start, 0)
        for i, (batch, after) in enumerate(itertools.islice(batches, limit)):
            if isinstance(self.source, IndexedSource):
                yield _Read(batch, len(batch), after)
                continue
            where = f"{self.options.stage} batch {start + i} of epoch {epoch}"
            batch = as_host_batch(batch)
            whole = check_spec(batch, self.spec.batch, where)
            yield _Read(batch, self.rows if whole else num_rows(batch, where), after)

    def _chunk(self, group: list[_Read], epoch: int, *, is_last: bool) -> Chunk:
        rows = group[0].rows
        capacity = self.capacity if rows == self.rows else 1
        batches = [read.batch for read in group]
        if isinstance(self.source, IndexedSource):
            stacked = self._stack_indexed(self.source, batches, capacity, rows)
        else:
            stacked = jax.tree.map(lambda *leaves: _stack(leaves, capacity), *batches)
        throttled = self._throttle()
        return Chunk(
            tree=place(stacked, batch_sharding(self.options.mesh, rows, stacked=True)),
            size=len(group),
            rows=rows,
            epoch=epoch,
            is_last=is_last,
            states=[read.state for read in group],
            was_throttled=throttled,
        )

    def _stack_indexed(
        self, source: IndexedSource, group: list[np.ndarray], capacity: int, rows: int
    ) -> PyTree:
        # Rows past the last batch repeat row 0: they are never read, but must be valid indices.
        indices = np.zeros((capacity, rows), np.int32)
        for i, batch in enumerate(group):
            indices[i] = batch
        if self.spec.resident is not None:
            return indices
        used = indices[: len(group)].reshape(-1)

        def gather(array: np.ndarray) -> np.ndarray:
            chunk = np.empty((capacity, rows, *array.shape[1:]), array.dtype)
            flat = chunk[: len(group)].reshape(len(used), *array.shape[1:])
            array.take(used, axis=0, out=flat, mode="clip")
            return chunk

        return as_host_batch(jax.tree.map(gather, source.loader.arrays))


class _Read(NamedTuple):
    batch: PyTree
    rows: int
    state: Any


def _stack(leaves: tuple[Any, ...], capacity: int) -> np.ndarray:
    first = np.asarray(leaves[0])
    if capacity == 1:
        return first[None]
    chunk = np.empty((capacity, *first.shape), first.dtype)
    for i, leaf in enumerate(leaves):
        chunk[i] = leaf
    return chunk


def _with_last(items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item with whether it is the last; reads one ahead."""
    held = next(items, _with_last)
    while held is not _with_last:
        following = next(items, _with_last)
        yield held, following is _with_last
        held = following
