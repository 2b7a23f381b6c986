"""Values of `flax.nnx.metrics` and Optax losses in `log`: exact means over the epoch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Accuracy
from jaxtrainer.errors import LogError
from jaxtrainer.metrics import Recorder
from tests import tiny
from tests.bad_input import assert_says, doing, refused

pytestmark = pytest.mark.usefixtures("compiled_once")


class Doubled(nnx.metrics.Average):
    def compute(self) -> jax.Array:
        return 2.0 * super().compute()


class Measured(tiny.Tiny):
    """Logs metrics that were made and updated in the step."""

    def validation_step(self, model: Any, batch: Any) -> Any:
        outputs = super().training_step(model, batch)
        # Flax adds whole numbers to floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            accuracy = nnx.metrics.Accuracy()
            accuracy.update(logits=outputs["logits"], labels=batch["label"])
            large, spread = nnx.metrics.Average(), nnx.metrics.Welford()
            x = batch["x"]
            large.update(values=x, mask=x > 0.5)
            spread.update(values=x)
        self.log("right", accuracy)
        self.log("large", large)
        self.log("mean", spread)
        self.log("last", accuracy.total[...] / accuracy.count[...].astype(jnp.float32))
        return outputs


def rows_of(batches: list[dict[str, np.ndarray]], key: str = "x") -> np.ndarray:
    return np.concatenate([b[key] for b in batches])


def measured(batches: Any, **options: Any) -> dict[str, float]:
    trainer = tiny.make_trainer([Accuracy()], **options)
    return trainer.test(Measured(), batches, verbose=False)


@pytest.mark.parametrize("devices", [1, 4])
def test_accuracy_of_flax_is_that_of_the_callback(devices: int):
    metrics = measured(tiny.make_batches(4, ragged=3), mesh={"data": devices})
    assert metrics["test/right"] == metrics["test/accuracy"]
    assert metrics["test/last"] == metrics["test/accuracy"]


def test_mean_counts_the_values_of_each_batch():
    batches = tiny.make_batches(4, ragged=3)
    x, metrics = rows_of(batches), measured(batches)
    # Sums of float32 in another order: 1e-6 of the largest term.
    assert metrics["test/large"] == pytest.approx(x[x > 0.5].mean(), rel=1e-6)
    assert metrics["test/mean"] == pytest.approx(x.mean(), abs=1e-6)


def test_batch_without_a_value_has_no_part_in_the_mean():
    batches = tiny.make_batches(4)
    batches[1]["x"][:] = -1.0
    x = rows_of(batches)
    assert measured(batches)["test/large"] == pytest.approx(x[x > 0.5].mean(), rel=1e-6)


def test_mean_of_no_value_at_all_is_nan():
    batches = tiny.make_batches(2)
    for batch in batches:
        batch["x"][:] = -1.0
    assert np.isnan(measured(batches)["test/large"])


class Training(tiny.Tiny):
    def training_step(self, model: Any, batch: Any) -> Any:
        outputs = super().training_step(model, batch)
        with jax.numpy_dtype_promotion("standard"):
            accuracy = nnx.metrics.Accuracy()
            accuracy.update(logits=outputs["logits"], labels=batch["label"])
        self.log("right", accuracy, prog_bar=True)
        return outputs


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_metric_of_a_training_step_is_reported_and_averaged(steps: int):
    result, _ = tiny.fit(
        module=Training(), callbacks=[Accuracy()], max_epochs=2, steps_per_dispatch=steps
    )
    for table in (result.history.step, result.history.epoch):
        assert table["train/right"].values == table["train/accuracy"].values
    assert len(result.history.epoch["train/right"]) == 2


def test_metric_in_a_hook_is_its_mean():
    class Hook(Callback):
        def on_train_epoch_end(self, run: Run) -> None:
            average = nnx.metrics.Average()
            average.update(values=jnp.array([1.0, 2.0, 6.0]))
            run.log("hook/mean", average)

    result, _ = tiny.fit(callbacks=[Hook()], max_epochs=1)
    assert result.metrics["hook/mean"] == 3.0


def average_of(kind: type[nnx.metrics.Average] = nnx.metrics.Average) -> Any:
    metric = kind()
    metric.update(values=jnp.array([1.0, 3.0]))
    return metric


def test_recorder_takes_the_weight_of_the_metric():
    recorder = Recorder("train", default_weight=8.0)
    recorder.log("mean", average_of())
    np.testing.assert_array_equal(recorder.row(), [2.0])
    np.testing.assert_array_equal(recorder.weight_row(), [2.0])


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (average_of, {"weight": 3.0}, "leave out `weight`"),
        (average_of, {"reduce": "sum"}, "leave out `weight` and `reduce`"),
        (lambda: nnx.MultiMetric(loss=average_of()), {}, r"self.log\('x/loss', metrics.loss\)"),
        (lambda: average_of(Doubled), {}, "a Doubled, which is no mean"),
        (lambda: nnx.metrics.Welford().compute(), {}, "of type Statistics"),
    ],
)
def test_metric_that_is_no_mean_is_refused(value: Any, options: Any, message: str):
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(LogError, match=message),
    ):
        Recorder("train").log("x", value(), **options)


def test_metric_that_is_part_of_the_model_is_refused():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.line = tiny.line(rngs)
            self.average = nnx.metrics.Average()

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.line(x)

    class Kept(tiny.Tiny):
        def training_step(self, model: Any, batch: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                model.average.update(values=batch["x"])
            self.log("x", model.average)
            return super().training_step(model, batch)

    parts = ("Kept.training_step logged `model.average`", "metric = nnx.metrics.Average()")
    refused(LogError, *parts, module=Kept(make=Net))


def test_loss_of_optax_is_a_scalar_as_any_other():
    class Losses(tiny.Tiny):
        def validation_step(self, model: Any, batch: Any) -> Any:
            predicted = model(batch["x"])[:, 0]
            self.log("l2", optax.losses.squared_error(predicted).mean())
            self.log("norm", optax.tree.norm({"x": batch["x"]}), reduce="max")

    batches = tiny.make_batches(3, ragged=2)
    metrics = tiny.make_trainer().validate(Losses(make=tiny.line), batches, verbose=False)
    norms = [np.sqrt((b["x"] ** 2).sum()) for b in batches]
    assert metrics["val/norm"] == pytest.approx(max(norms), rel=1e-6)
    assert 0.0 < metrics["val/l2"] < np.inf


def test_losses_of_the_samples_are_to_be_reduced():
    def log_losses(self: Any, model: Any, batch: Any) -> None:
        self.log("l2", optax.losses.squared_error(batch["x"][:, 0]))

    error = refused(LogError, "shape (8,)", module=doing(log_losses))
    assert_says(error, "`log('l2', jnp.mean(value))`")
