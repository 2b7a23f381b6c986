"""The checkpoint store: writes the checkpoints of a run, and deletes what they replace.

May import levels 0 to 2, and `checkpoint`; Orbax is imported on first use.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrainer import distributed
from jaxtrainer.checkpoint import RECORD, Arrays, items_of, multiprocessing, orbax, small_arrays
from jaxtrainer.errors import CheckpointError, RunDirError
from jaxtrainer.lock import NAME as LOCK
from jaxtrainer.lock import lock_of
from jaxtrainer.manifest import ARRAYS, THREADS, is_here, manifest_of, on_host, seal
from jaxtrainer.places import place
from jaxtrainer.record import encode
from jaxtrainer.remote import is_url
from jaxtrainer.rundir import (
    clean,
    probe,
    publish,
    remove_step,
    saved_steps,
    set_aside,
    step_path,
    sync_step,
    work_path,
)
from jaxtrainer.state import TrainState, nest, size_of

_SEEN_S = 10.0
HOST_COPY_BYTES = 1 << 30
"""Size up to which a state is copied to the host before it is written."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds: the device state, and the host's record as JSON data."""

    state: TrainState
    record: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run directory, which nobody else writes in meanwhile.

    A save copies the arrays to the host and returns; a thread of the store writes them. What is
    too large for a second copy, or not all on this process, Orbax copies and writes itself; for an
    object store process 0 collects it.

    Of several processes each calls every method but `has_failed`, and what goes wrong on one of
    them is raised on all. Process 0 writes alone, but for arrays of which it has a part only.

    Args:
        directory: Where; made if missing.
        resumed_step: The step that the run goes on from; None for a fresh run.
        damaged_steps: Steps that are kept, but renamed, because they cannot be gone on from.
        durable: Delete what a step replaces only when all of it is on the disk itself.

    Raises:
        RunDirError: If it cannot be written, another run writes in it, or it has checkpoints that
            this run does not go on from.

    Attributes:
        notes: Lines for the user about files that could not be deleted, or were renamed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        resumed_step: int | None = None,
        damaged_steps: Sequence[int] = (),
        durable: bool = False,
    ) -> None:
        self.directory = place(directory)
        self.durable = durable
        self.notes: deque[str] = deque()
        self._savers: dict[str, Any] = {}
        self._write: Future[None] | None = None
        self._lock = lock_of(self.directory)
        _on_first(lambda: self._open(resumed_step, damaged_steps))
        _check_shared(self.directory)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="jaxtrainer-checkpoint")

    def _open(self, resumed_step: int | None, damaged_steps: Sequence[int]) -> None:
        _refuse_other_run(self.directory, resumed_step, damaged_steps)
        probe(self.directory)
        self._lock.acquire()
        self.notes.extend(clean(self.directory))
        self.notes.extend(set_aside(self.directory, damaged_steps))

    def save(self, step: int, snapshot: Snapshot, replaces: Sequence[int] = ()) -> None:
        """Start saving a step; once it is on disk, the steps that it replaces are deleted.

        If the disk takes no more, they make room before a second try, but for the newest one.

        Raises:
            CheckpointError: If the save before this one failed.
        """
        self.wait()
        _on_all(self._lock.check)
        items = items_of(snapshot.state)
        # What is uploaded is put together on the disk of one process.
        collects = is_url(self.directory) and distributed.count() > 1
        if collects:
            items = jax.tree.map(lambda x: x if is_here(x) else on_host(x), items)
        record = encode({**snapshot.record, "device": small_arrays(snapshot.state)})
        fits = collects or _fits_host(items)
        if fits and not distributed.is_first():
            self._write = Future()
            self._write.set_result(None)
            return
        if fits:
            job = partial(self._save_twice, step, _on_host(items), record, replaces)
        else:
            self._save_large(step, items, record)
            job = partial(self._end_large, step, replaces)
        self._write = self._writer.submit(job)

    @property
    def has_failed(self) -> bool:
        """Whether a save has ended here that `wait` raises an error for."""
        write = self._write
        return write is not None and write.done() and write.exception() is not None

    def wait(self) -> None:
        """Wait until what was saved is on disk, and raise what went wrong with it."""
        if self._write is not None:
            write, self._write = self._write, None
            _on_all(write.result)

    def close(self) -> None:
        """Wait and release the directory."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            for saver in self._savers.values():
                saver.close()
            self._lock.release()

    def path(self, step: int) -> Path:
        """Return the directory of a step."""
        return step_path(self.directory, step)

    def _save_twice(self, step: int, items: Arrays, record: Any, replaces: Sequence[int]) -> None:
        record = {**record, ARRAYS: manifest_of(items)}
        try:
            self._save_once(step, items, record)
        except CheckpointError:
            self._make_room(replaces)
            self._save_once(step, items, record)
        self._delete(replaces)
        # Of an earlier one that failed Orbax may have written more after it was cleaned up.
        self._clean()

    def _clean(self) -> None:
        if distributed.is_first():
            self.notes.extend(clean(self.directory))

    def _save_once(self, step: int, items: Arrays, record: Any) -> None:
        # What saves in the background waits for minutes for a directory that cannot be made.
        with self._cleaning_up(step):
            self._start(self._saver("Checkpointer"), step, items, record)
            self._end(step)

    def _save_large(self, step: int, items: Arrays, record: Any) -> None:
        probe(self.directory)
        record = {**record, ARRAYS: manifest_of(items, THREADS)}
        self._start(self._saver("AsyncCheckpointer"), step, items, record)

    def _end_large(self, step: int, replaces: Sequence[int]) -> None:
        with self._cleaning_up(step), _failing_as(f"saving step {step} in {self.directory}"):
            self._saver("AsyncCheckpointer").wait_until_finished()
            self._end(step)
        # One that failed is not tried again: what was to be written is changed by the next step.
        self._delete(replaces)

    def _saver(self, kind: str) -> Any:
        if kind not in self._savers:
            ocp = orbax()
            options = multiprocessing(is_alone=kind == "Checkpointer")
            composite = ocp.CompositeOptions(multiprocessing_options=options)
            handler = ocp.CompositeCheckpointHandler(composite_options=composite)
            self._savers[kind] = getattr(ocp, kind)(handler, multiprocessing_options=options)
        return self._savers[kind]

    def _start(self, saver: Any, step: int, items: Arrays, record: Any) -> None:
        ocp = orbax()
        args = {name: ocp.args.StandardSave(nest(arrays)) for name, arrays in items.items()}
        args[RECORD] = ocp.args.JsonSave(seal(record))
        with _failing_as(f"saving step {step} in {self.directory}"):
            saver.save(work_path(self.directory, step), args=ocp.args.Composite(**args))

    def _end(self, step: int) -> None:
        with _failing_as(f"saving step {step} in {self.directory}"):
            publish(self.directory, step)
            if self.durable and distributed.is_first():
                self._sync(step)

    def _sync(self, step: int) -> None:
        try:
            sync_step(self.directory, step)
        except OSError:
            # It may be lost yet: it must not take the place of one that is not.
            self._delete([step])
            raise

    @contextmanager
    def _cleaning_up(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            if distributed.is_first():
                self.notes.extend(clean(self.directory, step))
            raise

    def _make_room(self, replaces: Sequence[int]) -> None:
        newest = max(saved_steps(self.directory), default=None)
        self._delete([old for old in replaces if old != newest])

    def _delete(self, steps: Sequence[int]) -> None:
        for step in steps if distributed.is_first() else ():
            self.notes.extend(remove_step(self.directory, step))


def _refuse_other_run(directory: Path, resumed_step: int | None, damaged: Sequence[int]) -> None:
    from_step = -1 if resumed_step is None else resumed_step
    later = [s for s in saved_steps(directory) if s > from_step and s not in damaged]
    if later:
        raise RunDirError(
            f"{directory} already has {len(later)} checkpoint(s) that this run does not "
            f"go on from, the last at step {later[-1]}. Go on from it with "
            "`fit(..., ckpt_path='last')`, or give this run a directory of its own."
        )


def _fits_host(items: Arrays) -> bool:
    return size_of(items)[1] <= HOST_COPY_BYTES and all(map(is_here, jax.tree.leaves(items)))


def _on_first(act: Callable[[], None]) -> None:
    """Do something on process 0; what goes wrong with it is raised on all processes."""
    error: CheckpointError | None = None
    try:
        if distributed.is_first():
            act()
    except CheckpointError as caught:
        error = caught
    _raise_told(distributed.broadcast(_said(error), "checkpoint"), error)


def _on_all(act: Callable[[], Any]) -> None:
    """Do something on all processes; what goes wrong with it on one is raised on all."""
    if sys.exc_info()[0] is not None:
        # The call is failing already, and the others may not come here.
        act()
        return
    error: CheckpointError | None = None
    try:
        act()
    except CheckpointError as caught:
        error = caught
    told = distributed.gather(_said(error), "checkpoint")
    _raise_told(next((each for each in told if each), None), error)


def _raise_told(told: Sequence[str] | None, own: CheckpointError | None) -> None:
    if own is not None:
        raise own
    if told is not None:
        kind, text = told
        raise (RunDirError if kind == RunDirError.__name__ else CheckpointError)(text)


def _said(error: CheckpointError | None) -> Sequence[str] | None:
    return None if error is None else [type(error).__name__, str(error)]


def _check_shared(directory: Path) -> None:
    """Raise RunDirError if a process does not see what process 0 has written."""
    if distributed.count() == 1:
        return
    ends = time.monotonic() + _SEEN_S
    path = directory / LOCK
    # A network file system may take a while to show it.
    while not (is_seen := path.exists()) and time.monotonic() < ends:
        time.sleep(0.1)
    blind = [i for i, sees in enumerate(distributed.gather(is_seen, "run directory")) if not sees]
    if blind:
        raise RunDirError(
            f"process {', '.join(map(str, blind))} does not see what process 0 writes in "
            f"{directory}: pass `Checkpoint` a directory on a file system that all hosts share."
        )


def _on_host(items: Arrays) -> Arrays:
    leaves, treedef = jax.tree.flatten(items)
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    # A copy: on the CPU backend a view would be overwritten by the next, donated, step.
    return jax.tree.unflatten(treedef, [np.array(leaf) for leaf in leaves])


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} failed: {error}") from error
