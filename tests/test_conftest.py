"""The test environment is what the other tests take it for."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx


def test_environment_is_scrubbed():
    kept = {name for name in os.environ if name.startswith(("JAX_", "XLA_"))}
    assert kept == {"JAX_ENABLE_COMPILATION_CACHE", "JAX_PLATFORMS", "XLA_FLAGS"}


def test_devices_are_eight():
    assert len(jax.devices("cpu")) == 8


@pytest.mark.parametrize(
    "mixed",
    [lambda: jnp.ones(3, jnp.int32) * jnp.ones(3), lambda: jnp.ones((2, 3)) + jnp.ones(3)],
    ids=["dtypes", "ranks"],
)
def test_promotion_is_refused(mixed):
    with pytest.raises((TypeError, ValueError), match="promotion"):
        mixed()


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1), optax.adam(optax.cosine_decay_schedule(0.1, 100))],
    ids=["sgd", "adam_with_schedule"],
)
def test_strict_promotion_lets_flax_and_optax_train(optimizer):
    graphdef, params = nnx.split(nnx.Linear(4, 1, rngs=nnx.Rngs(0)))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, x):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(x) ** 2))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    x = np.ones((8, 4), np.float32)
    params, opt_state, first = step(params, opt_state, x)
    assert step(params, opt_state, x)[2] < first


def test_compilation_cache_is_filled_when_asked_for(compilation_cache):
    jax.jit(lambda x: x * 2 + 1)(np.ones(3, np.float32))
    assert any(compilation_cache.iterdir())
