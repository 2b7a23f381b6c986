"""One compilation a stage, and none that is hidden in an eager operation of the loop.

JAX itself reports what its backend compiles, so that a compilation nobody announced is seen too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Accuracy, Checkpoint, Timer
from tests import tiny

BACKEND_EVENT = "/jax/core/compile/backend_compile_duration"
TRAIN, WHOLE, RAGGED = "train step", "validate step", "validate step for the last 3 rows"


class Log(Callback):
    """Backend compilations, announcements and epochs, in the order in which they happened."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == BACKEND_EVENT:
            self.events.append(("backend", kwargs.get("fun_name")))

    def on_compile_start(self, run: Run, name: str) -> None:
        self.events.append(("announced", name))

    def on_compile_end(self, run: Run, name: str, seconds: float) -> None:
        self.events.append(("done", name))

    def on_train_epoch_start(self, run: Run) -> None:
        self.events.append(("epoch", run.epoch))

    def named(self, kind: str) -> list[Any]:
        return [what for k, what in self.events if k == kind]

    def hidden(self) -> list[Any]:
        """Compilations outside of an announced one."""
        found, depth = [], 0
        for kind, what in self.events:
            depth += {"announced": 1, "done": -1}.get(kind, 0)
            found += [what] if kind == "backend" and not depth else []
        return found

    def after_epoch(self, epoch: int) -> list[Any]:
        """Compilations after an epoch, up to the end of the call."""
        rest = self.events[self.events.index(("epoch", epoch + 1)) :]
        return [what for kind, what in rest if kind == "backend"]


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    jax.monitoring.register_event_duration_secs_listener(log.on_event)
    yield log
    jax.monitoring.unregister_event_duration_listener(log.on_event)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_dispatch": 1},
        {"mesh": {"data": 8}, "num_sanity_val_steps": 2},
        {"accumulate_grad_batches": 3, "val_check_interval": 3},
    ],
    ids=["fused", "single", "eight_devices", "cut_short"],
)
def test_fit_compiles_once_a_stage(log: Log, tmp_path: Path, options: Any):
    callbacks = [log, Accuracy(), Timer(verbose=False), Checkpoint(tmp_path)]
    train, val = tiny.make_batches(8, ragged=3), tiny.make_batches(2, ragged=3)
    tiny.fit(train, val, callbacks=callbacks, max_epochs=3, **options)
    assert log.named("announced") == [TRAIN, WHOLE, RAGGED]
    # The first state is made by a program of its own, compiled beside the training step.
    assert len(log.named("backend")) == 4
    assert log.hidden() == []
    assert log.after_epoch(0) == []


def test_fit_without_ragged_batches_compiles_one_shape(log: Log):
    tiny.fit(tiny.make_batches(8), tiny.make_batches(2), callbacks=[log], max_epochs=2)
    assert log.named("announced") == [TRAIN, WHOLE]
    assert len(log.named("backend")) == 3


def test_fit_compiles_once_for_each_shape_that_is_allowed(log: Log):
    sizes = (8, 8, 4, 6, 4, 8, 6)
    batches = [{k: a[:n] for k, a in tiny.make_arrays().items()} for n in sizes]
    tiny.fit(batches, callbacks=[log], max_epochs=3, max_recompiles=2)
    others = [f"{TRAIN} for label: int32[{n}], x: float32[{n}, 4]" for n in (4, 6)]
    assert log.named("announced") == [TRAIN, *others]
    assert len(log.named("backend")) == 4
    assert log.hidden() == []
    assert log.after_epoch(0) == []


def test_fit_that_measures_compiles_both_forms_of_the_step(log: Log):
    tiny.fit(callbacks=[log], max_epochs=2, steps_per_dispatch="auto")
    assert log.named("announced") == [TRAIN]
    assert len(log.named("backend")) == 3
    assert log.after_epoch(0) == []


@pytest.mark.parametrize("step", [6, 8], ids=["mid_epoch", "epoch_end"])
def test_resumed_run_compiles_what_an_uninterrupted_one_does(log: Log, tmp_path: Path, step: int):
    train, val = tiny.make_batches(8), tiny.make_batches(2, ragged=3)
    tiny.fit(train, val, callbacks=[Checkpoint(tmp_path)], max_steps=step)
    log.events.clear()
    saver = Checkpoint(tmp_path)
    tiny.fit(train, val, callbacks=[log, saver], ckpt_path="last", max_epochs=3)
    assert log.named("announced") == [TRAIN, WHOLE, RAGGED]
    # One less than a fresh run: there is no state to make.
    assert len(log.named("backend")) == 3
    assert log.hidden() == []
    assert log.after_epoch(1) == []


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_evaluation_compiles_once_for_each_shape(log: Log, call: str):
    module, batches = tiny.Tiny(), tiny.make_batches(6, ragged=3)
    tiny.fit(batches, module=module, max_steps=1)
    log.events.clear()
    getattr(tiny.make_trainer(log), call)(module, batches)
    assert len(log.named("announced")) == 2
    assert len(log.named("backend")) == 2
    assert log.hidden() == []


def test_steps_are_traced_once_for_each_shape():
    traced: list[tuple[str, int]] = []

    class Traced(tiny.Tiny):
        def training_step(self, model: Any, batch: Any) -> Any:
            traced.append(("train", len(batch["x"])))
            return super().training_step(model, batch)

        def validation_step(self, model: Any, batch: Any) -> Any:
            traced.append(("validate", len(batch["x"])))
            return super().training_step(model, batch)

    train, val = tiny.make_batches(8, ragged=3), tiny.make_batches(2, ragged=3)
    tiny.fit(train, val, module=Traced(), max_epochs=2)
    assert traced == [("train", 8), ("validate", 8), ("validate", 3)]


def test_log_sees_a_compilation_in_a_hook(log: Log):
    class Eager(Callback):
        def on_train_epoch_end(self, run: Run) -> None:
            jnp.sin(np.zeros(1000 + run.epoch))

    tiny.fit(callbacks=[log, Eager()], max_epochs=2)
    assert log.hidden()
    assert log.after_epoch(0)
