"""What the tests of bad input share: a small module to break, and a look at how a call fails."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterable
from typing import Any

import pytest

from jaxtrainer import Callback, Run, TrainModule
from tests import tiny

IN_TRAINING = "while tracing Mine.training_step on a batch of label: int32[8], x: float32[8, 4]"


class Compilations(Callback):
    """Names of the programs that a call has begun to compile."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_compile_start(self, run: Run, name: str) -> None:
        self.names.append(name)


def module_with(**members: Any) -> TrainModule:
    """A linear classifier called `Mine`, with some of its methods or attributes replaced."""
    return type("Mine", (tiny.Tiny,), members)(make=tiny.line)


def loss_of(model: Any, batch: Any) -> Any:
    return (model(batch["x"]) ** 2).mean()


def doing(act: Any) -> Any:
    """A module whose training step calls `act(self, model, batch)`, and returns the loss."""

    def training_step(self, model, batch):
        loss = loss_of(model, batch)
        act(self, model, batch)
        return loss

    return module_with(training_step=training_step)


def refused(
    kind: type[Exception],
    *parts: str,
    module: Any = None,
    loader: Any = None,
    val_loader: Any = None,
    stage: str = "fit",
    callbacks: Iterable[Callback] = (),
    ckpt_path: Any = None,
    compiled: Iterable[str] = (),
    **options: Any,
) -> Exception:
    """Make a call that must raise exactly that error, and return it.

    Args:
        kind: The error.
        parts: What its message and notes must say.
        module: What to train; None for one that is right.
        loader: Likewise.
        val_loader: Likewise.
        stage: Method of the trainer to call.
        callbacks: Callbacks of the trainer.
        ckpt_path: As in `fit`.
        compiled: Programs that may be compiled before it is found: none, where possible.
        options: Options of the trainer.
    """
    seen = Compilations()
    trainer = tiny.make_trainer([seen, *callbacks], **{"max_epochs": 2, **options})
    module = module_with() if module is None else module
    loader = tiny.make_batches(3) if loader is None else loader
    loaders = (loader, val_loader) if stage == "fit" else (loader,)
    with pytest.raises(kind) as caught:
        getattr(trainer, stage)(module, *loaders, ckpt_path=ckpt_path)
    assert type(caught.value) is kind
    assert seen.names == list(compiled)
    assert not own_threads()
    assert_says(caught.value, *parts)
    return caught.value


def assert_says(error: BaseException, *parts: str) -> None:
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in:\n{text}"


def own_threads() -> list[str]:
    """Names of the package's threads that are still alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith("jaxtrainer")]


def frames_of(error: BaseException) -> list[str]:
    """Where the error went through, outermost first, as `file:function`."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}" for frame in frames]
