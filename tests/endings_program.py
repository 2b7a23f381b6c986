"""A program for `test_process_endings`: trains in several processes until something ends it.

It prints `PHASE training` where a signal may come.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtrainer import Run, Trainer, data, distributed, load_params
from jaxtrainer.callbacks import Checkpoint, NonFinite, TerminateOnNaN
from jaxtrainer.errors import NonFiniteError
from jaxtrainer.manifest import on_host
from jaxtrainer.rundir import saved_steps
from jaxtrainer.state import flat_items
from tests import divided, tiny
from tests.cluster import say
from tests.process_program import Slow, digest

BAD = 5
"""The batch that has a row of NaN."""


def batches(*, are_good: bool) -> list[dict[str, np.ndarray]]:
    found = tiny.make_batches(num=8, size=16)
    if not are_good:
        found[BAD]["x"][3] = np.nan
    return found


def fit(*callbacks: Any, loader: Any = None, ckpt_path: Any = None, **options: Any) -> Run:
    """Train, and say where it ended."""
    given = {"mesh": {"data": -1}, "steps_per_dispatch": 1, "max_epochs": 2, **options}
    trainer, module = tiny.make_trainer([*callbacks], **given), tiny.Tiny()
    loader = batches(are_good=True) if loader is None else loader
    try:
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    finally:
        say(step=module.run.global_step, reason=module.run.stop_reason)
    say(params=digest(tiny.params_of(module)))
    return module.run


def goes_on(directory: str, steps: str) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    last = "last" if saved_steps(Path(directory)) else None
    saver = Checkpoint(directory, every_n_train_steps=10_000)
    fit(Slow(), saver, ckpt_path=last, max_steps=int(steps), max_epochs=None)


def waits(directory: str) -> None:
    """Be in the middle of setting up, where nothing is trained yet."""

    class Waiting(Slow):
        def setup(self, run: Run) -> None:
            print("PHASE training", flush=True)
            time.sleep(60)

    fit(Waiting(), Checkpoint(directory))


def not_finite(directory: str, kind: str, good: str = "") -> None:
    """Come across a batch that is not finite; with `good` go on without one."""
    where = Path(directory)
    guard = {
        "raise": NonFinite(dirpath=where / "report"),
        "parts": NonFinite(dirpath=where / "report"),
        "restore": NonFinite("restore", dirpath=None),
        "stop": TerminateOnNaN(),
    }[kind]
    saver = Checkpoint(where / "run", every_n_train_steps=2)
    loader = batches(are_good=bool(good))
    if kind == "parts":
        # Of each batch a process has its rows only.
        loader = divided_rows(loader)
    last = "last" if (where / "run").exists() else None
    try:
        fit(guard, saver, loader=loader, ckpt_path=last, log_every_n_steps=1)
    except NonFiniteError as error:
        say(told=str(error), notes=error.__notes__)
        raise


def divided_rows(loader: list[dict[str, np.ndarray]]) -> Any:
    each = 16 // distributed.count()
    rows = slice(distributed.index() * each, (distributed.index() + 1) * each)
    return data.process_local([{k: a[rows] for k, a in batch.items()} for batch in loader])


def loads(directory: str) -> None:
    """Start from the weights of another run, in parts over all processes."""
    module = divided.Classify()
    options = {"mesh": {"fsdp": -1}, "sharding": "fsdp", "max_epochs": 1}
    trainer: Trainer = tiny.make_trainer(**options)
    load_params(module, directory, trainer=trainer, verbose=False)
    say(parts=len(module.model.up.kernel[...].sharding.device_set))
    trainer.fit(module, divided.batches())
    params = {n: x for n, x in flat_items(divided_params(module))}
    say(params=digest(params))


def divided_params(module: Any) -> Any:
    return jax.tree.map(on_host, nnx.to_pure_dict(nnx.state(module.model, nnx.Param)))


def saves(directory: str, epochs: str, mesh: str = "data", path: str = "") -> None:
    """Save into a directory, which may be a URL, and say what was trained."""
    module = divided.Classify()
    options = {"mesh": {mesh: -1}, "max_epochs": int(epochs)}
    trainer = tiny.make_trainer([Checkpoint(directory, save_top_k=-1)], **options)
    trainer.fit(module, divided.batches(), ckpt_path=path or None)
    say(params=digest(dict(flat_items(divided_params(module)))), resumed=module.run.resumed_step)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
