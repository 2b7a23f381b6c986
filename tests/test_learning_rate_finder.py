"""The range test: what it finds, and that the run after it is as if it had not been."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrainer import TrainModule, data
from jaxtrainer.callbacks import Checkpoint, LearningRateFinder
from jaxtrainer.callbacks.learning_rate_finder import end_of_curve, smooth, suggest
from jaxtrainer.errors import ConfigError, MissingExtraError, OptionError
from tests import tiny
from tests.bad_input import Compilations, assert_says, refused

pytestmark = pytest.mark.usefixtures("compiled_once")

TEST = "learning rate range test"
CURVATURE = 10.0


class Rated(tiny.Tiny):
    """Trains `Net` with Adam at its `learning_rate`; `tx` makes another optimiser of the rate."""

    def __init__(self, learning_rate: float = 1e-3, tx: Callable[[Any], Any] = optax.adam) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.tx = tx

    def configure_optimizers(self) -> Any:
        return self.tx(self.learning_rate)


class Bowl(TrainModule):
    """Gradient descent in a quadratic bowl: stable below `2 / CURVATURE`, diverging above."""

    def __init__(self, start: float = 1.0) -> None:
        self.learning_rate = 1e-3
        self.start = start

    def configure_model(self, rngs: Any) -> Any:
        return {"x": jnp.full((8,), self.start)}

    def configure_optimizers(self) -> Any:
        return optax.sgd(self.learning_rate)

    def training_step(self, model: Any, batch: Any) -> Any:
        steepness = jnp.linspace(CURVATURE / 10, CURVATURE, 8)
        return (steepness * model["x"] ** 2).sum() / 2 + 0.0 * batch["x"].mean()


class Reshuffled:
    """Batches whose order depends on how often it was iterated, as with a global generator."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.buffer = {k: np.empty_like(a) for k, a in tiny.make_batches(1)[0].items()}

    def __iter__(self) -> Iterator[Any]:
        batches = tiny.make_batches(8)
        for i in self.rng.permutation(8):
            # One buffer for all batches, as some loaders have.
            for name, array in batches[i].items():
                self.buffer[name][...] = array
            yield self.buffer


def with_cosine(rate: Any) -> Any:
    schedule: Any = rate if callable(rate) else optax.cosine_decay_schedule(rate, 100)
    return optax.adam(schedule)


def notices_of(module: TrainModule) -> list[str]:
    assert module.run is not None
    return module.run.notices


def found_in(module: TrainModule, loader: Any = None, **options: Any) -> LearningRateFinder:
    finder = LearningRateFinder(**{"num_training_steps": 20, "max_lr": 10.0, **options})
    trainer = tiny.make_trainer([finder])
    trainer.tune(module, tiny.make_batches(4) if loader is None else loader)
    return finder


@pytest.mark.parametrize(
    ("make_loader", "steps"),
    [
        (tiny.make_loader, 4),
        pytest.param(tiny.make_loader, 1, marks=pytest.mark.slow),
        pytest.param(tiny.make_batches, 4, marks=pytest.mark.slow),
        (Reshuffled, 4),
        (lambda: iter(tiny.make_batches(16)), 4),
        (lambda: data.on_device(Reshuffled(), lambda batch: {**batch, "x": batch["x"] / 2}), 4),
    ],
    ids=["arrays", "single", "list", "reshuffled", "read_once", "transformed"],
)
def test_run_after_the_finder_is_the_one_without_it(make_loader: Any, steps: int):
    # Into the second epoch, but for the loader that has one of sixteen batches.
    options: Any = {"max_steps": 12, "max_epochs": 2, "steps_per_dispatch": steps}
    finder, module = LearningRateFinder(num_training_steps=5), Rated()
    _, state = tiny.fit(make_loader(), module=module, callbacks=[finder], **options)
    _, expected = tiny.fit(make_loader(), module=Rated(module.learning_rate), **options)
    tiny.assert_same_bits(state, expected)


def test_module_is_trained_at_the_suggestion():
    finder, module = LearningRateFinder(num_training_steps=20), Rated()
    tiny.fit(module=module, callbacks=[finder], max_epochs=1)
    assert finder.suggestion is not None
    assert module.learning_rate == finder.suggestion
    assert finder.min_lr < finder.suggestion < finder.max_lr


def test_suggestion_is_stable_on_a_quadratic():
    finder = found_in(Bowl(), num_training_steps=100)
    assert finder.suggestion is not None
    # Between what moves in a hundred steps and what diverges.
    assert 0.01 / CURVATURE < finder.suggestion < 2 / CURVATURE


def test_curve_ends_where_the_loss_rises():
    finder = found_in(Bowl(), num_training_steps=100)
    least = finder.losses.min()
    assert finder.losses[-1] > 4 * least
    assert finder.losses[-2] <= 4 * least
    assert len(finder.lrs) == len(finder.losses) == len(finder.raw_losses) < 100
    assert finder.lrs[-1] > 2 / CURVATURE


def test_losses_are_those_of_gradient_descent_by_hand():
    finder = found_in(Bowl(), num_training_steps=20, early_stop_threshold=None, max_lr=0.1)
    x, steepness, losses = np.ones(8), np.linspace(CURVATURE / 10, CURVATURE, 8), []
    for rate in np.geomspace(1e-8, 0.1, 20):
        losses.append((steepness * x**2).sum() / 2)
        x -= rate * steepness * x
    # float32 against float64, over twenty steps.
    np.testing.assert_allclose(finder.raw_losses, losses, rtol=1e-5)


def test_range_test_is_one_compilation():
    seen = Compilations()
    finder = LearningRateFinder(num_training_steps=20)
    tiny.fit(tiny.make_batches(3), module=Rated(), callbacks=[seen, finder], max_epochs=1)
    assert seen.names == [TEST, "train step"]


def test_rates_count_updates_when_gradients_accumulate():
    finder = LearningRateFinder(num_training_steps=20, max_lr=10.0)
    tiny.make_trainer([finder], accumulate_grad_batches=3).tune(Bowl(), tiny.make_batches(4))
    expected = found_in(Bowl()).raw_losses
    # The mean of three equal losses, in float32.
    np.testing.assert_allclose(finder.raw_losses, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_suggestion_does_not_depend_on_the_devices(devices: int):
    finder = LearningRateFinder(num_training_steps=20, max_lr=10.0)
    tiny.make_trainer([finder], mesh={"data": devices}).tune(Bowl(), tiny.make_batches(4))
    assert finder.suggestion == found_in(Bowl()).suggestion


@pytest.mark.parametrize(
    "tx",
    [
        lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
        pytest.param(
            lambda rate: optax.chain(optax.clip(1.0), optax.sgd(rate / 2, momentum=0.9)),
            marks=pytest.mark.slow,
        ),
        with_cosine,
    ],
    ids=["injected", "scaled", "schedule"],
)
def test_optimisers_that_take_the_rate_are_tested(tx: Any):
    finder = found_in(module := Rated(tx=tx), max_lr=1.0)
    assert finder.losses[-1] != finder.losses[0]
    tiny.fit(module=module, max_epochs=1)


def test_attribute_stays_without_update_attr():
    finder, module = LearningRateFinder(num_training_steps=20, update_attr=False), Rated(0.25)
    tiny.fit(module=module, callbacks=[finder], max_epochs=1)
    assert module.learning_rate == 0.25
    assert finder.suggestion is not None
    (line,) = [n for n in notices_of(module) if "learning_rate" in n]
    assert f"suggested learning_rate: {finder.suggestion:.3g}" in line
    assert "it stays 0.25" in line


def test_attribute_stays_when_the_loss_does_not_fall():
    finder = found_in(module := Bowl(start=0.0))
    assert finder.suggestion is None
    assert module.learning_rate == 1e-3
    assert any("the loss does not fall" in n for n in notices_of(module))


def test_class_attribute_is_not_shadowed_by_the_test():
    class Shared(Bowl):
        learning_rate = 1e-3

        def __init__(self) -> None:
            self.start = 1.0

    found_in(module := Shared(), update_attr=False)
    assert "learning_rate" not in vars(module)


@pytest.mark.slow
def test_resumed_run_keeps_the_rate_that_was_found(tmp_path: Any):
    def make() -> Any:
        return LearningRateFinder(num_training_steps=20), Checkpoint(tmp_path / "run")

    _, expected = tiny.fit(module=(whole := Rated()), callbacks=make()[:1], max_epochs=2)
    tiny.fit(module=Rated(), callbacks=make(), max_steps=5)
    finder, saver = make()
    seen, module = Compilations(), Rated()
    callbacks = [seen, finder, saver]
    _, state = tiny.fit(module=module, callbacks=callbacks, max_epochs=2, ckpt_path="last")
    assert TEST not in seen.names
    assert finder.suggestion == module.learning_rate == whole.learning_rate
    tiny.assert_same_bits(state, expected)


def test_loader_with_fewer_batches_begins_again():
    finder = found_in(Rated(), tiny.make_batches(3), num_training_steps=20)
    assert len(finder.raw_losses) == 20


def test_one_pass_loader_with_fewer_batches_is_trained_on_whole():
    finder = LearningRateFinder(num_training_steps=20)
    loader = iter(tiny.make_batches(3))
    result, _ = tiny.fit(loader, module=Rated(), callbacks=[finder], max_epochs=1)
    assert len(finder.raw_losses) == 20
    assert result.num_steps == 3


def test_device_transform_is_part_of_the_test():
    batches = tiny.make_batches(4)
    halved = [{**batch, "x": batch["x"] / 2} for batch in batches]
    on_device = data.on_device(batches, lambda batch: {**batch, "x": batch["x"] / 2})
    # Halving is exact, but XLA may fuse it with what follows.
    expected = found_in(Rated(), halved).raw_losses
    np.testing.assert_allclose(found_in(Rated(), on_device).raw_losses, expected, rtol=1e-5)


def test_fast_dev_run_leaves_the_test_out():
    finder, module = LearningRateFinder(), Rated(0.5)
    tiny.fit(module=module, callbacks=[finder], fast_dev_run=True)
    assert finder.suggestion is None
    assert module.learning_rate == 0.5


def test_tune_without_a_finder_is_refused():
    with pytest.raises(ConfigError, match="no callback of the trainer finds anything"):
        tiny.make_trainer().tune(Rated(), tiny.make_batches(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_lr": 1.0, "max_lr": 1e-3}, "0 < min_lr < max_lr"),
        ({"min_lr": 0.0}, "0 < min_lr < max_lr"),
        ({"max_lr": math.inf}, "0 < min_lr < max_lr"),
        ({"num_training_steps": 2}, "num_training_steps"),
        ({"early_stop_threshold": 1.0}, "a number above 1, or None"),
    ],
)
def test_options_that_are_no_range_are_refused(options: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        LearningRateFinder(**options)


def test_option_of_another_library_is_explained():
    options: Any = {"attr_name": "lr"}
    with pytest.raises(OptionError, match="It is called `attr`"):
        LearningRateFinder(**options)


def test_missing_attribute_is_refused():
    module = Rated()
    module.lr = module.__dict__.pop("learning_rate")
    words = "Rated has no such attribute", "Did you mean 'lr'?"
    refused(ConfigError, *words, module=module, callbacks=[LearningRateFinder()])


def test_optimiser_that_does_not_use_the_rate_is_refused():
    module = Rated(tx=lambda rate: optax.adam(1e-3))
    words = "Rated.configure_optimizers does not use `self.learning_rate`", "optax.adam(self."
    refused(ConfigError, *words, module=module, callbacks=[LearningRateFinder()])
    assert module.learning_rate == 1e-3


@pytest.mark.parametrize(
    "tx",
    [
        lambda rate: optax.adam(optax.cosine_decay_schedule(rate, 100)),
        lambda rate: optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, 10, 100)),
        lambda rate: optax.adam(float(rate)),
        lambda rate: optax.adam(jnp.asarray(rate)),
        lambda rate: optax.adam(rate if rate < 1 else 1.0),
        lambda rate: optax.scale(rate),
    ],
    ids=["cosine", "warmup", "float", "array", "compared", "scale"],
)
def test_rate_that_is_computed_with_is_refused(tx: Any):
    module, callbacks = Rated(tx=tx), [LearningRateFinder()]
    refused(ConfigError, "`rate = self.learning_rate`", module=module, callbacks=callbacks)
    assert module.learning_rate == 1e-3


def test_loss_that_is_nan_at_once_is_refused():
    with pytest.raises(ConfigError) as caught:
        found_in(Bowl(start=math.nan))
    assert_says(caught.value, "is nan at its first step", "1e-08")


def test_plot_draws_the_curve_and_the_suggestion():
    finder, drawn = found_in(Bowl(), num_training_steps=50), []

    class Axes:
        def plot(self, x: Any, y: Any, *_: Any, **options: Any) -> None:
            drawn.append((len(x), options["label"]))

        def set(self, **options: Any) -> None:
            assert options["xscale"] == "log"
            # What diverges goes off the top, and does not set the scale.
            assert options["ylim"][1] < finder.raw_losses[-1]

        def legend(self) -> None:
            pass

    assert finder.plot(axes := Axes()) is axes
    length = len(finder.lrs)
    assert drawn == [(length, "loss"), (length, "smoothed"), (1, f"{finder.suggestion:.3g}")]


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    finder = found_in(Bowl())
    with pytest.raises(MissingExtraError, match=r"pip install 'jaxtrainer\[plot\]'"):
        finder.plot()


def test_plot_before_a_test_is_refused():
    with pytest.raises(ConfigError, match="no curve to plot"):
        LearningRateFinder().plot()


def test_curve_of_negative_losses_ends_as_far_above_its_minimum():
    losses = np.array([-1.0, -2.0, 3.9, 4.1, 9.0])
    assert end_of_curve(losses, threshold=4.0) == 4
    assert end_of_curve(losses, threshold=None) == 5
    assert end_of_curve(np.array([1.0, math.inf]), threshold=None) == 1


def test_suggestion_ignores_the_spikes_of_a_loss_that_diverges():
    losses = np.concatenate([np.ones(10), np.linspace(1, 0.5, 10), [0.5] * 5, [9.0, 1.0] * 5])
    lrs = np.geomspace(1e-6, 1, len(losses))
    found = suggest(lrs, losses, window=5)
    assert found is not None
    assert lrs[10] <= found <= lrs[20]


def test_smoothed_losses_start_at_the_first_and_follow():
    smoothed = smooth(np.array([4.0, 2.0, 2.0, 2.0]))
    assert smoothed[0] == pytest.approx(4.0)
    assert np.all(np.diff(smoothed) < 0)


class Manual(Rated):
    """Makes its updates itself, `updates` in a step."""

    automatic_optimization = False
    updates = 1

    def training_step(self, model: Any, batch: Any) -> Any:
        def loss_fn(model: Any) -> Any:
            logits = model(batch["x"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean()

        loss = jnp.zeros(())
        for _ in range(self.updates):
            loss, model = self.minimize(loss_fn, model)
        return loss


@pytest.mark.slow
def test_step_that_makes_its_own_update_is_tested():
    finder = found_in(module := Manual())
    assert len(finder.raw_losses) == 20
    _, state = tiny.fit(module=module, max_epochs=1)
    assert state


@pytest.mark.parametrize(
    ("module", "updates"),
    [
        (type("Twice", (Manual,), {"updates": 2})(), 40),
        (Rated(tx=lambda rate: optax.MultiSteps(optax.adam(rate), 4).gradient_transformation()), 5),
    ],
    ids=["minimize_twice", "multi_steps"],
)
def test_optimiser_that_does_not_make_one_update_a_step_is_refused(module: Any, updates: int):
    with pytest.raises(ConfigError, match=f"made {updates} updates in 20 steps"):
        found_in(module)


@pytest.mark.slow
def test_trained_module_is_where_a_second_test_starts():
    first, second = Rated(0.01), Rated(0.01)
    for module in (first, second):
        tiny.fit(module=module, max_epochs=1)
    finder = LearningRateFinder(num_training_steps=20)
    _, state = tiny.fit(module=first, callbacks=[finder], max_epochs=1)
    second.learning_rate = first.learning_rate
    tiny.assert_same_bits(state, tiny.fit(module=second, max_epochs=1)[1])
    fresh = LearningRateFinder(num_training_steps=20)
    tiny.fit(module=Rated(0.01), callbacks=[fresh], max_epochs=1)
    assert finder.raw_losses[0] < fresh.raw_losses[0]
