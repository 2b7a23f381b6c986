"""Optimisers by name, each with parameters of its own; what none owns is frozen.

Tolerance against a loop written by hand: none, because both are the same operations on the same
numbers, compiled by XLA for the CPU without a choice of order.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Optimizer
from jaxtrainer.callbacks import Checkpoint, LearningRateMonitor
from jaxtrainer.errors import ConfigError
from jaxtrainer.state import flat_items
from tests import tiny
from tests.bad_input import module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")

NAMES = ["first/bias", "first/kernel", "last/bias", "last/kernel"]


class TwoLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(tiny.FEATURES, 5, rngs=rngs)
        self.last = nnx.Linear(5, tiny.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jax.nn.tanh(self.first(x)))


def two() -> dict[str, Optimizer]:
    return {
        "slow": Optimizer(optax.sgd(0.01, momentum=0.9), wrt="first"),
        "fast": Optimizer(optax.adam(0.1), wrt="last"),
    }


def trained(optimizers: Any, **options: Any) -> tuple[dict[str, np.ndarray], Any]:
    """The parameters after an epoch of 8 batches, and the whole state."""
    module = tiny.Tiny(TwoLayers, optimizers)
    _, state = tiny.fit(tiny.make_batches(), module=module, **{"max_epochs": 1, **options})
    return tiny.params_of(module), state


@functools.cache
def initial(make: Any = TwoLayers) -> dict[str, np.ndarray]:
    """The parameters before training, which do not depend on the optimiser."""
    module = tiny.Tiny(make, Optimizer(optax.set_to_zero()))
    tiny.fit(tiny.make_batches(1), module=module, max_epochs=1)
    return tiny.params_of(module)


def changed(optimizers: Any, **options: Any) -> list[str]:
    """Names of the parameters that training changes."""
    before, (after, _) = initial(), trained(optimizers, **options)
    return [name for name in before if before[name].tobytes() != after[name].tobytes()]


def by_hand(batches: Any) -> dict[str, np.ndarray]:
    """Two Optax transformations in a loop, on the model that the trainer begins with."""
    module = tiny.Tiny(TwoLayers, Optimizer(optax.set_to_zero()))
    tiny.fit(batches[:1], module=module, max_epochs=1)
    graphdef, params = nnx.split(module.model)
    params = nnx.to_pure_dict(params)
    txs = {"first": optax.sgd(0.01, momentum=0.9), "last": optax.adam(0.1)}
    states = {name: tx.init(params[name]) for name, tx in txs.items()}

    @jax.jit
    def step(params: Any, states: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            logits = nnx.merge(graphdef, nnx.State(params), copy=True)(batch["x"])
            labels = batch["label"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        grads = jax.grad(loss_fn)(params)
        for name, tx in txs.items():
            updates, states[name] = tx.update(grads[name], states[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return params, states

    for batch in batches:
        params, states = step(params, states, batch)
    return {n: np.array(x) for n, x in flat_items(params)}


def test_named_optimizers_are_a_loop_written_by_hand():
    params, state = trained(two())
    tiny.assert_same_bits(params, by_hand(tiny.make_batches()))
    assert any(".opt_state['fast'][0].mu['last']" in name for name in state)


def test_named_optimizers_fused_are_those_one_by_one():
    _, fused = trained(two(), steps_per_dispatch=4)
    _, single = trained(two(), steps_per_dispatch=1)
    tiny.assert_same_bits(fused, single)


def test_named_optimizers_that_share_a_rule_are_one():
    halves = {n: Optimizer(optax.adam(1e-2), wrt=n) for n in ("first", "last")}
    options: Any = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    tiny.assert_same_bits(trained(halves, **options)[0], trained(optax.adam(1e-2), **options)[0])


def test_resume_with_named_optimizers_is_the_uninterrupted_run(tmp_path: Path):
    saver = Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    _, whole = trained(two(), callbacks=[saver])
    _, resumed = trained(two(), ckpt_path=tmp_path / "step_3")
    tiny.assert_same_bits(resumed, whole)


@pytest.mark.parametrize(
    ("wrt", "owned"),
    [
        ("last", ["last/bias", "last/kernel"]),
        ("last/kernel", ["last/kernel"]),
        ("*/bias", ["first/bias", "last/bias"]),
        (["last/bias", "first"], ["first/bias", "first/kernel", "last/bias"]),
        (nnx.PathContains("first"), ["first/bias", "first/kernel"]),
        (lambda path, value: path[-1] == "bias" and value.shape == (5,), ["first/bias"]),
        (nnx.Param, NAMES),
        (..., NAMES),
    ],
    ids=["path", "leaf", "glob", "several", "filter", "function", "type", "all"],
)
def test_optimizer_changes_what_it_owns_and_nothing_else(wrt: Any, owned: list[str]):
    assert changed(Optimizer(optax.sgd(0.1), wrt=wrt)) == owned


def test_rest_is_what_no_other_owns():
    optimizers = {
        "none": Optimizer(optax.set_to_zero(), wrt="first"),
        "rest": Optimizer(optax.sgd(0.1)),
    }
    assert changed(optimizers) == ["last/bias", "last/kernel"]


class Adapter(nnx.LoRA):
    """A low-rank addition to a layer that stays as it is."""


def test_filter_by_type_trains_adapters_only():
    make = lambda rngs: Adapter(4, 2, 3, base_module=tiny.line(rngs), rngs=rngs)  # noqa: E731
    module = tiny.Tiny(make, Optimizer(optax.sgd(0.5), wrt=nnx.LoRAParam))
    tiny.fit(tiny.make_batches(), module=module, max_epochs=1)
    before, after = initial(make), tiny.params_of(module)
    same = [n for n in before if before[n].tobytes() == after[n].tobytes()]
    assert same == ["base_module/bias", "base_module/kernel"]


def test_frozen_parameters_have_no_optimiser_state_and_no_gradient():
    optimizer = Optimizer(optax.adam(0.1), wrt="last")
    _, state = trained(optimizer, accumulate_grad_batches=2)
    kept = [n for n in state if ".opt_state" in n or ".accumulated" in n]
    assert [n for n in kept if "'last'" in n]
    assert not [n for n in kept if "'first'" in n]


def test_plan_of_a_frozen_layer_has_no_gradient_of_it():
    batch = tiny.make_batches(1)[0]
    flops = {
        wrt: tiny.make_trainer(max_steps=1)
        .plan(tiny.Tiny(TwoLayers, Optimizer(optax.sgd(0.1), wrt=wrt)), batch)
        .flops
        for wrt in ("last", ...)
    }
    # The kernel's gradient is one product of [4, 8] and [8, 5]; its update one more operation each.
    assert flops[...] - flops["last"] > 2 * 4 * 8 * 5


def test_plan_says_what_is_trained():
    module = tiny.Tiny(TwoLayers, Optimizer(optax.sgd(0.1), wrt="last"))
    plan = tiny.make_trainer().plan(module, tiny.make_batches(1)[0])
    assert plan.frozen == {"first/bias", "first/kernel"}


class EquinoxNet(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = eqx.nn.Linear(tiny.FEATURES, 5, key=rngs.params())
        self.last = eqx.nn.Linear(5, tiny.CLASSES, key=rngs.params())

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.last)(jax.nn.tanh(jax.vmap(self.first)(x)))


@pytest.mark.parametrize("wrt", ["last", "*/bias", lambda path, value: path[0] == "last"])
def test_optimizer_of_an_equinox_model_owns_by_name(wrt: Any):
    module = tiny.Tiny(EquinoxNet, Optimizer(optax.sgd(0.1), wrt=wrt))
    still = tiny.Tiny(EquinoxNet, Optimizer(optax.set_to_zero()))
    tiny.fit(tiny.make_batches(), module=module, max_epochs=1)
    tiny.fit(tiny.make_batches(), module=still, max_epochs=1)
    same = module.model.first.weight == still.model.first.weight
    assert np.all(same)
    assert np.all(module.model.last.bias != still.model.last.bias)


def test_value_reaches_every_optimizer():
    plateau = optax.contrib.reduce_on_plateau(patience=0, factor=0.5)
    halves = {n: Optimizer(optax.chain(optax.sgd(0.1), plateau), wrt=n) for n in ("first", "last")}
    _, state = trained(halves)
    scales = [v for name, v in state.items() if name.endswith(".scale")]
    assert len(scales) == 2
    assert scales[0] == scales[1] != 1.0


def test_rates_are_recorded_by_name():
    sgd = optax.inject_hyperparams(optax.sgd)
    optimizers = {
        "slow": Optimizer(sgd(learning_rate=0.01), wrt="first"),
        "fast": Optimizer(sgd(learning_rate=0.1), wrt="last"),
    }
    module = tiny.Tiny(TwoLayers, optimizers)
    result, _ = tiny.fit(module=module, callbacks=[LearningRateMonitor()], max_epochs=1)
    rates = {name: result.metrics[name] for name in ("lr/slow", "lr/fast")}
    assert rates == {"lr/slow": pytest.approx(0.01), "lr/fast": pytest.approx(0.1)}


def test_schedules_are_recorded_by_name():
    halving = optax.exponential_decay(0.1, 1, 0.5)
    monitor = LearningRateMonitor(schedule={"slow": 0.01, "fast": halving})
    module = tiny.Tiny(TwoLayers, two())
    result, _ = tiny.fit(module=module, callbacks=[monitor], max_epochs=1)
    assert result.history.step["lr/slow"].values == [0.01, 0.01]
    # float32 against Python's floats: 2**-24 relative.
    assert result.history.step["lr/fast"].values == pytest.approx([0.1 / 2**3, 0.1 / 2**7])


def test_schedule_of_an_unknown_optimizer_is_refused():
    monitor = LearningRateMonitor(schedule={"slo": 0.01})
    module = tiny.Tiny(TwoLayers, two())
    with pytest.raises(ConfigError, match=r"optimizer 'slo'; .* Did you mean 'slow'"):
        tiny.fit(module=module, callbacks=[monitor], max_epochs=1)


ADAM = optax.adam(1e-3)
make_optimizer: Any = Optimizer


@pytest.mark.parametrize(
    ("returned", "part"),
    [
        ({"a": Optimizer(ADAM), "b": Optimizer(ADAM)}, "own: bias (a and b), kernel (a and b)"),
        ({"a": Optimizer(ADAM, "*"), "b": Optimizer(ADAM, "bias")}, "own: bias (a and b). Each"),
        (
            {"a": Optimizer(ADAM, "*"), "b": Optimizer(ADAM)},
            "'b' owns no parameter, because the others own all",
        ),
        (
            Optimizer(ADAM, "kernl"),
            "'default' owns no parameter: wrt='kernl' matches none of bias, kernel. Did you mean "
            "'kernel'?",
        ),
        (Optimizer(ADAM, lambda path, value: False), "owns no parameter"),
        (optax.MultiSteps(ADAM, 2), "return its `.gradient_transformation()`"),
        (Optimizer(ADAM, 3), "wrt=3: pass the name of a module or parameter"),
        ({"a": ADAM, "b": ADAM}, "say which parameters each owns: `return {'generator': Optim"),
        ([ADAM, ADAM], "name several, and say which parameters each owns: `return {'generator'"),
        ([Optimizer(ADAM, "bias"), Optimizer(ADAM, "kernel")], "name several"),
        ({}, "returned an empty dict"),
    ],
)
def test_owners_that_cannot_be_are_refused(returned: Any, part: Any):
    module = module_with(configure_optimizers=lambda self: returned)
    refused(ConfigError, "Mine.configure_optimizers", part, module=module)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: make_optimizer(optax.adam), "call it: pass e.g. `optax.adam(1e-3)`"),
        (lambda: make_optimizer([ADAM], "a"), "Optimizer got an object of type list"),
        (
            lambda: make_optimizer(ADAM, start_step=-1),
            "start_step must be an integer of at least 0",
        ),
        (lambda: make_optimizer(ADAM, start_epoch=1.5), "start_epoch must be an integer"),
    ],
)
def test_optimizer_that_cannot_be_is_refused(make: Any, part: str):
    with pytest.raises(ConfigError, match=re.escape(part)):
        make()
