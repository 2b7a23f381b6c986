"""`NamedModules`: whose name stands around what a model's modules compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxtrainer.flops import module_flops
from jaxtrainer.modules import module_types
from jaxtrainer.scopes import NamedModules, path_in

X = jnp.ones((2, 3))


class Whole:
    """An adapter for a model that is there already."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.types = module_types(model)

    def merge(self, params: Any, model_state: Any, *, training: bool) -> Any:
        return nnx.merge(*nnx.split(self.model), copy=True)


class Inner(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)

    @nnx.jit
    def compiled(self, x: jax.Array) -> jax.Array:
        return self.layer(x)

    @nnx.remat
    def cheap(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


class Outer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Inner(rngs) for _ in range(2)])


def flops_of(call: Any) -> dict[str, float]:
    named = NamedModules(Whole(Outer(nnx.Rngs(0))))

    def step(x: jax.Array) -> jax.Array:
        return call(named.merge({}, {}, training=True), x)

    with named.scopes():
        jaxpr = jax.make_jaxpr(step)(X)
    return {path: flops.forward for path, flops in module_flops(jaxpr, named.types).items()}


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x: block(x),
        lambda block, x: block.compiled(x),
        lambda block, x: block.cheap(x),
        lambda block, x: nnx.remat(Inner.__call__)(block, x),
        lambda block, x: nnx.jit(lambda block, x: block(x))(block, x),
        lambda block, x: nnx.clone(block)(x),
        lambda block, x: nnx.cond(True, Inner.__call__, Inner.cheap, block, x),
    ],
    ids=["plain", "jit method", "remat method", "remat", "jit", "clone", "cond"],
)
def test_path_is_known_wherever_a_module_is_called(call: Any):
    flops = flops_of(lambda model, x: call(model.blocks[1], x))
    assert flops["blocks/1/layer"] == flops["blocks/1"] == 2 * 2 * 3 * 3 + 2 * 3
    assert flops["blocks/0"] == 0


def test_classes_are_restored_where_the_trace_fails():
    before = dict(vars(Inner)), dict(vars(nnx.Linear))
    with pytest.raises(AttributeError, match="missing"):
        flops_of(lambda model, x: model.blocks[0].missing(x))
    assert (dict(vars(Inner)), dict(vars(nnx.Linear))) == before


def test_module_that_refuses_attributes_is_known_by_its_id():
    class Strict(Inner):
        def __setattr__(self, name: str, value: Any) -> None:
            assert name == "layer"
            super().__setattr__(name, value)

    named = NamedModules(Whole(nnx.Dict(strict=Strict(nnx.Rngs(0)))))
    with named.scopes():
        jaxpr = jax.make_jaxpr(lambda x: named.merge({}, {}, training=True)["strict"](x))(X)
    assert module_flops(jaxpr, named.types)["strict"].forward > 0


def test_innermost_path_counts():
    assert path_in("jvp(@a@)/rematted_computation/@a/b@") == "a/b"
    assert path_in("jit(step)/transpose(jvp())") is None
