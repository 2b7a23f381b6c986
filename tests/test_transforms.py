"""Models that call NNX transforms: they train as without, and what they hand back is no change.

Rematerialisation and `jit` compute the same, in another order of fusion: float32 tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxtrainer.errors import StepError
from jaxtrainer.handed import handed_back
from tests import tiny

TRANSFORMS = {"remat": nnx.remat, "jit": nnx.jit, "remat_of_jit": lambda f: nnx.remat(nnx.jit(f))}


class Inside(nnx.Module):
    """`tiny.Net`, called through a transform."""

    def __init__(self, rngs: nnx.Rngs, transform: Any) -> None:
        self.net = tiny.Net(rngs)
        self.net.dropout.rate = 0.0
        self.transform = transform

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.transform(lambda net, x: net(x))(self.net, x)


def inside(transform: Any) -> Callable[[nnx.Rngs], Inside]:
    return lambda rngs: Inside(rngs, transform)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_model_inside_a_transform_trains_as_without(name: str, steps: int):
    options: dict[str, Any] = {"max_epochs": 2, "steps_per_dispatch": steps}
    plain, inner = tiny.Tiny(inside(lambda f: f)), tiny.Tiny(inside(TRANSFORMS[name]))
    want, _ = tiny.fit(module=plain, **options)
    got, _ = tiny.fit(module=inner, **options)
    losses = [result.history["train/loss"].values for result in (got, want)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for path, leaf in tiny.params_of(plain).items():
        np.testing.assert_allclose(tiny.params_of(inner)[path], leaf, rtol=1e-4, atol=1e-6)


def test_step_with_such_a_model_may_log():
    class Logs(tiny.Tiny):
        def training_step(self, model: Any, batch: Any) -> Any:
            outputs = super().training_step(model, batch)
            self.log("double", 2 * outputs["loss"])
            return outputs

    result, _ = tiny.fit(module=Logs(inside(nnx.remat)), max_epochs=1)
    metrics = result.metrics
    assert metrics["train/double"] == pytest.approx(2 * metrics["train/loss"], rel=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_parameter_that_is_assigned_inside_a_transform_is_refused(name: str):
    class Assigns(tiny.Net):
        def __call__(self, x: jax.Array) -> jax.Array:
            bias: Any = self.last.bias
            bias.set_value(bias + 1)
            return super().__call__(x)

    def make(rngs: nnx.Rngs) -> Inside:
        model = Inside(rngs, TRANSFORMS[name])
        model.net = Assigns(rngs)
        return model

    with pytest.raises(StepError, match="assigned to the parameters net/last/bias;"):
        tiny.fit(module=tiny.Tiny(make), max_epochs=1)


def test_parameters_that_have_changed_places_are_refused():
    class Swaps(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(tiny.FEATURES, tiny.CLASSES, rngs=rngs)
            self.other = nnx.Linear(tiny.FEATURES, tiny.CLASSES, rngs=rngs)

        @nnx.remat
        def __call__(self, x: jax.Array) -> jax.Array:
            first: Any = self.first.bias
            other: Any = self.other.bias
            first[...], other[...] = other[...], first[...]
            return self.first(x) + self.other(x)

    with pytest.raises(StepError, match="assigned to the parameters first/bias, other/bias;"):
        tiny.fit(module=tiny.Tiny(Swaps), max_epochs=1)


class Manual(tiny.Tiny):
    automatic_optimization = False

    def training_step(self, model: Any, batch: Any) -> Any:
        loss, _ = self.minimize(
            lambda m: super(Manual, self).training_step(m, batch)["loss"], model
        )
        return {"loss": loss}


def test_step_with_updates_of_its_own_may_use_transforms():
    plain, inner = Manual(inside(lambda f: f)), Manual(inside(nnx.remat))
    tiny.fit(module=plain, max_epochs=1)
    tiny.fit(module=inner, max_epochs=1)
    for path, leaf in tiny.params_of(plain).items():
        np.testing.assert_allclose(tiny.params_of(inner)[path], leaf, rtol=1e-4, atol=1e-6)


def test_values_of_a_loop_are_not_what_it_was_given():
    def rolled(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, y: (y, carry), x[0], x)[1]

    x = np.arange(3.0)
    assert handed_back(jax.make_jaxpr(rolled)(x)) == [False]

    def kept(carry: jax.Array, x: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, y: (carry, y), carry, x)

    assert handed_back(jax.make_jaxpr(kept)(x[0], x)) == [True, True]
    assert handed_back(jax.make_jaxpr(lambda x: x)(x)) == [True]
    assert handed_back(jax.make_jaxpr(jax.jit(lambda x, y: (x, x)))(x, x)) == [True, False]
