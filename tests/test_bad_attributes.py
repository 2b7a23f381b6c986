"""Attributes of module and model that change where the compiled step would not see it."""

from __future__ import annotations

import types
from typing import Any

import pytest
from flax import nnx

from jaxtrainer import Callback, Run
from jaxtrainer.errors import AttributeChangedError, StepError
from tests import tiny
from tests.bad_input import IN_TRAINING, doing, loss_of, module_with, refused


def keep(self, model, batch):
    self.last = loss_of(model, batch)


@pytest.mark.parametrize(
    ("act", "part"),
    [
        (keep, "Mine.last was set inside a traced step"),
        (lambda s, m, b: setattr(s, "make", None), "Mine.make was set inside a traced step"),
        (lambda s, m, b: delattr(s, "make"), "Mine.make was set inside a traced step"),
        (lambda s, m, b: s.losses.append(b["x"].sum()), "Mine.losses was changed inside a traced"),
        (lambda s, m, b: s.losses.append(1), "Mine.losses was changed inside a traced step"),
        (lambda s, m, b: s.counts.update(steps=1), "Mine.counts was changed inside a traced step"),
        (lambda s, m, b: setattr(s.box, "x", b["x"]), "Mine.box was changed inside a traced step"),
        (lambda s, m, b: vars(s).update(x=b["x"]), "Mine.x was changed inside a traced step"),
    ],
    ids=["new", "set", "deleted", "list", "list-number", "dict", "object", "vars"],
)
def test_module_attribute_changed_while_tracing_is_refused(act, part):
    module = doing(act)
    module.losses, module.counts, module.box = [], {"steps": 0}, types.SimpleNamespace()
    refused(AttributeChangedError, part, "self.log(", IN_TRAINING, module=module)


@pytest.mark.parametrize(
    ("act", "part"),
    [
        (lambda s, m, b: setattr(m, "calls", 1), "attribute `calls` while tracing"),
        (lambda s, m, b: setattr(m, "hidden", m(b["x"])), "attribute `hidden` while tracing"),
        (lambda s, m, b: setattr(m, "extra", nnx.Variable(b["x"])), "added or removed model var"),
        (lambda s, m, b: setattr(m, "extra", nnx.Param(b["x"])), "variables: extra"),
        (lambda s, m, b: delattr(m, "bias"), "variables: bias"),
        (lambda s, m, b: m.bias.set_value(m.bias + 1), "assigned to the parameters bias"),
    ],
    ids=["number", "array", "variable", "param", "deleted", "assigned"],
)
def test_model_changed_while_tracing_is_refused(act, part):
    refused(StepError, "Mine.training_step", part, module=doing(act))


@pytest.mark.parametrize(
    ("name", "part"), [("model", "the step gets as an argument"), ("run", "an Optax schedule")]
)
def test_step_that_reads_what_lives_on_the_host_is_refused(name, part):
    module = doing(lambda self, model, batch: getattr(self, name))
    refused(StepError, f"Mine.{name} was read in a traced step", part, module=module)


def scaled_step(self, model, batch):
    factor = self.scale * getattr(self, "warm_up", 1.0) * self.factors[0] * self.table["scale"]
    return loss_of(model, batch) * factor


CHANGES = {
    "scale": lambda module: setattr(module, "scale", 0.5),
    "warm_up": lambda module: setattr(module, "warm_up", 0.5),
    "factors": lambda module: module.factors.append(2.0),
    "table": lambda module: module.table.update(scale=0.5),
}


def scaled_module(**members: Any) -> Any:
    module = module_with(training_step=scaled_step, scale=2.0, **members)
    module.factors, module.table = [1.0], {"scale": 1.0}
    return module


@pytest.mark.parametrize("name", CHANGES)
def test_attribute_that_the_step_reads_cannot_be_changed_by_a_hook(name):
    module = scaled_module(on_train_epoch_end=lambda self, run: CHANGES[name](self))
    parts = (f"Mine.{name} was changed, but the compiled step has read it", "Optax schedule")
    refused(AttributeChangedError, *parts, module=module, compiled=["train step"])


class SetsScale(Callback):
    def __init__(self, module: Any, value: float) -> None:
        self.module = module
        self.value = value

    def on_train_epoch_end(self, run: Run) -> None:
        self.module.scale = self.value


def test_attribute_that_the_step_reads_cannot_be_changed_by_a_callback():
    module = scaled_module()
    callbacks = [SetsScale(module, 0.5)]
    parts = {"module": module, "callbacks": callbacks, "compiled": ["train step"]}
    refused(AttributeChangedError, "Mine.scale was changed", **parts)


def test_attribute_may_be_set_to_the_value_it_has():
    module = scaled_module()
    tiny.fit(tiny.make_batches(3), module=module, callbacks=[SetsScale(module, 2.0)], max_epochs=1)
    assert module.scale == 2.0
