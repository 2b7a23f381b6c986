"""Steps, models and optimisers that the compiled program could not carry, and what to write."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

from jaxtrainer.errors import AttributeChangedError, ConfigError, StepError
from tests import tiny
from tests.bad_input import IN_TRAINING, assert_says, frames_of, loss_of, module_with, refused


def returning(make: Any) -> Any:
    """A module whose training step returns `make(model, batch)`."""
    return module_with(training_step=lambda self, model, batch: make(model, batch))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda m, b: None, "training_step returned None; write `return loss`"),
        (lambda m, b: {"loss": None}, "returned a dict with 'loss': None"),
        (lambda m, b: {"los": 1.0}, "returned a dict without 'loss' (keys: 'los')"),
        (lambda m, b: {}, "returned a dict without 'loss' (keys: none)"),
        (lambda m, b: (loss_of(m, b), {}), "returned a tuple; write `return loss`"),
        (lambda m, b: "loss", "returned a str; write `return loss`"),
        (lambda m, b: m, "returned a Linear; write `return loss`"),
        (lambda m, b: m(b["x"]).mean(-1), "returned float32[8], expected a scalar"),
        (lambda m, b: loss_of(m, b)[None], "returned float32[1], expected a scalar"),
        (lambda m, b: m(b["x"]).argmax(-1).sum(), "returned int32[], expected a floating-point"),
        (lambda m, b: loss_of(m, b) > 0, "returned bool[], expected a floating-point"),
        (lambda m, b: lax.complex(loss_of(m, b), loss_of(m, b)), "complex64[], expected a real"),
        (lambda m, b: 0.5, "returned the constant 0.5, which has no gradient"),
        (lambda m, b: {"loss": loss_of(m, b), "weight": jnp.ones(3)}, "'weight': float32[3]"),
        (lambda m, b: {"loss": loss_of(m, b), "weight": "all"}, "'weight': a str"),
    ],
)
def test_training_step_that_returns_no_loss_is_refused(make, part):
    refused(StepError, part, module=returning(make))


def test_bad_return_is_refused_with_the_step_and_its_batch():
    refused(StepError, "return {'loss': loss", IN_TRAINING, module=returning(lambda m, b: None))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda m, b: m(b["x"]), "returned float32[8, 3], expected a scalar loss; log it, or"),
        (lambda m, b: (1.0, 2.0), "returned a tuple; return a dict"),
        (lambda m, b: {"loss": b["label"].sum()}, "'loss': int32[], expected a floating-point"),
    ],
)
def test_validation_step_that_returns_something_else_is_refused(make, part):
    module = module_with(validation_step=lambda self, model, batch: make(model, batch))
    refused(StepError, part, module=module, val_loader=tiny.make_batches(1))


@pytest.mark.parametrize(("value", "part"), [(None, "returned None"), ("cat", "returned a str")])
def test_predict_step_that_returns_no_array_is_refused(value, part):
    module = module_with(predict_step=lambda self, model, batch: value)
    refused(StepError, part, "return model(batch['x'])", module=module, stage="predict")


def test_dtypes_that_do_not_mix_are_refused_with_the_batch():
    module = returning(lambda m, b: (m(b["x"]) - b["label"][:, None]).mean())
    with pytest.raises(ValueError, match="dtype promotion") as caught:
        tiny.fit(tiny.make_batches(1), module=module, max_epochs=1)
    assert_says(caught.value, IN_TRAINING)


def failing_step(self, model, batch):
    return batch["y"]


def test_error_in_a_step_ends_in_the_step():
    error = refused(KeyError, "y", IN_TRAINING, module=module_with(training_step=failing_step))
    assert frames_of(error)[-1] == "test_bad_steps.py:failing_step"


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda rngs: None, "configure_model returned None; end it with `return model`"),
        (lambda rngs: nnx.Dropout(0.5, rngs=rngs), "of type Dropout, without an `nnx.Param`"),
        (lambda rngs: {"ids": jnp.arange(3)}, "of type dict, without a floating-point array"),
        (lambda rngs: 3, "of type int, without a floating-point array"),
        (lambda rngs: nnx.Linear, "the class Linear, without"),
        (lambda rngs: nnx.Linear, "`return Linear(..., rngs=rngs)`"),
        (lambda rngs: linen.Dense(3), "`return module.init(rngs.params(), x)`"),
        (lambda rngs: {"a": nnx.Linear(4, 3, rngs=rngs)}, "`return nnx.Dict("),
    ],
)
def test_model_with_nothing_to_train_is_refused(make, part):
    refused(ConfigError, part, module=module_with(configure_model=lambda self, rngs: make(rngs)))


@pytest.mark.parametrize("name", ["model", "net"])
def test_model_kept_on_the_module_is_refused_and_taken_off(name):
    def configure_model(self, rngs):
        setattr(self, name, tiny.line(rngs))
        return getattr(self, name)

    module = module_with(configure_model=configure_model)
    refused(AttributeChangedError, f"set `self.{name}`", "Return the model", module=module)
    assert name not in vars(module)


class Masked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = tiny.line(rngs)
        self.mask = jnp.ones((1, tiny.CLASSES))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x) * self.mask


def test_model_with_a_plain_array_attribute_trains():
    module = module_with(configure_model=lambda self, rngs: Masked(rngs))
    tiny.fit(tiny.make_batches(3), module=module, max_epochs=1)
    assert np.array_equal(module.model.mask, np.ones((1, tiny.CLASSES)))


SCHEDULE = optax.cosine_decay_schedule(0.1, 10)


@pytest.mark.parametrize(
    ("returned", "part"),
    [
        (([optax.sgd(0.1)], ["scheduler"]), "of type tuple, expected an `optax.Gradient"),
        ([optax.sgd(0.1)], "a schedule is part of its optimizer"),
        ({"optimizer": optax.sgd(0.1), "lr_scheduler": SCHEDULE}, "a schedule is part of its"),
        ((optax.sgd(0.1), optax.adam(0.1)), "return {'generator': Optimizer("),
        (None, "returned None"),
        (SCHEDULE, "`optax.adam(schedule)`"),
        (optax.adam, "call it"),
        (1e-3, "of type float"),
    ],
)
def test_what_is_no_optimizer_is_refused(returned, part):
    module = module_with(configure_optimizers=lambda self: returned)
    refused(ConfigError, "Mine.configure_optimizers returned", part, module=module)


def test_nnx_optimizer_is_refused():
    optimizer = nnx.Optimizer(tiny.line(nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param)
    module = module_with(configure_optimizers=lambda self: optimizer)
    refused(ConfigError, "of type Optimizer", "return the transformation alone", module=module)
