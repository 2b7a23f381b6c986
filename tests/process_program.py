"""A program for `test_processes`: trains in as many processes as it is started in."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import grain
import jax
import optax
from flax import nnx

from jaxtrainer import Callback, Every, Run, distributed
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.errors import CheckpointError
from jaxtrainer.manifest import on_host
from jaxtrainer.rundir import saved_steps
from jaxtrainer.state import flat_items
from jaxtrainer.store import CheckpointStore
from tests import divided, tiny
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


class Watch(Callback):
    """Counts the programs that are compiled, and keeps what the run has told the user."""

    may_log = False

    def __init__(self) -> None:
        self.compiled = 0
        self.run: Run | None = None

    def setup(self, run: Run) -> None:
        self.run = run

    def on_compile_start(self, run: Run, name: str) -> None:
        self.compiled += 1


def fit(
    *callbacks: Any, kind: str = "arrays", ckpt_path: Any = None, module: Any = None, **options: Any
) -> Any:
    """Train, and say what came out."""
    watch, options = Watch(), {"mesh": {"data": -1}, "max_epochs": 2, **options}
    trainer = tiny.make_trainer([*callbacks, watch], **options)
    module = module or tiny.Tiny()
    try:
        result = trainer.fit(module, loader_of(kind), tiny.make_batches(2, 16), ckpt_path=ckpt_path)
    finally:
        say(step=module.run.global_step, reason=module.run.stop_reason, compiled=watch.compiled)
    say(params=digest(tiny.params_of(module)), losses=result.history["train/loss"].values)
    say(dispatch=" ".join(x for x in module.run.notices if "a dispatch" in x))
    say(resumed=module.run.resumed_step)
    return result


def train(*kinds: str) -> None:
    for kind in kinds:
        fit(kind=kind)


def save(directory: str, epochs: str, option: str = "") -> None:
    saver = Checkpoint(directory, save_top_k=-1 if option == "--keep-all" else 1)
    path = option if option == "last" else None
    result = fit(saver, max_epochs=int(epochs), ckpt_path=path)
    say(last=result.last_checkpoint)


def share(directory: str, epochs: str, mesh: str, path: str = "") -> None:
    """Train a model whose parameters, and what follows them, are divided over all devices."""
    saver, module = Checkpoint(directory), divided.Classify("mlp", optax.adam(1e-2))
    options = {**divided.options_for("mlp", mesh), "max_epochs": int(epochs)}
    trainer = tiny.make_trainer([saver], **options)
    batches = divided.batches()
    result = trainer.fit(module, batches, batches[:2], ckpt_path=path or None)
    params = nnx.to_pure_dict(nnx.state(module.model, nnx.Param))
    whole = {name: on_host(x) for name, x in flat_items(params)}
    say(params=digest(whole), parts=[not x.is_fully_replicated for _, x in flat_items(params)])
    say(resumed=module.run.resumed_step, losses=result.history["train/loss"].values)
    say(tested=trainer.validate(module, batches[:2], ckpt_path="last", verbose=False))


def unsaved(directory: str) -> None:
    """Have no room for the second checkpoint, on the process that writes it."""
    saver = Checkpoint(directory, every_n_train_steps=2)
    write = CheckpointStore._save_once

    def fails(store: Any, step: int, *args: Any) -> None:
        if step > 2:
            raise CheckpointError("no more room")
        write(store, step, *args)

    setattr(CheckpointStore, "_save_once", fails)  # noqa: B010
    fit(saver, Slow(), steps_per_dispatch=1)


def use() -> None:
    """Use the trained model on one process, and then on the other."""
    module = tiny.Tiny()
    fit(module=module)
    if distributed.is_first():
        module.model(tiny.make_arrays(16)["x"])
    distributed.barrier("one after the other")
    say(logits=list(module.model(tiny.make_arrays(16)["x"]).shape))
    fit(module=module)


class Slow(Callback):
    """Takes a while for each batch, a bit longer on some processes, and says when it has begun."""

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.total_batches == 4:
            print("PHASE training", flush=True)
        time.sleep(0.02 * (1 + distributed.index()))


class Stops(Callback):
    """Asks to stop, on one process only, or on all."""

    def __init__(self, on: str) -> None:
        self.on = on

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.total_batches == 5 and self.on in ("all", str(distributed.index())):
            run.stop("enough")


def interrupted(directory: str) -> None:
    options: Any = {"max_epochs": 1000, "steps_per_dispatch": 1}
    fit(Slow(), Checkpoint(directory, every_n_train_steps=10_000), **options)


def stopped(on: str) -> None:
    fit(Stops(on), steps_per_dispatch=1)


def limited(directory: str) -> None:
    """Stop, validate and save by the clock; that of process 1 is far ahead."""
    ahead_s = 1e6 * distributed.index()
    saver = Checkpoint(directory, train_time_interval=0.2, save_top_k=-1)
    options = {"max_time": 6.0, "val_check_interval": Every(minutes=0.3 / 60), "max_epochs": 1000}
    clock = lambda: time.monotonic() * (1 + ahead_s)  # noqa: E731
    result = fit(Slow(), saver, steps_per_dispatch=1, clock=clock, **options)
    say(validated=result.history.epoch["val/loss"].steps, saved=saved_steps(Path(directory)))


def automatic(directory: str) -> None:
    """Choose the number of steps a dispatch by measurement."""
    fit(steps_per_dispatch="auto", compilation_cache=directory)


class Different(tiny.Tiny):
    def __init__(self, hidden: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.hidden = hidden
        self._scale = scale

    def training_step(self, model: Any, batch: Any) -> Any:
        outputs = super().training_step(model, batch)
        return {**outputs, "loss": outputs["loss"] * self._scale}


def differing(what: str) -> None:
    """Be started with something else on process 1."""
    is_other = distributed.index() == 1
    own = is_other and what
    module = Different(9 if own == "hidden" else 8, 2.0 if own == "step" else 1.0)
    callbacks = [tiny.Probe(), *([Stops("none")] if own == "callbacks" else [])]
    fit(*callbacks, module=module, seed=int(own == "seed"))


if __name__ == "__main__":
    say(index=distributed.index(), count=distributed.count(), devices=jax.device_count())
    globals()[sys.argv[1]](*sys.argv[2:])
