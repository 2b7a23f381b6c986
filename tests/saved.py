"""A small state, the store that saves it, and ways to damage what it wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrainer.checkpoint import restore_state
from jaxtrainer.record import base_record
from jaxtrainer.state import TrainState
from jaxtrainer.store import CheckpointStore, Snapshot
from tests import tiny


def make_state(seed: int = 0) -> TrainState:
    """A state with arrays of several dtypes and ranks, one of them a scalar, on one device."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(64, 32)).astype(np.float32)
    state = TrainState(
        batch_count=np.int32(seed),
        params={"net": {"kernel": kernel, "half": jnp.asarray(kernel[0], jnp.bfloat16)}},
        model_state={"norm": {"mean": rng.normal(size=(8,)).astype(np.float32)}},
        opt_state={"default": ({"mu": kernel * 2}, {"count": np.int32(seed)})},
        rng=np.array([1, 2], np.uint32),
        totals=np.zeros((4, 1), np.float32),
        accumulated={},
        averaged={},
        guard={},
    )
    return jax.device_put(state, jax.devices()[0])


def specs(state: TrainState) -> TrainState:
    """What to restore a state into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def snapshot(seed: int) -> Snapshot:
    record = {**base_record(), "user": {"best": float("nan")}, "callbacks": {}}
    return Snapshot(state=make_state(seed), record=record)


def save(folder: Path, *steps: int, **options: Any) -> Path:
    """Save some steps, each with its number as the seed; return the directory of the last."""
    store = CheckpointStore(folder, **options)
    try:
        for step in steps:
            store.save(step, snapshot(step))
    finally:
        store.close()
    return store.path(steps[-1])


def assert_is_step(path: Path, seed: int) -> None:
    """Restore it, and compare every bit."""
    want = make_state(seed)
    restored = restore_state(path, specs(want))
    tiny.assert_same_bits(tiny.host_state(restored), tiny.host_state(want))


def files_of(step: Path) -> list[Path]:
    """Every file of a checkpoint, from its root on."""
    return sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())


def data_files(step: Path) -> list[Path]:
    """The files with the bytes of arrays, and with where they are."""
    return [file for file in files_of(step) if "d" in file.parts]


def array_files(step: Path) -> list[Path]:
    """The files with the bytes of the kernels, of which nothing but a digest sees a flip."""
    return [file for file in data_files(step) if (step / file).stat().st_size > 4096]


def copy_of(step: Path, folder: Path) -> Path:
    """A copy of a checkpoint in a run directory of its own."""
    return Path(shutil.copytree(step, folder / step.name))


def flip(file: Path, seed: int) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    if content:
        where = np.random.default_rng(seed).integers(len(content) * 8)
        content[where // 8] ^= 1 << (where % 8)
        file.write_bytes(content)


def damage(step: Path) -> None:
    """Flip bits in the second half of all files that arrays are in."""
    for name in data_files(step):
        content = bytearray((step / name).read_bytes())
        content[len(content) // 2 :] = bytes(b ^ 1 for b in content[len(content) // 2 :])
        (step / name).write_bytes(content)


def cut(file: Path, size: int) -> None:
    """Keep that many bytes."""
    file.write_bytes(file.read_bytes()[:size])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncate": lambda file: cut(file, file.stat().st_size // 2),
    "shorten": lambda file: cut(file, file.stat().st_size - 1),
    "empty": lambda file: cut(file, 0),
    "delete": Path.unlink,
}
