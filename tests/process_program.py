"""A program for `test_processes`: trains in as many processes as it is started in."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import grain
import jax

from jaxtrainer import distributed
from jaxtrainer.callbacks import Checkpoint
from tests import tiny
from tests.cluster import say


def digest(arrays: Any) -> str:
    """One digest of all arrays of a dict, by name."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


def loader_of(kind: str) -> Any:
    """The same samples in the same order: from arrays, by Grain, or as a list."""
    if kind == "arrays":
        return tiny.make_loader(rows=128, size=16)
    if kind == "grain":
        arrays = tiny.make_arrays(128)
        records = grain.MapDataset.range(128).shuffle(seed=3)
        return records.map(lambda i: {k: a[i] for k, a in arrays.items()}).batch(16)
    return tiny.make_batches(num=8, size=16)


def fit(*callbacks: Any, kind: str = "arrays", ckpt_path: Any = None, **options: Any) -> Any:
    """Train, and say what came out."""
    trainer = tiny.make_trainer(callbacks, **{"mesh": {"data": -1}, "max_epochs": 2, **options})
    module = tiny.Tiny()
    try:
        result = trainer.fit(module, loader_of(kind), tiny.make_batches(2, 16), ckpt_path=ckpt_path)
    finally:
        say(step=module.run.global_step, reason=module.run.stop_reason)
    say(params=digest(tiny.params_of(module)), losses=result.history["train/loss"].values)
    return result


def train(*kinds: str) -> None:
    for kind in kinds:
        fit(kind=kind)


def save(directory: str, epochs: str, *path: str) -> None:
    result = fit(Checkpoint(directory), max_epochs=int(epochs), ckpt_path=path[0] if path else None)
    say(last=result.last_checkpoint)


if __name__ == "__main__":
    say(index=distributed.index(), count=distributed.count(), devices=jax.device_count())
    globals()[sys.argv[1]](*sys.argv[2:])
