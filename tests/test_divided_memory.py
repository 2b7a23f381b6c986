"""Memory of a divided model, by the compiler's account: what a device holds falls as 1/n."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer.plan import peak_bytes_of
from jaxtrainer.summary import summarize
from tests import divided

SIZES = (1, 2, 4, 8)
LAYERS, LAYER = 6, 256 * 256 * 4


class Deep(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(nnx.Linear(256, 256, rngs=rngs) for _ in range(LAYERS))
        self.last = nnx.Linear(256, divided.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tile(x, (1, 4))
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return self.last(x)


def make_module() -> Any:
    module = divided.Classify(tx=optax.adam(1e-3))
    module.make = Deep
    return module


@pytest.fixture(scope="module")
def steps() -> Any:
    """Of each number of devices the traced step, and the compiler's account of it."""
    traced = {n: divided.traced(make_module(), mesh={"fsdp": n}) for n in SIZES}
    return {n: (step, divided.compiled(step)) for n, step in traced.items()}


def test_what_the_state_takes_of_a_device_falls_with_their_number(steps: Any):
    whole = 0
    for n, (step, compiled) in steps.items():
        leaves = jax.tree.leaves(step.arguments)
        parts = [np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves]
        # To the byte, but for how XLA lays a few numbers out.
        held = compiled.memory_analysis().argument_size_in_bytes
        assert held == pytest.approx(sum(parts), abs=256)
        whole = whole or held
        # The biases, the last layer and the batch are less than a twentieth of it.
        assert whole / n <= held <= whole / n + whole / 20


def test_what_a_step_takes_of_a_device_falls_with_their_number(steps: Any):
    whole = peak_bytes_of(steps[1][1])
    for n, (_, compiled) in steps.items():
        # Gathered are the layer in use and the next one, and of one there are the gradients.
        assert peak_bytes_of(compiled) <= whole / n + 3 * LAYER
        assert compiled.memory_analysis().temp_size_in_bytes <= 4 * LAYER


def test_what_does_not_fit_on_one_device_fits_on_eight(steps: Any):
    size = 5 << 19
    assert peak_bytes_of(steps[1][1]) > 2 * size
    assert peak_bytes_of(steps[8][1]) < size


def test_model_is_never_whole_where_it_is_made(steps: Any):
    step, _ = steps[8]
    program = step.init.lower(*step.init_arguments).compile({"xla_backend_optimization_level": 0})
    memory = program.memory_analysis()
    # Its own part of weights and moments, random bits for them, and no more.
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.target))
    assert memory.output_size_in_bytes < state / 7
    assert memory.temp_size_in_bytes < state / 7
    # Less than the weights alone, of which a device never has all.
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < LAYERS * LAYER


def test_summary_says_what_is_divided_and_what_a_device_holds(steps: Any):
    params = steps[8][0].target.params
    summary = summarize(params, max_depth=2)
    rows = {row.path: row for row in summary.rows}
    assert rows["layers/0"].sharding == "kernel[fsdp,-]"
    assert (rows["layers"].sharding, rows["last"].sharding) == ("fsdp", "")
    assert rows["layers/0"].device_bytes == LAYER / 8 + 256 * 4
    assert "divided by" in str(summary)
    assert "divided by" not in str(summarize(steps[1][0].target.params))
