"""`build_step`: a loop of one's own makes the same numbers as `Trainer.fit`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrainer import build_step
from jaxtrainer.errors import AttributeChangedError, ConfigError, DataError
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

FEW: dict[str, Any] = {"mesh": {"data": 1}, "steps_per_dispatch": 4, "compilation_cache": False}


def build(module: Any = None, loader: Any = None, **options: Any) -> Any:
    loader = tiny.make_loader() if loader is None else loader
    return build_step(module or tiny.Tiny(), loader, **{**FEW, **options})


def run(step: Any, feed: Any, epochs: int = 2, seed: int = 0) -> tuple[Any, list[Any]]:
    """The state after some epochs, and what was logged."""
    state, logged = step.init(seed), []
    with feed:
        for _ in range(epochs):
            for batches in feed:
                state, values = step(state, batches)
                logged.append(values)
    return state, logged


@pytest.mark.parametrize(
    "options",
    [{"steps_per_dispatch": 1}, {"steps_per_dispatch": 3}, {"accumulate_grad_batches": 3}],
    ids=["single", "fused", "window"],
)
def test_own_loop_is_fit_to_the_bit(options: Any):
    _, want = tiny.fit(max_epochs=2, seed=5, **options)
    state, _ = run(*build(**options), seed=5)
    tiny.assert_same_bits(tiny.host_state(state), want)


def test_batches_of_any_loader_are_those_of_fit():
    batches = tiny.make_batches(5, ragged=3)
    _, want = tiny.fit(batches, max_epochs=2)
    state, _ = run(*build(loader=batches))
    tiny.assert_same_bits(tiny.host_state(state), want)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_logged_values_are_those_of_fit(steps: int):
    result, _ = tiny.fit(max_epochs=2, log_every_n_steps=1, steps_per_dispatch=steps)
    step, feed = build(steps_per_dispatch=steps)
    state, logged = run(step, feed)
    losses = np.concatenate([values["train/loss"] for values in logged])
    np.testing.assert_array_equal(
        losses, np.asarray(result.history.step["train/loss"].values, np.float32)
    )
    assert step.means(state) == {"train/loss": result.history.epoch["train/loss"].values[-1]}
    assert [*logged[0]] == ["train/loss"]
    with pytest.raises(KeyError, match="'acc' was not logged; logged: train/loss"):
        logged[0]["acc"]


def test_a_pass_over_the_feed_is_the_rest_of_an_epoch():
    _, feed = build(steps_per_dispatch=2)
    with feed:
        seen = [next((b.epoch, b.batch_idx) for b in feed)]
        seen += [(b.epoch, b.batch_idx) for _ in range(2) for b in feed]
    assert feed.num_batches == 8
    assert seen == [(epoch, i) for epoch in range(2) for i in (0, 2, 4, 6)]


def test_states_in_turn_are_each_as_if_alone():
    step, feed = build()
    states = [step.init(seed) for seed in (0, 1)]
    with feed:
        for batches in feed:
            states = [step(state, batches)[0] for state in states]
    for seed, state in enumerate(states):
        alone, _ = run(*build(), epochs=1, seed=seed)
        tiny.assert_same_bits(tiny.host_state(state), tiny.host_state(alone))


def test_model_outlives_its_state():
    step, feed = build()
    with feed:
        state = step.init()
        model = step.model(state)
        before = np.array(model(jnp.ones((1, tiny.FEATURES))))
        state, _ = step(state, next(iter(feed)))
    assert np.all(np.isfinite(before))
    np.testing.assert_array_equal(model(jnp.ones((1, tiny.FEATURES))), before)
    assert np.any(step.model(state)(jnp.ones((1, tiny.FEATURES))) != before)


def test_states_start_from_a_trained_model():
    module = tiny.Tiny()
    tiny.fit(module=module, max_epochs=1)
    step, feed = build(module)
    feed.close()
    started = tiny.host_state(step.init().params)
    kernel = module.model.first.kernel[...]
    np.testing.assert_array_equal(started["['first']['kernel']"], kernel)


def test_number_of_steps_is_known_to_schedules():
    class Scheduled(tiny.Tiny):
        def configure_optimizers(self) -> Any:
            assert self.run is not None
            self.steps = self.run.estimated_steps
            return optax.adam(1e-3)

    module = Scheduled()
    build(module, max_epochs=3)[1].close()
    assert module.steps == 24


def test_module_is_frozen_until_the_feed_is_closed():
    class Scaled(tiny.Tiny):
        scale = 1.0

        def training_step(self, model: Any, batch: Any) -> Any:
            return self.scale * super().training_step(model, batch)["loss"]

    module = Scaled()
    _, feed = build(module)
    with pytest.raises(AttributeChangedError, match=r"Scaled\.scale"):
        module.scale = 2.0
    feed.close()
    module.scale = 2.0


def test_what_cannot_work_is_refused_and_nothing_left_open():
    with pytest.raises(DataError, match="no batches"):
        build(loader=[])
    with pytest.raises(ConfigError, match="expected an instance of a TrainModule"):
        build_step(object(), tiny.make_loader())  # pyright: ignore[reportArgumentType]
    module = tiny.Tiny(tx=lambda: None)
    with pytest.raises(ConfigError, match="configure_optimizers returned"):
        build(module)
    module.tx = optax.adam(1e-3)
    build(module)[1].close()
