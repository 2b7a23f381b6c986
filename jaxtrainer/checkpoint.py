"""What is in a checkpoint, and the way back: a `TrainState` and its JSON record, by Orbax.

Each part of the state is an Orbax item of its own, so that one can be restored without the
others. Shapes, dtypes and shardings come from the program that restores, never from the file,
whose arrays must have the digests of its manifest, and nothing read is ever executed. `store.py`
writes them. May import levels 0 to 2; Orbax is imported on first use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrainer import distributed
from jaxtrainer.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from jaxtrainer.manifest import (
    ARRAYS,
    check_seal,
    damaged,
    described,
    names_in,
    spec_of,
    unseal,
)
from jaxtrainer.places import place
from jaxtrainer.record import check_record, decode
from jaxtrainer.rundir import PREFIX, fetched, has_item, saved_steps, step_of, step_path
from jaxtrainer.sharding import place as put
from jaxtrainer.state import TrainState, flat_items, nest

RECORD = "record"
ITEMS = ("params", "model_state", "opt_state", "accumulated", "averaged", "guard")
_OPTIONAL = {
    "accumulated": "accumulate_grad_batches",
    "averaged": "averaged weights; pass the same EMA or StochasticWeightAveraging, or none",
    "guard": "the counters of a NonFinite, or of precision '16-mixed'; pass the same, or none",
}
"""Items that not every run has, and what decides it."""

Arrays = dict[str, dict[str, Any]]
"""By item the arrays of a tree, each by its name in it."""


@contextmanager
def _reading(path: Path, what: str = "") -> Iterator[None]:
    """Report what fails in here as damage to the checkpoint, unless it is the machine's."""
    failed = f"reading {what}{path} failed"
    try:
        yield
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(f"{failed}: {error}.{_others(path)}") from error
    except CheckpointError:
        raise
    except Exception as error:
        if isinstance(error, PermissionError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise CheckpointError(f"{failed}: {error}") from error
        raise CheckpointCorruptError(f"{failed}: {error}{_others(path)}") from error


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the step directory that a path means: itself, or the last one of a run directory.

    Raises:
        CheckpointNotFoundError: If there is none, saying what is there instead.
    """
    given = place(path)
    if step_of(given.name) is not None and has_item(given, RECORD):
        return given
    if steps := saved_steps(given):
        return step_path(given, steps[-1])
    parent = given if given.is_dir() else given.parent
    there = sorted(p.name for p in parent.iterdir())[:8] if parent.is_dir() else []
    raise CheckpointNotFoundError(
        f"no checkpoint at {given}; {parent} has {', '.join(there) or 'nothing'}. Pass a run "
        f"directory, or one of its `{PREFIX}_N` directories."
    )


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON record of a checkpoint.

    Raises:
        CheckpointCorruptError: If it is damaged.
        CheckpointError: If it is of a newer format.
    """
    with _reading(path, "the record of "):
        # The name that Orbax gives the one file of a JSON item.
        record = check_record(unseal(path / RECORD / "metadata"), str(path))
        check_seal(record)
        return decode(record)


def restore_state(path: Path, target: TrainState) -> TrainState:
    """Return the state of a checkpoint, placed as the target says.

    Args:
        path: A step directory.
        target: Tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        CheckpointMismatchError: If trees, shapes or dtypes differ, with every difference.
        CheckpointCorruptError: If the files are damaged, naming the arrays.
    """
    wanted = {name: getattr(target, name) for name in ITEMS}
    items = restore_items(path, wanted)
    return target._replace(**items, **_restore_small(read_record(path)["device"], target))


def check_state(path: Path, target: TrainState) -> None:
    """Compare a checkpoint with the state that is to be restored; reads no array.

    Raises:
        CheckpointMismatchError: If trees, shapes or dtypes differ, with every difference.
    """
    record = read_record(path)
    _compare(path, record[ARRAYS], {name: named(getattr(target, name)) for name in ITEMS})
    saved = record["device"]
    if len(saved["totals"][0]) != target.totals.shape[1]:
        raise CheckpointMismatchError(
            f"{path} was saved with {len(saved['totals'][0])} logged metrics, now there are "
            f"{target.totals.shape[1]}: the epoch's totals would be mixed up. Log the same names."
        )


def restore_items(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return some items of a checkpoint, e.g. `{"params": ..., "model_state": ...}`.

    Arguments and errors as in `restore_state`.
    """
    arrays = {name: named(item) for name, item in wanted.items()}
    manifest = read_record(path)[ARRAYS]
    _compare(path, manifest, arrays)
    found = _read(path, manifest, {name: flat for name, flat in arrays.items() if flat})
    return {name: _like(wanted[name], flat) for name, flat in found.items()}


def read_arrays(path: Path, items: Sequence[str] = ITEMS) -> Arrays:
    """Return all the arrays of some items as NumPy arrays, by item and name.

    Raises:
        CheckpointCorruptError: If the files are damaged, naming the arrays.
    """
    manifest = read_record(path)[ARRAYS]
    specs = _specs(path, manifest, items)
    return _read(path, manifest, {item: flat for item, flat in specs.items() if flat})


def saved_specs(path: Path, items: Sequence[str]) -> Arrays:
    """Return stand-ins of all the arrays of some items, with their shapes and dtypes."""
    return _specs(path, read_record(path)[ARRAYS], items)


def read_some(path: Path, wanted: Arrays) -> Arrays:
    """Return some arrays of a checkpoint, by item and name.

    Args:
        path: A step directory.
        wanted: For each array what `saved_specs` says, for NumPy, or a `jax.ShapeDtypeStruct` with
            a sharding, of which each device reads its part.

    Raises:
        CheckpointCorruptError: If the files are damaged, naming the arrays.
    """
    manifest = read_record(path)[ARRAYS]
    # Orbax reads an item whole; what nobody asks for goes to the host's memory, and from there.
    specs = _specs(path, manifest, [*wanted])
    found = _read(path, manifest, {item: {**specs[item], **flat} for item, flat in wanted.items()})
    return {item: {name: found[item][name] for name in flat} for item, flat in wanted.items()}


def verify(path: Path) -> None:
    """Read a whole checkpoint, item by item, and raise CheckpointCorruptError if it is damaged."""
    for item in ITEMS:
        read_arrays(path, [item])


def last_whole(directory: Path) -> tuple[Path, dict[int, str]]:
    """Return the last checkpoint of a run directory that is not damaged.

    Returns:
        Its directory, and of the steps after it what is wrong with them.

    Raises:
        CheckpointCorruptError: If all of them are damaged.
    """
    # The first look at the devices is one that all processes take together: reading takes it.
    jax.devices()
    # Of several processes one reads, and says.
    found = _whole_and_damaged(directory) if distributed.is_first() else (None, [])
    step, damaged = distributed.broadcast(found, "last whole checkpoint")
    if step is None:
        raise CheckpointCorruptError("\n".join(text for _, text in damaged))
    return step_path(directory, step), dict(damaged)


def _whole_and_damaged(directory: Path) -> tuple[int | None, list[tuple[int, str]]]:
    found: list[tuple[int, str]] = []
    for step in reversed(saved_steps(directory)):
        try:
            verify(step_path(directory, step))
            return step, found
        except CheckpointCorruptError as error:
            found.append((step, str(error)))
    return None, found


def saved_names(path: Path, item: str) -> list[str]:
    """Return the names of the arrays in an item of a checkpoint; none if it has no such item."""
    return names_in(read_record(path)[ARRAYS], item)


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their names in it, such as `default/0/mu/kernel`."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(leaves) != len(flat):
        twice = ", ".join(leaves)
        raise CheckpointError(f"two arrays of the state have one name, with `/` in it: {twice}")
    return leaves


def _specs(path: Path, manifest: Mapping[str, Any], items: Sequence[str]) -> Arrays:
    with _reading(path):
        return {
            item: {name: spec_of(manifest[f"{item}/{name}"]) for name in names_in(manifest, item)}
            for item in items
        }


def _read(path: Path, manifest: Mapping[str, Any], wanted: Arrays) -> Arrays:
    """Restore arrays by their specs; raise CheckpointCorruptError if they are not what was saved.

    Orbax alone would not see changed bytes, and would cast to the dtypes asked for.
    """
    if not wanted:
        return {}
    ocp = orbax()
    args = {name: ocp.args.StandardRestore(nest(flat)) for name, flat in wanted.items()}
    with _reading(path), fetched(path, wanted) as here, _reader() as reader:
        found = reader.restore(here, args=ocp.args.Composite(**args))
        arrays = {name: dict(flat_items(found[name])) for name in wanted}
    if names := damaged(arrays, manifest):
        raise CheckpointCorruptError(
            f"{path} is damaged: the bytes of {', '.join(names)} are not those that were saved."
            f"{_others(path)}"
        )
    return arrays


def _others(path: Path) -> str:
    steps = [step for step in saved_steps(path.parent) if step != step_of(path.name)]
    if not steps:
        return ""
    return f" There is another: `ckpt_path={str(step_path(path.parent, steps[-1]))!r}`."


def _like(tree: Any, flat: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[name] for name in named(tree)])


def items_of(state: TrainState) -> Arrays:
    """Return the arrays of a state that are Orbax items, by item and name."""
    # Orbax refuses an empty item; what is empty now is empty when restored, too.
    items = {name: named(getattr(state, name)) for name in ITEMS}
    return {name: arrays for name, arrays in items.items() if arrays}


def small_arrays(state: TrainState) -> dict[str, Any]:
    """Return the arrays that are kept in the record, as lists."""
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
    return {k: put(v, getattr(target, k).sharding) for k, v in arrays.items()}


def _compare(path: Path, manifest: Mapping[str, Any], wanted: Arrays) -> None:
    lines: list[str] = []
    for item, arrays in wanted.items():
        saved = {name: described(manifest[f"{item}/{name}"]) for name in names_in(manifest, item)}
        here = {name: _describe(leaf) for name, leaf in arrays.items()}
        if item in _OPTIONAL and bool(saved) != bool(here):
            lines.append(f"{item}: saved {'with' if saved else 'without'} {_OPTIONAL[item]}")
        else:
            lines += _differences(item, saved, here)
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


def _describe(leaf: Any) -> str:
    return described({"dtype": leaf.dtype, "shape": leaf.shape})


def _reader() -> Any:
    ocp, options = orbax(), multiprocessing(is_alone=True)
    handlers = {
        name: ocp.StandardCheckpointHandler(multiprocessing_options=options) for name in ITEMS
    }
    handlers[RECORD] = ocp.JsonCheckpointHandler(multiprocessing_options=options)
    composite = ocp.CompositeOptions(multiprocessing_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=composite, **handlers)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def multiprocessing(*, is_alone: bool) -> Any:
    """Return Orbax's options for this process alone, which waits for no other, or for all.

    By default Orbax waits by a program on all devices, for ever and in whatever thread it is. The
    processes named, it waits at barriers with a time limit.
    """
    here, count = jax.process_index(), jax.process_count()
    return orbax().options.MultiprocessingOptions(
        primary_host=here if is_alone else 0,
        active_processes={here} if is_alone else {*range(count)},
        barrier_sync_key_prefix=f"jaxtrainer{here}" if is_alone else "jaxtrainer",
    )


def orbax() -> Any:
    """Return Orbax, imported now: it takes a second."""
    import orbax.checkpoint as ocp

    return ocp
