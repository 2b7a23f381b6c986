"""Updates that the training step makes itself: a GAN, predictive coding, and what is refused.

Where two ways to the same update are compared, they are the same operations in the same order, so
that the bits are compared; where a formula stands against autodiff, the tolerance is a few units
in the last place of float32 (1.2e-7).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from jaxtrainer import Optimizer, TrainModule
from jaxtrainer.callbacks import Checkpoint, GradientMonitor
from jaxtrainer.errors import ConfigError, LogError, StepError
from jaxtrainer.state import flat_items
from tests import tiny
from tests.bad_input import IN_TRAINING, loss_of, module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")


class GAN(TrainModule):
    """Two optimisers, two losses, one step: a Wasserstein GAN with clipped weights."""

    automatic_optimization = False

    def configure_model(self, rngs: nnx.Rngs) -> Any:
        generator = nnx.Sequential(nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
        return nnx.Dict(generator=generator, critic=nnx.Linear(4, 1, rngs=rngs), rngs=rngs)

    def configure_optimizers(self) -> Any:
        return {
            "generator": Optimizer(optax.adam(1e-2), wrt="generator"),
            "critic": Optimizer(optax.adam(5e-2), wrt="critic"),
        }

    def training_step(self, model: Any, batch: Any) -> None:
        def fake(model: Any) -> Any:
            return model.generator(model.rngs.normal((len(batch["x"]), 2)))

        def critic_loss(model: Any) -> Any:
            return (model.critic(fake(model)) - model.critic(batch["x"])).mean()

        loss, model = self.minimize(critic_loss, model, "critic")
        self.log("critic_loss", loss)
        model.critic.kernel[...] = jnp.clip(model.critic.kernel[...], -0.5, 0.5)
        loss, model = self.minimize(lambda m: -m.critic(fake(m)).mean(), model, "generator")
        self.log("generator_loss", loss)


class PredictiveCoding(TrainModule):
    """Relaxes the values of the nodes by descent on the energy, then the weights once."""

    automatic_optimization = False

    def __init__(self, num_inner_steps: int = 8, inner_rate: float = 0.1) -> None:
        self.num_inner_steps, self.inner_rate = num_inner_steps, inner_rate

    def configure_model(self, rngs: nnx.Rngs) -> Any:
        sizes = [tiny.FEATURES, 6, 5, tiny.CLASSES]
        return nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])

    def configure_optimizers(self) -> Any:
        return optax.sgd(0.1)

    def training_step(self, model: Any, batch: Any) -> Any:
        target = jax.nn.one_hot(batch["label"], tiny.CLASSES)

        def energy(nodes: list[jax.Array], model: Any) -> Any:
            inputs = [batch["x"], *map(jnp.tanh, nodes)]
            pairs = zip(model, inputs, [*nodes, target], strict=True)
            return sum(((node - layer(x)) ** 2).sum() for layer, x, node in pairs) / 2

        def relax(nodes: list[jax.Array], _: Any) -> Any:
            grads = jax.grad(energy)(nodes, model)
            return jax.tree.map(lambda v, g: v - self.inner_rate * g, nodes, grads), None

        nodes = [model[0](batch["x"])]
        nodes.append(model[1](jnp.tanh(nodes[0])))
        nodes, _ = lax.scan(relax, nodes, length=self.num_inner_steps)
        loss, model = self.minimize(lambda model: energy(nodes, model), model)
        return loss


def trained(module: TrainModule, **options: Any) -> Any:
    """The result and state after an epoch of 8 batches."""
    return tiny.fit(tiny.make_batches(), module=module, **{"max_epochs": 1, **options})


def initial(make: Any) -> Any:
    """The model that `configure_model` makes for the trainer's seed."""

    class Still(tiny.Tiny):
        def training_step(self, model: Any, batch: Any) -> Any:
            return optax.tree.sum(nnx.state(model, nnx.Param))

    module = Still(make, optax.set_to_zero())
    trained(module, max_steps=1)
    return module.model


def test_gan_trains_both_and_counts_each_step_once():
    module = GAN()
    result, state = trained(module)
    assert result.num_steps == result.history.epoch["train/critic_loss"].steps[-1] == 8
    counts = {name: int(v) for name, v in state.items() if name.endswith("].count")}
    assert counts == {f".opt_state['{k}'][0].count": 8 for k in ("critic", "generator")}
    assert np.all(np.abs(module.model.critic.kernel[...]) <= 0.5 + 0.05)
    assert np.all(module.model.generator.layers[1].mean[...] != 0.0)


def test_gan_draws_new_noise_for_each_loss():
    before = int(initial(GAN().configure_model).rngs.default.count[...])
    module = GAN()
    trained(module)
    assert int(module.model.rngs.default.count[...]) == before + 2 * 8


def test_gan_fused_is_step_by_step():
    _, fused = trained(GAN(), steps_per_dispatch=4)
    _, single = trained(GAN(), steps_per_dispatch=1)
    tiny.assert_same_bits(fused, single)


def test_resume_of_a_gan_is_the_uninterrupted_run(tmp_path: Path):
    saver = Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    _, whole = trained(GAN(), callbacks=[saver])
    _, resumed = trained(GAN(), ckpt_path=tmp_path / "step_3")
    tiny.assert_same_bits(resumed, whole)


def test_predictive_coding_learns():
    result, _ = trained(PredictiveCoding(), max_epochs=8)
    losses = result.history["train/loss"].values
    assert losses[-1] < 0.4 * losses[0], losses


def test_predictive_coding_without_inner_steps_is_backpropagation_in_the_last_layer():
    module, batch = PredictiveCoding(num_inner_steps=0), tiny.make_batches(1)[0]
    before = initial(module.configure_model)
    tiny.fit([batch], module=module, max_steps=1)

    def half_squared_error(model: Any) -> Any:
        hidden = jnp.tanh(model[1](jnp.tanh(model[0](batch["x"]))))
        return ((jax.nn.one_hot(batch["label"], tiny.CLASSES) - model[2](hidden)) ** 2).sum() / 2

    grads = nnx.grad(half_squared_error)(before)
    want = before[2].kernel[...] - 0.1 * grads[2]["kernel"][...]
    np.testing.assert_allclose(module.model[2].kernel[...], want, rtol=1e-6, atol=1e-6)
    # Every other node is at its prediction, so that nothing else has an error.
    np.testing.assert_array_equal(module.model[0].kernel[...], before[0].kernel[...])


class Manual(tiny.Tiny):
    """What `tiny.Tiny` does, with updates of its own: `act(self, model, batch)`."""

    automatic_optimization = False

    def __init__(self, act: Any, make: Any = tiny.Net, tx: Any = None) -> None:
        super().__init__(make, tx)
        self.act = act

    def training_step(self, model: Any, batch: Any) -> Any:
        return self.act(self, model, batch)


def loss_on(batch: Any) -> Any:
    """The loss of `tiny.Tiny` as a function of the model."""

    def loss_fn(model: Any) -> Any:
        logits = model(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return loss_fn


def minimize(self: Any, model: Any, batch: Any) -> Any:
    return self.minimize(loss_on(batch), model)[0]


def minimize_by_name(self: Any, model: Any, batch: Any) -> Any:
    (loss, rows), model = self.minimize(
        lambda model: (loss_on(batch)(model), len(batch["x"])), model, "default", has_aux=True
    )
    assert rows == 8
    return {"loss": loss, "model": model}


def take_gradients(self: Any, model: Any, batch: Any) -> Any:
    loss, grads = nnx.value_and_grad(loss_on(batch))(model)
    self.apply_gradients(model, grads, value=loss)
    return loss


def minimize_twice(self: Any, model: Any, batch: Any) -> None:
    for _ in range(2):
        _, model = self.minimize(loss_on(batch), model)


@pytest.mark.parametrize(
    ("act", "make", "precision"),
    [
        (minimize, tiny.Net, "32-true"),
        # BatchNorm's statistics stay in float32, which strict promotion does not mix.
        (minimize, tiny.line, "bf16-mixed"),
        (minimize_by_name, tiny.Net, "32-true"),
        (take_gradients, tiny.Net, "32-true"),
    ],
)
def test_one_update_by_hand_is_the_automatic_one(act: Any, make: Any, precision: str):
    plateau = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=0))
    _, by_hand = trained(Manual(act, make, plateau), precision=precision)
    _, automatic = trained(tiny.Tiny(make, plateau), precision=precision)
    tiny.assert_same_bits(by_hand, automatic)


def test_several_updates_in_a_step_are_one_step():
    result, state = trained(Manual(minimize_twice))
    assert result.num_steps == 8
    assert state[".opt_state['default'][0].count"] == 16
    assert "train/loss" not in result.history


def test_parameters_of_other_optimizers_stay():
    optimizers = {n: Optimizer(optax.sgd(0.1), wrt=n) for n in ("first", "last", "norm")}
    act = lambda self, model, batch: self.minimize(loss_on(batch), model, "last")[0]  # noqa: E731
    module = Manual(act, tx=optimizers)
    trained(module)
    before = nnx.to_pure_dict(nnx.state(initial(tiny.Net), nnx.Param))
    after = tiny.params_of(module)
    same = [n for n, x in flat_items(before) if np.array(x).tobytes() == after[n].tobytes()]
    assert same == ["first/bias", "first/kernel", "norm/bias", "norm/scale"]


def clipped(self: Any, model: Any, batch: Any) -> Any:
    """Assign parameters to what they are."""
    loss, model = self.minimize(loss_on(batch), model)
    model.kernel[...] = jnp.clip(model.kernel[...], -9.0, 9.0)
    return loss


def test_assignment_that_changes_nothing_costs_no_digit():
    _, assigned = trained(Manual(clipped, tiny.line), precision="bf16-mixed")
    _, plain = trained(Manual(minimize, tiny.line), precision="bf16-mixed")
    tiny.assert_same_bits(assigned, plain)


def test_frozen_parameters_may_follow_by_assignment():
    def act(self: Any, model: Any, batch: Any) -> Any:
        loss, model = self.minimize(lambda model: loss_of(model.net, batch), model)
        model.target.kernel[...] = 0.5 * (model.target.kernel[...] + model.net.kernel[...])
        return loss

    make = lambda rngs: nnx.Dict(net=tiny.line(rngs), target=tiny.line(rngs))  # noqa: E731
    module = Manual(act, make, Optimizer(optax.sgd(0.0), wrt="net"))
    trained(module, max_steps=2)
    before = initial(make)
    want = before.target.kernel[...] / 4 + before.net.kernel[...] * 3 / 4
    np.testing.assert_allclose(module.model.target.kernel[...], want, rtol=1e-6)


class EquinoxNet(eqx.Module):
    linear: eqx.nn.Linear
    steps: jax.Array

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = eqx.nn.Linear(tiny.FEATURES, tiny.CLASSES, key=rngs.params())
        self.steps = jnp.zeros((), jnp.int32)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.linear)(x)

    def counted(self) -> EquinoxNet:
        return eqx.tree_at(lambda model: model.steps, self, self.steps + 1)


def equinox_gradients(self: Any, model: Any, batch: Any) -> Any:
    grads = eqx.filter_grad(loss_on(batch))(model)
    return {"model": self.apply_gradients(model, grads).counted()}


def equinox_minimize(self: Any, model: Any, batch: Any) -> Any:
    loss, model = self.minimize(loss_on(batch), model.counted())
    return loss


@pytest.mark.parametrize("act", [equinox_minimize, equinox_gradients])
def test_equinox_model_is_the_one_that_the_step_has_last(act: Any):
    module, automatic = Manual(act, EquinoxNet), tiny.Tiny(EquinoxNet)
    trained(module)
    trained(automatic)
    assert module.model.steps == 8
    np.testing.assert_array_equal(module.model.linear.weight, automatic.model.linear.weight)


def test_automatic_step_returns_an_equinox_model_that_it_has_changed():
    step = lambda self, m, b: {"loss": loss_on(b)(m), "model": m.counted()}  # noqa: E731
    module = type("Counting", (tiny.Tiny,), {"training_step": step})(EquinoxNet)
    trained(module)
    assert module.model.steps == 8


def test_dict_is_updated_in_place():
    def act(self: Any, model: Any, batch: Any) -> Any:
        def loss_fn(model: Any) -> Any:
            model["seen"] = model["seen"] + 1
            return ((batch["x"] @ model["params"]["kernel"]) ** 2).mean()

        self.minimize(loss_fn, model)
        return self.minimize(loss_fn, model)[0]

    make = lambda rngs: {"params": {"kernel": jnp.ones((4, 3))}, "seen": jnp.int32(0)}  # noqa: E731
    module = Manual(act, make, optax.sgd(0.1))
    trained(module)
    assert module.model["seen"] == 16
    assert np.all(module.model["params"]["kernel"] < 0.9)


def test_plan_of_a_manual_step_is_made():
    plan = tiny.make_trainer().plan(GAN(), tiny.make_batches(1)[0])
    assert plan.flops > 0


def test_stale_equinox_model_is_refused():
    def act(self: Any, model: Any, batch: Any) -> None:
        self.minimize(loss_on(batch), model)
        self.minimize(loss_on(batch), model)

    refused(StepError, "the model as it was before an update", module=Manual(act, EquinoxNet))


def in_scan(self: Any, model: Any, batch: Any) -> None:
    lax.scan(lambda c, _: (c, self.minimize(loss_on(batch), model)[0]), 0, length=2)


def log_in_the_loss(self: Any, model: Any, batch: Any) -> None:
    def loss_fn(model: Any) -> Any:
        self.log("inside", 1.0)
        return loss_on(batch)(model)

    self.minimize(loss_fn, model)


def assign_in_the_loss(self: Any, model: Any, batch: Any) -> None:
    def loss_fn(model: Any) -> Any:
        model.kernel[...] = model.kernel[...] * 0.5
        return loss_on(batch)(model)

    self.minimize(loss_fn, model)


def reshape(self: Any, model: Any, batch: Any) -> None:
    model.bias = nnx.Param(jnp.zeros(7))


@pytest.mark.parametrize(
    ("kind", "act", "part"),
    [
        (ConfigError, lambda s, m, b: s.minimize(loss_on(b), m, "critc"), "'critc'; configure_opt"),
        (
            ConfigError,
            lambda s, m, b: s.minimize(loss_on(b), m),
            "self.minimize(loss_fn, model, 'c",
        ),
        (StepError, lambda s, m, b: loss_on(b)(m), "changed no parameter"),
        (StepError, lambda s, m, b: s.minimize(loss_on(b), m, "critic"), "returned a tuple"),
        (StepError, lambda s, m, b: s.minimize(m, loss_on(b), "critic"), "a function for the mod"),
        (StepError, lambda s, m, b: s.minimize(lambda _: loss_on(b)(m), m, "critic"), "not depend"),
        (StepError, lambda s, m, b: s.minimize(lambda m: m(b["x"]), m, "critic"), "float32[8, 3]"),
        (StepError, lambda s, m, b: s.minimize(lambda m: (1, 2), m, "critic"), "has_aux=True"),
        (StepError, lambda s, m, b: s.apply_gradients(m, {}, "critic"), "got none for the param"),
        (StepError, lambda s, m, b: s.apply_gradients(m, b, "critic"), "got none for the param"),
    ],
)
def test_update_that_cannot_be_is_refused(kind: Any, act: Any, part: str):
    optimizers = {
        "critic": Optimizer(optax.sgd(0.1), wrt="kernel"),
        "other": Optimizer(optax.sgd(0.1), wrt="bias"),
    }
    act_by_name = Manual(act, tiny.line, optimizers)
    refused(kind, part, module=act_by_name)


@pytest.mark.parametrize(
    ("kind", "act", "part"),
    [
        (StepError, in_scan, "minimize() was called inside a nested transform"),
        (LogError, log_in_the_loss, "(`has_aux=True`, or an output of the scan)"),
        (StepError, assign_in_the_loss, "assigned to the parameters kernel"),
        (StepError, reshape, "assigned float32[7] to the parameter bias, which is float32[3]"),
    ],
)
def test_step_that_would_lose_its_update_is_refused(kind: Any, act: Any, part: str):
    refused(kind, part, module=Manual(act, tiny.line))


def test_minimize_without_its_switch_is_refused():
    step = lambda self, model, batch: self.minimize(loss_on(batch), model)  # noqa: E731
    part = "write `automatic_optimization = False` in the class Mine"
    refused(ConfigError, part, IN_TRAINING, module=module_with(training_step=step))


def test_minimize_elsewhere_is_refused():
    with pytest.raises(ConfigError, match="inside training_step only"):
        GAN().minimize(lambda model: 0.0, None)
    step = lambda self, model, batch: self.minimize(loss_on(batch), model)  # noqa: E731
    module = module_with(validation_step=step)
    refused(ConfigError, "training_step only", module=module, val_loader=tiny.make_batches(1))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"accumulate_grad_batches": 4}, "optax.MultiSteps(optax.adam(1e-3), every_k_schedule=4)"),
        ({"gradient_clip_val": 1.0}, "optax.chain(optax.clip_by_global_norm(1.0), optax.adam"),
        (
            {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            "optax.chain(optax.clip(0.5), optax.adam",
        ),
        ({"callbacks": [GradientMonitor()]}, "a callback that looks at updates (GradientMonitor)"),
    ],
)
def test_options_of_automatic_optimization_are_refused(options: Any, part: str):
    refused(
        ConfigError,
        "Manual has `automatic_optimization = False`",
        part,
        module=Manual(minimize),
        **options,
    )


def test_words_of_lightning_say_what_to_write():
    with pytest.raises(AttributeError, match=r"self\.minimize"):
        GAN().manual_backward(0.0)
