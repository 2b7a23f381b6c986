"""The background feed: chunks of batches to the device, ahead of the loop.

One thread reads, a bounded queue hands chunks to the loop. May import levels 0 and 1.
"""

from __future__ import annotations

import copy
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrainer.alike import Together, facts_of, needs_agreement
from jaxtrainer.chunks import Chunks, HostChunk, IndexedChunks, ReadOptions, StackedChunks
from jaxtrainer.data import IndexedSource, Source, as_host_batch
from jaxtrainer.errors import DataError
from jaxtrainer.grain_source import MapSource
from jaxtrainer.rows import Held, held_rows, padded_rows, place_chunk
from jaxtrainer.shapes import Shape, Shapes
from jaxtrainer.sharding import is_lockstep, place, replicated
from jaxtrainer.types import IndexedLoader, PyTree
from jaxtrainer.waiting import Patience

RESIDENT_BYTES = 1 << 30
"""Arrays in memory up to this size are put on the device whole."""

_AHEAD = 2
_POLL_S = 0.2
_SMALL_CHUNK = 1 << 20


@dataclass(kw_only=True)
class Chunk:
    """Some consecutive batches of one epoch, stacked on the device.

    Attributes:
        tree: Leaves `[capacity, padded, ...]`; the batches beyond `size` are not defined, nor are
            rows beyond `rows`, which a batch has that does not divide over the devices.
        size: Batches in it.
        rows: Samples of each batch.
        is_last: Whether the epoch ends with it.
        states: The loader's own state after each batch, where it has one.
        was_throttled: Whether the feed had to wait for the device, not for the loader.
        num_held: Rows of a batch that this process holds.
        shape: Of a batch, where a loader may have several and it is not cut short.
    """

    tree: PyTree
    size: int
    rows: int
    is_last: bool
    states: list[Any]
    was_throttled: bool
    num_held: int
    shape: Shape | None = None

    @property
    def capacity(self) -> int:
        """Batches that it has room for."""
        return jax.tree.leaves(self.tree)[0].shape[0]


@dataclass(kw_only=True)
class FeedSpec:
    """What the feed hands to the compiled step.

    Attributes:
        batch: Spec of one batch as the step sees it, before the device transform.
        fed: Spec of what travels for one batch: the batch, or int32 row indices.
        rows: Samples of a batch.
        resident: Spec of the arrays on the device from which the indices take rows, or None.
    """

    batch: PyTree
    fed: PyTree
    rows: int
    resident: PyTree | None


class Feed:
    """Reads a loader ahead of the loop.

    Args:
        source: The loader.
        options: How to read it.
        mesh: Where the batches go.
        epochs: Which epochs to read, in order.
        start: First batch of the first epoch.
        state: State of the loader at that batch, if it has one.
        patience: How long to wait for the loader.
        tell: Takes a line for the user, of a shape of batches that is new.

    Attributes:
        spec: What the step will get.
        first: The first batch, NumPy.
        rows: Samples of a whole batch.

    Raises:
        DataError: If there is no batch, or the first one cannot be trained on.
        DataTimeoutError: If the first one does not come in time.
    """

    def __init__(
        self,
        source: Source | IndexedSource,
        options: ReadOptions,
        mesh: Mesh,
        *,
        epochs: Iterable[int] = (0,),
        start: int = 0,
        state: Any = None,
        patience: Patience | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.source = source
        self.mesh = mesh
        self._patience = patience or Patience()
        self._tell = tell
        self._is_lockstep = is_lockstep(mesh)
        self._epochs = iter(epochs)
        self._first_epoch = next(self._epochs)
        self._start, self._state = start, state
        self._thread: threading.Thread | None = None
        self._waits_for_device = False
        # Of the copies too, which `again` makes.
        self._threads: list[threading.Thread] = []
        self._chunks: Chunks
        self._placed: list[PyTree] = []
        if isinstance(source, MapSource) and jax.process_count() > 1 and not options.max_recompiles:
            self.source = source = source.of_rows(self._held)
        self._needs_agreement = needs_agreement(source)
        options = replace(options, held=self._held, signs=self._needs_agreement)
        resident = None
        if isinstance(source, IndexedSource):
            stays = is_resident(source.loader)
            self._chunks = IndexedChunks(source, options, gathers=not stays)
            if stays:
                resident = resident_specs(source.loader.arrays, self._chunks.spec, mesh)
        else:
            position = {"epoch": self._first_epoch, "start": start, "state": state}
            self._chunks = self._patience.call(
                lambda: StackedChunks(source, options, **position),
                options.name_of(start, self._first_epoch),
            )
        self.first, self.rows = self._chunks.first, self._chunks.rows
        indices = jax.ShapeDtypeStruct((self.rows,), np.int32)
        self.spec = FeedSpec(
            batch=self._chunks.spec,
            fed=self._chunks.spec if resident is None else indices,
            rows=self.rows,
            resident=resident,
        )

    @property
    def resident(self) -> PyTree | None:
        """The arrays that live on the device, or None; the first use puts them there.

        That is after compilation, whose peak of memory they would raise.
        """
        if isinstance(self.source, IndexedSource) and self.spec.resident is not None:
            if not self._placed:
                arrays = as_host_batch(self.source.loader.arrays)
                self._placed.append(place(arrays, replicated(self.mesh)))
            return self._placed[0]
        return None

    @property
    def num_batches(self) -> int | None:
        """Batches an epoch that the feed hands out, as far as known."""
        return self._chunks.num_batches

    @property
    def ragged_rows(self) -> int:
        """Samples of a last batch that is not whole, as far as known."""
        return self._chunks.ragged_rows

    @property
    def shapes(self) -> Shapes | None:
        """What shapes the batches may have; None if it is one."""
        return self._chunks.shapes

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal in all processes; see `alike`."""
        source, is_own = self.source, getattr(self.source, "is_own", False)
        looked_at = self.first
        if isinstance(source, MapSource) and source.is_partial:
            looked_at = source.sample(self._first_epoch, self._start)
        return facts_of(looked_at, self.rows, self.num_batches, is_own=is_own)

    def again(self, limit: int | None = None) -> Feed:
        """Return a feed of the same epoch from its start, with the same arrays on the device."""
        feed = copy.copy(self)
        feed._chunks = self._chunks.limited(limit)
        feed._epochs, feed._start, feed._state, feed._thread = iter(()), 0, None, None
        return feed

    def start(self, capacity: int) -> Feed:
        """Start reading ahead, `capacity` batches to a chunk."""
        self.capacity = capacity
        # Bounded by a semaphore of its own: to wait for an item costs no Python then.
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._in_flight: queue.SimpleQueue[jax.Array] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._together: Together | None = None
        if self._needs_agreement:
            is_own = getattr(self.source, "is_own", False)
            label, limit_s = self._chunks.options.stage, self._patience.limit_s
            self._together = Together(label, self._closed, limit_s, is_own=is_own)
        # Dispatches in flight keep the device busy; large ones would only pile up memory.
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.spec.fed))
        self._run_ahead = 8 if size * capacity < _SMALL_CHUNK else 2
        stage = self._chunks.options.stage
        self._thread = threading.Thread(
            target=self._work, name=f"jaxtrainer-{stage}-feed", daemon=True
        )
        self._thread.start()
        self._threads[:] = [t for t in self._threads if t.is_alive()] + [self._thread]
        return self

    def __iter__(self) -> Iterator[Chunk]:
        patience, thread = self._patience, self._thread
        assert thread is not None
        while (item := patience.take(self._queue, thread, self._reading)) is not None:
            self._room.release()
            if isinstance(item, BaseException):
                # Worker processes get a Ctrl-C of the terminal, too, and fail.
                if patience.gives_up():
                    return
                raise item
            if item.shape is not None and self.shapes is not None:
                self.shapes.use(item.shape, self._tell)
            yield item

    def dispatched(self, token: jax.Array) -> None:
        """Tell the feed an output of the newest dispatch, by which it bounds its run-ahead."""
        if self._is_lockstep:
            token.block_until_ready()
        self._in_flight.put(token)

    @property
    def is_stuck(self) -> bool:
        """Whether the loader still has not answered, after the feed was closed."""
        return any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        if self._thread is None:
            self._chunks.close()
        else:
            self._closed.set()
            self._patience.end(self._thread)

    def _reading(self) -> str | None:
        return None if self._waits_for_device else self._chunks.reading

    def _work(self) -> None:
        try:
            start, state = self._start, self._state
            for epoch in itertools.chain([self._first_epoch], self._epochs):
                if not self._read_epoch(epoch, start, state):
                    return
                start, state = 0, None
            self._put(None)
        except BaseException as error:
            error.add_note(f"while reading the {self._chunks.options.stage} loader")
            if self._together is not None:
                self._together.fail(error)
            self._put(error)
        finally:
            # The traceback of an error would keep iterators, and their processes, alive.
            self._chunks.close()

    def _read_epoch(self, epoch: int, start: int, state: Any) -> bool:
        host = None
        for host in self._chunks.read(epoch, start, state, self.capacity):
            if self._together is not None:
                self._together.check(epoch, host)
            if not self._put(self._on_device(host)):
                return False
        if host is None:
            raise DataError(
                f"the {self._chunks.options.stage} loader has no batch left in epoch {epoch} from "
                f"batch {start}. If it can be read once only, pass something that makes a new "
                "iterator each epoch: a list, or a Grain dataset."
            )
        return True

    def _held(self, rows: int) -> Held | None:
        is_whole = jax.process_count() == 1 and rows == padded_rows(self.mesh, rows)
        return None if is_whole else held_rows(self.mesh, rows)

    def _on_device(self, host: HostChunk) -> Chunk:
        self._waits_for_device = True
        throttled, held = self._throttle(), self._held(host.rows)
        chunk = Chunk(
            tree=place_chunk(host.tree, self.mesh, host.rows),
            size=host.size,
            rows=host.rows,
            is_last=host.is_last,
            states=host.states,
            was_throttled=throttled,
            num_held=host.rows if held is None else len(held.rows),
            shape=host.shape,
        )
        self._waits_for_device = False
        return chunk

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            if self._room.acquire(timeout=_POLL_S):
                self._queue.put(item)
                return True
        return False

    def _throttle(self) -> bool:
        waited = False
        while (excess := self._in_flight.qsize() - self._run_ahead) > 0:
            # They end in order: to wait for the last is to wait for all.
            *_, token = [self._in_flight.get() for _ in range(excess)]
            waited = waited or not token.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
            token.block_until_ready()
        return waited


def is_resident(loader: IndexedLoader) -> bool:
    """Return whether arrays in memory are to be put on the device whole."""
    asked = getattr(loader, "device_resident", None)
    size = sum(a.nbytes for a in jax.tree.leaves(loader.arrays))
    return size <= RESIDENT_BYTES if asked is None else asked


def resident_specs(arrays: PyTree, batch: PyTree, mesh: Mesh) -> PyTree:
    """Return the specs of arrays in memory, as they would live on the device."""
    # With the dtypes of a batch, which is narrowed to what JAX computes in.
    whole = replicated(mesh)
    return jax.tree.map(
        lambda a, x: jax.ShapeDtypeStruct(a.shape, x.dtype, sharding=whole), arrays, batch
    )
