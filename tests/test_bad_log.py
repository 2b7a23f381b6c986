"""What `log` cannot record, and where it cannot be called."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax import lax

from jaxtrainer.callbacks import Accuracy
from jaxtrainer.errors import LogError, OptionError, StepError
from tests.bad_input import IN_TRAINING, doing, frames_of, loss_of, module_with, refused


@pytest.mark.parametrize(
    ("act", "part"),
    [
        (lambda s, m, b: s.log("a", m(b["x"])), "shape (8, 3); it records scalars: `log('a', jnp"),
        (lambda s, m, b: s.log("a", None), "value of type NoneType; pass a scalar"),
        (lambda s, m, b: s.log("a", "high"), "value of type str; pass a scalar"),
        (lambda s, m, b: s.log("a", 1j), "complex value"),
        (lambda s, m, b: s.log(7, 1.0), "got the name 7; pass a string"),
        (lambda s, m, b: s.log("a", 1.0, reduce="avg"), "use 'mean', 'sum', 'min' or 'max'"),
        (lambda s, m, b: s.log("a", 1.0, weight=b["x"]), "a weight of shape (8, 4)"),
        (lambda s, m, b: [s.log("a", 1.0), s.log("train/a", 2.0)], "the series 'train/a' twice"),
        (lambda s, m, b: s.log_dict({"a": b["x"]}), "shape (8, 4)"),
    ],
)
def test_log_refuses_what_it_cannot_record(act, part):
    refused(LogError, part, IN_TRAINING, module=doing(act))


def test_log_refuses_the_name_that_a_callback_uses():
    def training_step(self, model, batch):
        self.log("accuracy", 0.5)
        return {"loss": loss_of(model, batch), "logits": model(batch["x"])}

    module, parts = module_with(training_step=training_step), ("twice", "`Accuracy(name=...)`")
    refused(LogError, *parts, module=module, callbacks=[Accuracy()])


def logging(self) -> Any:
    def fn(x):
        self.log("a", x.sum())
        return x.sum()

    return fn


NESTED = {
    "grad": lambda s, x: jax.grad(logging(s))(x),
    "vmap": lambda s, x: jax.vmap(logging(s))(x),
    "jit": lambda s, x: jax.jit(logging(s))(x),
    "remat": lambda s, x: jax.checkpoint(logging(s))(x),
    "scan": lambda s, x: lax.scan(lambda c, row: (c, logging(s)(row)), 0.0, x),
    "fori_loop": lambda s, x: lax.fori_loop(0, 3, lambda i, x: x + logging(s)(x), x),
    "cond": lambda s, x: lax.cond(x.sum() > 0, logging(s), logging(s), x),
}


@pytest.mark.parametrize("transform", NESTED.values(), ids=NESTED.keys())
def test_log_refuses_to_run_in_a_nested_transform(transform):
    module = doing(lambda self, model, batch: transform(self, batch["x"]))
    error = refused(LogError, "inside a nested transform", "log it outside", module=module)
    assert "test_bad_log.py:fn" in frames_of(error)[-5:]


def test_value_kept_from_a_scan_is_refused():
    def act(self, model, batch):
        kept: list[Any] = []
        lax.scan(lambda c, row: (c, kept.append(row.sum())), 0.0, batch["x"])
        self.log("kept", kept[0])

    refused(
        StepError, "do not live any more (float32[])", "an output of the scan", module=doing(act)
    )


@pytest.mark.parametrize(
    ("option", "part"),
    [("reduce_fx", "Did you mean 'reduce'?"), ("batch_size", "`weight=`"), ("sync_dist", "exact")],
)
def test_log_refuses_an_option_that_is_not_there(option, part):
    module = doing(lambda self, model, batch: self.log("a", 1.0, **{option: 1}))
    refused(OptionError, f"Mine.log got an unknown option {option!r}", part, module=module)


@pytest.mark.parametrize(("value", "part"), [(np.ones(2), "shape (2,)"), ("high", "type str")])
def test_log_in_a_hook_refuses_what_is_no_scalar(value, part):
    module = module_with(on_train_epoch_end=lambda self, run: self.log("a", value))
    refused(LogError, part, "pass a scalar", module=module, compiled=["train step"])


def test_log_outside_a_run_is_refused():
    with pytest.raises(LogError, match="no run to log to"):
        module_with().log("a", 1.0)
