"""`module_types`: which class each path of a model has, as the summary shows it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxtrainer.modules import module_types
from jaxtrainer.state import adapter_for, flat_items
from tests.tiny import Net


class Tied(nnx.Module):
    """Twelve layers in a list, and an embedding that is used at both ends."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(5, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Sequential(nnx.Linear(2, 2, rngs=rngs)) for _ in range(12)])
        self.attend = self.embed


class Stack(eqx.Module):
    layers: eqx.nn.Sequential
    scale: Any

    def __init__(self) -> None:
        linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        self.layers = eqx.nn.Sequential([linear, eqx.nn.Lambda(jax.nn.relu), linear])
        self.scale = jnp.ones(2)


def test_types_are_in_the_order_of_definition():
    types = module_types(Net(nnx.Rngs(0)))
    assert list(types.items()) == [
        ("first", "Linear"),
        ("norm", "BatchNorm"),
        ("dropout", "Dropout"),
        ("last", "Linear"),
    ]


def test_modules_of_a_list_are_in_their_order_and_a_tied_one_is_there_once():
    types = module_types(Tied(nnx.Rngs(0)))
    top = [path for path in types if path.count("/") == 1]
    assert top == [f"blocks/{i}" for i in range(12)]
    assert types["blocks/11/layers/0"] == "Linear"
    assert list(types.values()).count("Embed") == 1


def test_equinox_nodes_have_their_classes_and_containers_none():
    assert module_types(Stack()) == {
        "layers": "Sequential",
        "layers/layers/0": "Linear",
        "layers/layers/1": "Lambda",
        "layers/layers/2": "Linear",
    }


def test_dict_of_arrays_has_no_classes():
    assert module_types({"params": {"Dense_0": {"kernel": jnp.ones((2, 2))}}}) == {}


@pytest.mark.parametrize("make", [lambda: Tied(nnx.Rngs(0)), Stack], ids=["nnx", "equinox"])
def test_paths_are_those_of_the_parameters(make: Any):
    adapter: Any = None

    def split() -> Any:
        nonlocal adapter
        model = make()
        adapter = adapter_for(model)
        return adapter.split(model)

    params, _ = jax.eval_shape(split)
    parents = {name.rpartition("/")[0] for name, _ in flat_items(params)} - {""}
    assert parents <= set(adapter.types)
