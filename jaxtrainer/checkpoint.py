"""The checkpoint store: a `TrainState` and its JSON record in one directory a step, by Orbax.

Each part of the state is an Orbax item of its own, so that one can be restored without the
others. Shapes, dtypes and shardings come from the program that restores, never from the file,
and nothing read is ever executed. May import levels 0 to 2; Orbax is imported on first use.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrainer.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    RunDirError,
)
from jaxtrainer.state import TrainState

FORMAT_VERSION = 1
PREFIX = "step"
RECORD = "record"
ITEMS = ("params", "model_state", "opt_state", "accumulated", "loop")
_STEP_DIR = re.compile(rf"{PREFIX}_(\d+)")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds: the device state, and the host's record as JSON data."""

    state: TrainState
    record: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run directory.

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
        later = [s for s in saved_steps(self.directory) if s > (resumed_step or -1)]
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

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Start saving; returns when the arrays are copied from the device.

        Raises:
            CheckpointError: If the store refuses the step, or the save before this one failed.
        """
        ocp = _orbax()
        items = {k: ocp.args.StandardSave(v) for k, v in _items(snapshot.state).items()}
        items[RECORD] = ocp.args.JsonSave(encode(snapshot.record))
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"saving step {step} in {self.directory} failed: {error}") from error
        if not saved:
            raise CheckpointError(
                f"step {step} was not saved in {self.directory}, which has step "
                f"{self._manager.latest_step()} already; give this run a directory of its own."
            )

    def delete(self, step: int) -> None:
        """Remove one checkpoint; a failure to do so is no error."""
        try:
            self._manager.delete(step)
        except OSError as error:
            raise CheckpointError(f"could not delete step {step}: {error}") from error

    def wait(self) -> None:
        """Wait until what was saved is on disk, and raise what went wrong with it."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"saving in {self.directory} failed: {error}") from error

    def close(self) -> None:
        """Wait and release the directory."""
        self.wait()
        self._manager.close()

    def path(self, step: int) -> Path:
        """Return the directory of a step."""
        return self.directory / f"{PREFIX}_{step}"


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
    try:
        with _reader() as reader:
            args = ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()})
            record = decode(reader.restore(path, args=args)[RECORD])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the record of {path} cannot be read: {error}") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}; this version of jaxtrainer reads up to "
            f"{FORMAT_VERSION}. Upgrade it to go on from there."
        )
    return record


def restore_state(path: Path, target: TrainState) -> TrainState:
    """Return the state of a checkpoint, placed as the target says.

    Args:
        path: A step directory.
        target: Tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        CheckpointMismatchError: If trees, shapes or dtypes differ, with every difference.
        CheckpointError: If the files are damaged.
    """
    return _state(restore_items(path, _items(target)), target)


def restore_items(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return some items of a checkpoint, e.g. `{"params": ..., "model_state": ...}`.

    Arguments and errors as in `restore_state`.
    """
    ocp = _orbax()
    wanted = {name: item for name, item in wanted.items() if jax.tree.leaves(item)}
    _compare(path, wanted)
    args = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
    with _reader() as reader:
        try:
            return dict(reader.restore(path, args=ocp.args.Composite(**args)).items())
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def base_record() -> dict[str, Any]:
    """Return the start of a record: format and library versions."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return {"format_version": FORMAT_VERSION, "versions": versions}


def _items(state: TrainState) -> dict[str, Any]:
    # Orbax refuses an empty item; what is empty now is empty when restored, too.
    items = {
        "params": state.params,
        "model_state": state.model_state,
        "opt_state": state.opt_state,
        "accumulated": state.accumulated,
        "loop": {"batch_count": state.batch_count, "rng": state.rng, "totals": state.totals},
    }
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def _state(items: Mapping[str, Any], target: TrainState) -> TrainState:
    fields = {k: v for k, v in items.items() if k != "loop"}
    return target._replace(**fields, **items["loop"])


def _compare(path: Path, wanted: Mapping[str, Any]) -> None:
    lines: list[str] = []
    with _reader() as reader:
        try:
            found = reader.metadata(path).item_metadata
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name, item in wanted.items():
        saved = found.get(name)
        if saved is None:
            lines.append(f"{name}: not in the checkpoint")
        else:
            lines += _differences(name, _table(saved), _table(item))
    if lines:
        raise CheckpointMismatchError(
            f"{path} was saved by another model or optimiser:\n  " + "\n  ".join(lines)
        )


def _differences(item: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    lines = [f"{item}/{k}: saved as {saved[k]}, not in this model" for k in saved if k not in wanted]
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
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # Orbax keeps a typed key as its words.
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    shape = ", ".join(map(str, leaf.shape))
    return f"{leaf.dtype}[{shape}]"


def encode(value: Any) -> Any:
    """Return JSON data; numbers that JSON lacks become `{"float": "nan"}`.

    Raises:
        CheckpointError: For a value that is no JSON data, naming it.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise CheckpointError(
        f"a checkpoint record holds JSON data; got {type(value).__name__}: {value!r}. "
        "Return numbers, strings, lists and dicts from `state_dict`."
    )


def decode(value: Any) -> Any:
    """Undo `encode`."""
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        if set(value) == {"bytes"}:
            return bytes.fromhex(value["bytes"])
        return {k: decode(v) for k, v in value.items()}
    return [decode(v) for v in value] if isinstance(value, list) else value


def _probe(directory: Path) -> None:
    probe = directory / f".write_probe_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise RunDirError(f"cannot write in {directory}: {error}") from error


def _reader() -> Any:
    ocp = _orbax()
    handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
    handlers[RECORD] = ocp.JsonCheckpointHandler()
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    return ocp
