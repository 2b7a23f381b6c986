"""`Trainer(remat=...)`: the same training, with less kept and more computed again.

The operations are the same ones in the same order, but XLA may fuse them otherwise: parameters
agree to a few units in the last place of float32 (1.2e-7) after some steps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Trainer
from jaxtrainer.errors import ConfigError
from tests import tiny
from tests.bad_input import module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")

WIDTH, DEPTH, ROWS = 32, 3, 2048


class Block(nnx.Module):
    """Has what a block may have: statistics, a stream of keys, a flag, an argument it hands on."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(4 * WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, cache: Any, *, is_last: bool) -> tuple[jax.Array, Any]:
        y = self.down(self.dropout(nnx.gelu(self.norm(self.up(x)))))
        return (y if is_last else x + jnp.tanh(y)), cache


class Deep(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(tiny.FEATURES, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.last = nnx.Linear(WIDTH, tiny.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        for block in self.blocks:
            x, _ = block(x, None, is_last=block is self.blocks[-1])
        return self.last(x)


class Scanned(nnx.Module):
    """The same blocks, stacked. Of a loop XLA's CPU backend keeps what the program says it keeps;
    without one it finds that it has computed the same before, and keeps that after all."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(tiny.FEATURES, WIDTH, rngs=rngs)
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.blocks = Mixer(nnx.split_rngs(splits=DEPTH)(make)(rngs))
        self.last = nnx.Linear(WIDTH, tiny.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.last(run(self.first(x), self.blocks))


class Mixer(nnx.Module):
    def __init__(self, mix: nnx.Linear) -> None:
        self.mix = mix

    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = x + jnp.tanh(self.mix(x))
        return x


def plan(model: Any = Deep, **options: Any) -> Any:
    batch = {k: np.resize(a, (ROWS, *a.shape[1:])) for k, a in tiny.make_arrays().items()}
    return tiny.make_trainer(**options).plan(tiny.Tiny(model), batch)


@pytest.mark.slow
def test_operations_rise_as_the_policy_says():
    before = Block.__call__, nnx.Linear.__call__
    given = (None, {"blocks/*": "dots_saveable"}, {"blocks/*": "nothing_saveable"})
    plans = [plan(remat=remat) for remat in given]
    none, dots, all_ = (plan.flops for plan in plans)
    # Of three parts, forward and two of backward, the forward one is made again: 4 for 3.
    assert 1.25 * none < all_ < 1.45 * none
    assert none < dots < 0.9 * all_
    # Modules are still told apart: what is made again counts as backward.
    of_block = [plan.module_flops["blocks/1/up"] for plan in plans]
    assert of_block[0].forward == of_block[2].forward > 0
    assert of_block[0].backward < of_block[2].backward
    # What stands around the calls is gone with the trace.
    assert (Block.__call__, nnx.Linear.__call__) == before


def test_memory_falls():
    whole, less = plan(Scanned), plan(Scanned, remat="blocks")
    row = ROWS * WIDTH * 4
    # Four times an input and a slope of each block, less its own input, as far as XLA keeps them.
    assert whole.peak_bytes - less.peak_bytes >= DEPTH * 4 * row
    assert less.peak_bytes < 0.5 * whole.peak_bytes


@pytest.fixture(scope="module")
def states() -> dict[str, Any]:
    given: dict[str, Any] = {"none": None, "all": "blocks/*", "some": ["blocks/1", "last"]}
    # Adam divides by the gradient's size: where that is rounding, so is its update.
    module = {k: tiny.Tiny(Deep, optax.sgd(0.05)) for k in given}
    return {
        name: tiny.fit(module=module[name], remat=remat, max_epochs=1)[1]
        for name, remat in given.items()
    }


@pytest.mark.parametrize("name", ["all", "some"])
def test_training_is_the_same(states: dict[str, Any], name: str):
    got, want = states[name], states["none"]
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_allclose(got[key], want[key], rtol=2e-5, atol=2e-6, err_msg=key)


def test_keys_and_statistics_go_on_inside(states: dict[str, Any]):
    state = states["all"]
    counts = [x for k, x in state.items() if "blocks" in k and k.endswith("['count']")]
    assert len(counts) == DEPTH
    assert all(count == 8 for count in counts)
    means = [x for k, x in state.items() if "blocks" in k and k.endswith("['mean']")]
    assert all(np.abs(mean).max() > 0 for mean in means)


class Manual(tiny.Tiny):
    automatic_optimization = False

    def training_step(self, model: Any, batch: Any) -> Any:
        return self.minimize(lambda model: optax.l2_loss(model(batch["x"])).mean(), model)[0]


@pytest.mark.slow
def test_updates_of_the_step_itself_are_the_same():
    states = []
    for remat in (None, "blocks/*"):
        module = Manual(Deep, optax.sgd(0.05))
        states.append(tiny.fit(module=module, remat=remat, max_steps=4)[1])
    for key in states[0]:
        np.testing.assert_allclose(*(s[key] for s in states), rtol=2e-5, atol=2e-6, err_msg=key)


def test_pattern_that_matches_nothing_is_refused():
    said = "remat: 'bloks/*' matches nothing", "blocks/0"
    refused(ConfigError, *said, module=tiny.Tiny(Deep), remat="bloks/*")


def test_model_without_modules_is_refused():
    module = module_with(configure_model=lambda self, rngs: {"w": jnp.ones((4, 3))})
    refused(ConfigError, "the model is none", module=module, remat="blocks/*")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"blocks/*": "dots_savable"}, "Did you mean 'dots_saveable'"),
        ({"blocks/*": "save_only_these_names"}, "takes arguments"),
        (True, r"pass patterns of module paths"),
    ],
)
def test_words_that_are_none_are_refused(given: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        Trainer(remat=given)
