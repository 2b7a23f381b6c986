"""A program for `test_processes`: trains in as many processes as it is started in."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import jax

from jaxtrainer import distributed
from tests import tiny
from tests.cluster import say


def digest(arrays: Any) -> str:
    """One digest of all arrays of a dict, by name."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


def train(*args: str) -> None:
    trainer = tiny.make_trainer(mesh={"data": -1}, max_epochs=2)
    module = tiny.Tiny()
    result = trainer.fit(module, tiny.make_loader(rows=128, size=16))
    say(params=digest(tiny.params_of(module)), step=result.num_steps)
    say(loss=result.history["train/loss"].values)


if __name__ == "__main__":
    say(index=distributed.index(), count=distributed.count(), devices=jax.device_count())
    globals()[sys.argv[1]](*sys.argv[2:])
