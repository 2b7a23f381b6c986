"""The trainer's side: a workload as a `TrainModule`, and its epochs with all defaults on."""

from __future__ import annotations

import io
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optax
from flax import nnx
from rich.console import Console

from benchmarks.common import Block
from benchmarks.workloads import Batch, Params, Workload
from jaxtrainer import Callback, Run, Trainer, TrainModule, data
from jaxtrainer.callbacks import Accuracy, Checkpoint, ProgressBar, Timer

_CACHE = tempfile.TemporaryDirectory(prefix="jaxtrainer-benchmark-")
"""On by default, so on here too, but empty at first; the later rounds find their programs in it."""


class Net(nnx.Module):
    """The workload's parameters as an NNX model."""

    def __init__(self, params: Params) -> None:
        self.names = tuple(params)
        for name, value in params.items():
            setattr(self, f"p_{name}", nnx.Param(value))

    def params(self) -> Params:
        return {name: getattr(self, f"p_{name}")[...] for name in self.names}


class Module(TrainModule):
    """A workload as a user of the trainer would write it."""

    def __init__(self, workload: Workload, num_logged: int = 0) -> None:
        self.workload = workload
        self.num_logged = num_logged

    def configure_model(self, rngs: nnx.Rngs) -> Net:
        return Net(self.workload.init(rngs.params()))

    def configure_optimizers(self) -> optax.GradientTransformation:
        return self.workload.tx

    def training_step(self, model: Net, batch: Batch) -> dict[str, Any]:
        loss, logits = self.workload.loss(model.params(), batch)
        for i in range(self.num_logged):
            self.log(f"metric{i}", loss * i)
        return {"loss": loss} if logits is None else {"loss": loss, "logits": logits}


class Stamps(Callback):
    """The times at which epochs start; after the last one, the time at which training ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, run: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, run: Any) -> None:
        self.times.append(time.perf_counter())


class Terminal(io.StringIO):
    """A terminal that nobody looks at: the bar is drawn as on a real one, and dropped."""

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return True


def trained(
    workload: Workload,
    epochs: int,
    *,
    checkpoint: bool = True,
    from_host: bool = False,
    num_logged: int = 0,
    callbacks: Sequence[Callback] = (),
    only: Sequence[Callback] | None = None,
    **options: Any,
) -> Block:
    """Train with bar, Timer, Accuracy where there are labels, and a checkpoint an epoch.

    `callbacks` come after these, `only` takes their place.

    An epoch's time goes from its start to the start of the next, with all that callbacks do in
    between. The first is not timed.
    """
    stamps = Stamps()
    with tempfile.TemporaryDirectory() as folder:
        usual = defaults(workload, folder, checkpoint=checkpoint)
        given = [stamps, *(usual if only is None else only), *callbacks]
        options = {**trainer_options(workload), **options}
        trainer = Trainer(max_epochs=epochs + 1, callbacks=given, **options)
        module, source = Module(workload, num_logged), loader(workload, from_host=from_host)
        began = time.perf_counter()
        result = trainer.fit(module, source)
    first, *rest = stamps.times[1:]
    return Block(
        epoch_s=(rest[-1] - first) / epochs,
        first_s=first - began,
        loss=result.history["train/loss"].values[-1],
        steps_per_dispatch=_chosen(module.run, options),
    )


def _chosen(run: Run | None, options: dict[str, Any]) -> str:
    # The trainer says it in a notice only.
    text = "\n".join([] if run is None else run.notices)
    found = re.search(r"(\d+|one) steps? a dispatch", text)
    return found[1].replace("one", "1") if found else str(options["steps_per_dispatch"])


def defaults(workload: Workload, folder: str, *, checkpoint: bool = True) -> list[Callback]:
    screen = Console(file=Terminal(), force_terminal=True, force_interactive=True, width=100)
    callbacks: list[Callback] = [ProgressBar(console=screen), Timer(console=screen)]
    callbacks += [Accuracy()] if workload.has_labels else []
    return [*callbacks, Checkpoint(Path(folder) / "run")] if checkpoint else callbacks


def trainer_options(workload: Workload) -> dict[str, Any]:
    options: dict[str, Any] = {"compilation_cache": _CACHE.name, "steps_per_dispatch": "auto"}
    options |= {"precision": "bf16-mixed"} if workload.bf16 else {}
    limit = {"limit_train_batches": workload.num_batches} if workload.max_batches else {}
    return options | limit


def loader(workload: Workload, *, from_host: bool = False) -> Any:
    return data.from_arrays(
        workload.arrays,
        batch_size=workload.batch_size,
        shuffle=True,
        drop_remainder=True,
        device_transform=workload.prepare,
        device_resident=False if from_host else None,
    )
