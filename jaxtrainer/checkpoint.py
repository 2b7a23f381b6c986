"""The checkpoint store: a `TrainState` and its JSON record in one directory a step, by Orbax.

Each part of the state is an Orbax item of its own, so that one can be restored without the
others. Shapes, dtypes and shardings come from the program that restores, never from the file,
and nothing read is ever executed. May import levels 0 to 2; Orbax is imported on first use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrainer.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    RunDirError,
)
from jaxtrainer.record import check_record, decode, encode
from jaxtrainer.state import Nested, TrainState, size_of

PREFIX = "step"
RECORD = "record"
ITEMS = ("params", "model_state", "opt_state", "accumulated", "averaged")
_OPTIONAL = {
    "accumulated": "accumulate_grad_batches",
    "averaged": "averaged weights; pass the same EMA or StochasticWeightAveraging, or none",
}
"""Items that not every run has, and what decides it."""

HOST_COPY_BYTES = 1 << 30
"""Size up to which a state is copied to the host before it is written."""

_STEP_DIR = re.compile(rf"{PREFIX}_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds: the device state, and the host's record as JSON data."""

    state: TrainState
    record: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run directory.

    A save copies the arrays to the host and returns; a thread of the store writes them. What is
    too large for a second copy, or not all on this process, Orbax copies and writes itself.

    Args:
        directory: Where; made if missing.
        resumed_step: The step that the run goes on from; None for a fresh run.

    Raises:
        RunDirError: If it cannot be written, or has checkpoints that this run does not go on from.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, resumed_step: int | None = None
    ) -> None:
        self.directory = Path(directory).absolute()
        from_step = -1 if resumed_step is None else resumed_step
        later = [s for s in saved_steps(self.directory) if s > from_step]
        if later:
            raise RunDirError(
                f"{self.directory} already has {len(later)} checkpoint(s) that this run does not "
                f"go on from, the last at step {later[-1]}. Go on from it with "
                "`fit(..., ckpt_path='last')`, or give this run a directory of its own."
            )
        _probe(self.directory)
        ocp = _orbax()
        options = ocp.CheckpointManagerOptions(
            step_prefix=PREFIX, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="jaxtrainer-checkpoint")
        self._write: Future[None] | None = None

    def save(self, step: int, snapshot: Snapshot, replaces: Sequence[int] = ()) -> None:
        """Start saving a step; once it is on disk, the steps that it replaces are deleted.

        Raises:
            CheckpointError: If the save before this one failed.
        """
        self._finish_write()
        items = _items(snapshot.state)
        record = encode({**snapshot.record, "device": _small_arrays(snapshot.state)})
        if _fits_host(items):
            self._write = self._writer.submit(self._save, step, _on_host(items), record, replaces)
        else:
            self._save(step, items, record, replaces)

    def poll(self) -> None:
        """Raise what went wrong with a save that has ended."""
        if self._write is not None and self._write.done():
            self._finish_write()

    def wait(self) -> None:
        """Wait until what was saved is on disk, and raise what went wrong with it."""
        self._finish_write()
        with _failing_as(f"saving in {self.directory}"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and release the directory."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._manager.close()

    def path(self, step: int) -> Path:
        """Return the directory of a step."""
        return self.directory / f"{PREFIX}_{step}"

    def _save(self, step: int, items: Nested, record: Any, replaces: Sequence[int]) -> None:
        ocp = _orbax()
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args[RECORD] = ocp.args.JsonSave(record)
        with _failing_as(f"saving step {step} in {self.directory}"):
            if not self._manager.save(step, args=ocp.args.Composite(**args)):
                raise CheckpointError(f"Orbax refused step {step} in {self.directory}")
            # The one that is replaced goes only when its successor is complete.
            if replaces:
                self._manager.wait_until_finished()
            for old in replaces:
                self._manager.delete(old)

    def _finish_write(self) -> None:
        if self._write is not None:
            write, self._write = self._write, None
            write.result()


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} failed: {error}") from error


def saved_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a run directory, in order."""
    if not directory.is_dir():
        return []
    matches = [_STEP_DIR.fullmatch(entry.name) for entry in directory.iterdir()]
    return sorted(int(m[1]) for m in matches if m)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the step directory that a path means: itself, or the last one of a run directory.

    Raises:
        CheckpointNotFoundError: If there is none, saying what is there instead.
    """
    given = Path(path).absolute()
    if _STEP_DIR.fullmatch(given.name) and (given / RECORD).is_dir():
        return given
    if steps := saved_steps(given):
        return given / f"{PREFIX}_{steps[-1]}"
    parent = given if given.is_dir() else given.parent
    there = sorted(p.name for p in parent.iterdir())[:8] if parent.is_dir() else []
    raise CheckpointNotFoundError(
        f"no checkpoint at {given}; {parent} has {', '.join(there) or 'nothing'}. Pass a run "
        f"directory, or one of its `{PREFIX}_N` directories."
    )


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON record of a checkpoint.

    Raises:
        CheckpointError: If it is damaged, or of a newer format.
    """
    ocp = _orbax()
    args = ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()})
    with _failing_as(f"reading the record of {path}"), _reader() as reader:
        record = decode(reader.restore(path, args=args)[RECORD])
    return check_record(record, str(path))


def restore_state(path: Path, target: TrainState) -> TrainState:
    """Return the state of a checkpoint, placed as the target says.

    Args:
        path: A step directory.
        target: Tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        CheckpointMismatchError: If trees, shapes or dtypes differ, with every difference.
        CheckpointError: If the files are damaged.
    """
    items = restore_items(path, _items(target))
    return target._replace(**items, **_restore_small(read_record(path)["device"], target))


def check_state(path: Path, target: TrainState) -> None:
    """Compare a checkpoint with the state that is to be restored; reads no array.

    Raises:
        CheckpointMismatchError: If trees, shapes or dtypes differ, with every difference.
    """
    _compare(path, {name: getattr(target, name) for name in ITEMS})
    saved = read_record(path)["device"]
    if len(saved["totals"][0]) != target.totals.shape[1]:
        raise CheckpointMismatchError(
            f"{path} was saved with {len(saved['totals'][0])} logged metrics, now there are "
            f"{target.totals.shape[1]}: the epoch's totals would be mixed up. Log the same names."
        )


def restore_items(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return some items of a checkpoint, e.g. `{"params": ..., "model_state": ...}`.

    Arguments and errors as in `restore_state`.
    """
    ocp = _orbax()
    _compare(path, wanted)
    wanted = {name: item for name, item in wanted.items() if jax.tree.leaves(item)}
    args = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
    with _failing_as(f"reading {path}"), _reader() as reader:
        return dict(reader.restore(path, args=ocp.args.Composite(**args)).items())


def saved_names(path: Path, item: str) -> list[str]:
    """Return the names of the arrays in an item of a checkpoint; none if it has no such item."""
    with _failing_as(f"reading {path}"), _reader() as reader:
        return [*_table(reader.metadata(path).item_metadata.get(item))]


def _items(state: TrainState) -> Nested:
    # Orbax refuses an empty item; what is empty now is empty when restored, too.
    items = {name: getattr(state, name) for name in ITEMS}
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def _small_arrays(state: TrainState) -> dict[str, Any]:
    return {
        "batch_count": int(state.batch_count),
        "rng": np.asarray(state.rng).tolist(),
        "totals": np.asarray(state.totals).tolist(),
    }


def _restore_small(saved: Mapping[str, Any], target: TrainState) -> dict[str, Any]:
    totals = np.array(saved["totals"], np.float32).reshape(target.totals.shape)
    arrays = {
        "batch_count": np.int32(saved["batch_count"]),
        "rng": np.array(saved["rng"], np.uint32),
        "totals": totals,
    }
    return {k: jax.device_put(v, getattr(target, k).sharding) for k, v in arrays.items()}


def _fits_host(items: Nested) -> bool:
    return size_of(items)[1] <= HOST_COPY_BYTES and all(
        x.is_fully_addressable for x in jax.tree.leaves(items)
    )


def _on_host(items: Nested) -> Nested:
    leaves, treedef = jax.tree.flatten(items)
    for leaf in leaves:
        leaf.copy_to_host_async()
    # A copy: on the CPU backend a view would be overwritten by the next, donated, step.
    return jax.tree.unflatten(treedef, [np.array(leaf) for leaf in leaves])


def _compare(path: Path, wanted: Mapping[str, Any]) -> None:
    lines: list[str] = []
    with _failing_as(f"reading {path}"), _reader() as reader:
        found = reader.metadata(path).item_metadata
    for name, item in wanted.items():
        saved, here = _table(found.get(name)), _table(item)
        if name in _OPTIONAL and bool(saved) != bool(here):
            lines.append(f"{name}: saved {'with' if saved else 'without'} {_OPTIONAL[name]}")
        else:
            lines += _differences(name, saved, here)
    if lines:
        raise CheckpointMismatchError(
            f"{path} was saved by another model or optimiser:\n  " + "\n  ".join(lines)
        )


def _differences(item: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    lines = [
        f"{item}/{k}: saved as {saved[k]}, not in this model" for k in saved if k not in wanted
    ]
    lines += [f"{item}/{k}: {wanted[k]} here, not saved" for k in wanted if k not in saved]
    both = [k for k in wanted if k in saved and saved[k] != wanted[k]]
    return lines + [f"{item}/{k}: saved as {saved[k]}, here {wanted[k]}" for k in both]


def _table(tree: Any) -> dict[str, str]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _describe(leaf)
        for path, leaf in flat
    }


def _describe(leaf: Any) -> str:
    shape = ", ".join(map(str, leaf.shape))
    return f"{leaf.dtype}[{shape}]"


def _probe(directory: Path) -> None:
    probe = directory / f".write_probe_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise RunDirError(
            f"cannot write in {directory} ({error}); pass `Checkpoint` a directory that can be "
            "written, or made."
        ) from error


def _reader() -> Any:
    ocp = _orbax()
    handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
    handlers[RECORD] = ocp.JsonCheckpointHandler()
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    return ocp
