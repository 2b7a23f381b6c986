"""`LearningRateMonitor`: the rate of the step reported, from a schedule or the state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxtrainer import FitResult
from jaxtrainer.callbacks import LearningRateMonitor
from jaxtrainer.errors import ConfigError
from tests.bad_input import refused
from tests.tiny import Tiny, make_batches, make_trainer


def halving(count: Any) -> Any:
    return 0.1 * jnp.power(0.5, jnp.asarray(count, jnp.float32))


def fit(monitor: LearningRateMonitor, tx: Any, **options: Any) -> FitResult:
    trainer = make_trainer([monitor], **{"max_epochs": 1, "log_every_n_steps": 2, **options})
    return trainer.fit(Tiny(tx=tx), make_batches(8))


def test_schedule_is_evaluated_at_the_reported_steps():
    result = fit(LearningRateMonitor(schedule=halving), optax.sgd(halving))
    series = result.history.step["lr"]
    assert series.steps == result.history.step["train/loss"].steps == [2, 4, 6, 8]
    # float32 on the device, against Python's float: 2**-24 relative.
    assert series.values == pytest.approx([0.1 * 0.5 ** (n - 1) for n in series.steps], rel=1e-6)


def test_schedule_counts_optimiser_steps():
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 4}
    result = fit(LearningRateMonitor(schedule=halving), optax.sgd(halving), **options)
    series = result.history.step["lr"]
    assert series.steps == [2, 4]
    assert series.values == pytest.approx([0.05, 0.0125], rel=1e-6)


@pytest.mark.parametrize("steps_per_dispatch", [1, 4])
def test_injected_rate_is_that_of_the_update(steps_per_dispatch: int):
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=halving)
    result = fit(LearningRateMonitor(), tx, steps_per_dispatch=steps_per_dispatch)
    series = result.history.step["lr"]
    assert series.values == pytest.approx([0.1 * 0.5 ** (n - 1) for n in series.steps], rel=1e-6)
    assert series.steps[-1] == 8


def test_injected_rates_of_several_optimisers_have_their_labels():
    sgd = optax.inject_hyperparams(optax.sgd)
    rates: dict[Any, Any] = {"slow": sgd(learning_rate=0.01), "fast": sgd(learning_rate=0.1)}
    label = lambda path, _: "slow" if path[0].key == "first" else "fast"  # noqa: E731
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    result = fit(LearningRateMonitor(name="rate"), optax.partition(rates, labels))
    assert result.metrics["rate/slow"] == pytest.approx(0.01)
    assert result.metrics["rate/fast"] == pytest.approx(0.1)


def test_injected_rates_in_a_chain_are_numbered():
    sgd = optax.inject_hyperparams(optax.sgd)
    result = fit(LearningRateMonitor(), optax.chain(sgd(learning_rate=0.5), sgd(0.25)))
    assert (result.metrics["lr/0"], result.metrics["lr/1"]) == (0.5, 0.25)


def test_constant_is_recorded():
    result = fit(LearningRateMonitor(name="eta", schedule=0.5), optax.sgd(0.5))
    assert set(result.history.step["eta"].values) == {0.5}


def test_rate_that_cannot_be_known_says_what_to_pass():
    text = "`LearningRateMonitor(schedule=schedule)`"
    refused(
        ConfigError, text, module=Tiny(tx=optax.adam(halving)), callbacks=[LearningRateMonitor()]
    )


def test_schedule_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="schedule='cosine'"):
        LearningRateMonitor(schedule="cosine")  # pyright: ignore[reportArgumentType]
