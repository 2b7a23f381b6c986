"""Every kind of model trains, keeps what its steps changed, and evaluates when it is trained."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

from jaxtrainer import TrainModule
from jaxtrainer.errors import StepError
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

X = jnp.asarray(tiny.make_arrays(64)["x"])


def train(module: TrainModule, **options: Any) -> Any:
    """Train long enough for the loss to fall, and check that it did."""
    result, _ = tiny.fit(module=module, **{"max_epochs": 6, **options})
    losses = result.history["train/loss"].values
    assert losses[-1] < 0.8 * losses[0], losses
    return result


class Counter(nnx.Variable):
    """The user's own kind of variable."""


class WithEverything(nnx.Module):
    """BatchNorm, Dropout, a list of layers and a counter."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(4, tiny.CLASSES, rngs=rngs)
        self.calls = Counter(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.last(self.dropout(self.norm(x)))


class Counting(tiny.Tiny):
    """Counts training steps in the model."""

    def training_step(self, model: Any, batch: Any) -> Any:
        model.calls[...] += 1
        return super().training_step(model, batch)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_model_state_moves_as_it_must(steps: int):
    module = Counting(WithEverything)
    result = train(module, max_epochs=12, steps_per_dispatch=steps)
    model = module.model
    assert int(model.calls[...]) == result.num_steps == 96
    assert int(model.dropout.rngs.count[...]) == 96
    assert np.all(np.abs(model.norm.mean[...]) > 1e-4)
    assert np.all(model.norm.var[...] != 1.0)


def test_model_after_fit_is_in_evaluation_mode():
    module = tiny.Tiny(WithEverything)
    train(module, max_epochs=12)
    model = module.model
    mean, count = np.array(model.norm.mean[...]), int(model.dropout.rngs.count[...])
    np.testing.assert_array_equal(model(X), model(X))
    # One row alone is no batch: only running statistics give it the same answer.
    np.testing.assert_allclose(model(X[:1]), model(X)[:1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.norm.mean[...], mean)
    assert int(model.dropout.rngs.count[...]) == count


def test_validation_leaves_the_model_state_alone():
    module, val_loader = tiny.Tiny(), tiny.make_batches(3)
    _, state = tiny.fit(val_loader=val_loader, module=module, max_epochs=2)
    _, without = tiny.fit(max_epochs=2)
    tiny.assert_same_bits(state, without)


def test_fit_again_goes_on_from_the_trained_model():
    module = tiny.Tiny()
    tiny.fit(module=module, max_epochs=1)
    before = tiny.params_of(module)
    count = int(module.model.dropout.rngs.count[...])
    tiny.fit(module=module, max_epochs=1)
    after = tiny.params_of(module)
    # The Dropout stream goes on, so the model was trained and not evaluated.
    assert int(module.model.dropout.rngs.count[...]) == 2 * count
    assert all(np.any(after[name] != before[name]) for name in before)
    assert all(np.max(np.abs(after[name] - before[name])) < 0.2 for name in before)


class Tied(nnx.Module):
    """The first kernel is the last one, transposed."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, tiny.CLASSES, rngs=rngs)
        self.last = nnx.Linear(4, tiny.CLASSES, rngs=rngs)
        self.last.kernel = self.first.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(self.first(x))
        return self.last(hidden @ self.last.kernel[...].T)


def test_tied_weights_stay_tied():
    module = tiny.Tiny(Tied, optax.sgd(0.1))
    train(module)
    assert module.model.first.kernel is module.model.last.kernel
    assert len(tiny.params_of(module)) == 3
    assert np.shape(module.model(X)) == (64, tiny.CLASSES)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(tiny.CLASSES)(jnp.tanh(x))


class LinenVariables(tiny.Tiny):
    """Linen's variables as a dict, changed by the step as Linen does it."""

    net: Any = LinenNet()

    def configure_model(self, rngs: nnx.Rngs) -> Any:
        return self.net.init(rngs.params(), X[:1])

    def training_step(self, model: Any, batch: Any) -> Any:
        logits, changed = self.net.apply(model, batch["x"], train=True, mutable=["batch_stats"])
        model["batch_stats"] = changed["batch_stats"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def validation_step(self, model: Any, batch: Any) -> None:
        logits = self.net.apply(model, batch["x"])
        self.log("accuracy", (logits.argmax(-1) == batch["label"]).mean())


def test_linen_variables_train():
    module = LinenVariables()
    result = train(module, val_loader=tiny.make_batches(3, ragged=2))
    mean = module.model["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.all(np.abs(mean) > 1e-4)
    logits = module.net.apply(module.model, X)
    labels = tiny.make_arrays(64)["label"]
    assert np.mean(np.argmax(logits, 1) == labels) > 0.7
    assert result.metrics["val/accuracy"] > 0.5


class BridgedModule(tiny.Tiny):
    def configure_model(self, rngs: nnx.Rngs) -> Any:
        return bridge.lazy_init(bridge.ToNNX(LinenNet(), rngs=rngs), X[:1])

    def training_step(self, model: Any, batch: Any) -> Any:
        logits = model(batch["x"], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def test_linen_through_the_bridge_trains():
    module = BridgedModule()
    train(module)
    means = nnx.to_pure_dict(nnx.state(module.model, nnx.BatchStat))
    assert np.all(np.abs(means["BatchNorm_0"]["mean"]) > 1e-4)
    assert np.shape(module.model(X)) == (64, tiny.CLASSES)


class EquinoxNet(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    steps: jax.Array
    activation: Any

    def __init__(self, key: jax.Array) -> None:
        first, last = jax.random.split(key)
        self.first = eqx.nn.Linear(4, 8, key=first)
        self.last = eqx.nn.Linear(8, tiny.CLASSES, key=last)
        self.dropout = eqx.nn.Dropout(0.1)
        self.steps = jnp.zeros((), jnp.int32)
        self.activation = jnp.tanh

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.last(self.dropout(self.activation(self.first(x)), key=key))


class Equinox(tiny.Tiny):
    def configure_model(self, rngs: nnx.Rngs) -> EquinoxNet:
        return EquinoxNet(rngs.params())

    def training_step(self, model: Any, batch: Any) -> Any:
        keys = jax.random.split(self.make_rng(), len(batch["x"]))
        logits = jax.vmap(model)(batch["x"], keys)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def validation_step(self, model: Any, batch: Any) -> None:
        logits = jax.vmap(model)(batch["x"])
        self.log("accuracy", (logits.argmax(-1) == batch["label"]).mean())


def test_equinox_model_trains_and_evaluates_without_dropout():
    module = Equinox(tx=optax.adam(3e-2))
    result = train(module, val_loader=tiny.make_batches(3, ragged=2))
    assert isinstance(module.model, EquinoxNet)
    assert module.model.activation is jnp.tanh
    assert result.metrics["val/accuracy"] > 0.6
    assert np.shape(jax.vmap(module.model)(X)) == (64, tiny.CLASSES)


def test_equinox_model_trained_again_has_its_dropout_back():
    module = Equinox()
    tiny.fit(module=module, max_steps=1)
    seen: list[bool] = []

    class Again(Equinox):
        def training_step(self, model: Any, batch: Any) -> Any:
            seen.append(model.dropout.inference)
            return super().training_step(model, batch)

    again = Again()
    again.model = module.model
    tiny.fit(module=again, max_steps=1)
    assert module.model.dropout.inference
    assert seen == [False]


class Functional(tiny.Tiny):
    """A dict of arrays and nothing else."""

    def configure_model(self, rngs: nnx.Rngs) -> dict[str, jax.Array]:
        kernel = 0.1 * jax.random.normal(rngs.params(), (4, tiny.CLASSES))
        return {"kernel": kernel, "bias": jnp.zeros(tiny.CLASSES)}

    def training_step(self, model: Any, batch: Any) -> Any:
        logits = batch["x"] @ model["kernel"] + model["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def test_dict_of_arrays_trains():
    module = Functional(tx=optax.sgd(0.3))
    train(module)
    assert set(module.model) == {"kernel", "bias"}


def test_change_that_jit_would_lose_is_refused():
    class Remembering(nnx.Linear):
        seen = 0

    class Forgetful(tiny.Tiny):
        def training_step(self, model: Any, batch: Any) -> Any:
            model.seen = 1
            return super().training_step(model, batch)

    make = lambda rngs: Remembering(4, tiny.CLASSES, rngs=rngs)  # noqa: E731
    with pytest.raises(StepError, match="attribute `seen`"):
        tiny.fit(module=Forgetful(make), max_steps=1)
