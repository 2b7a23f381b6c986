"""By law: N micro-batches to an update are one batch of all their samples.

Tolerance: both add up the same gradients in float32, in another order, so that they differ by a
few units in the last place (6e-8) per update; there are six updates at most, with numbers of
order one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, Run, TrainModule
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

RATE = 0.1
TOLERANCE: Any = {"rtol": 2e-6, "atol": 2e-7}


class Regression(TrainModule):
    """Weighted least squares: the loss of a batch is its weighted mean."""

    def __init__(self, tx: Any = None) -> None:
        self.tx = tx or optax.sgd(RATE)

    def configure_model(self, rngs: nnx.Rngs) -> nnx.Linear:
        zeros = nnx.initializers.zeros_init()
        return nnx.Linear(tiny.FEATURES, 1, kernel_init=zeros, rngs=rngs)

    def configure_optimizers(self) -> Any:
        return self.tx

    def training_step(self, model: Any, batch: Any) -> dict[str, Any]:
        errors = (model(batch["x"])[:, 0] - batch["y"]) ** 2
        weight = batch["w"].sum()
        return {"loss": (errors * batch["w"]).sum() / weight, "weight": weight}


def make_rows(rows: int) -> dict[str, np.ndarray]:
    x = tiny.make_arrays(rows)["x"]
    y = x @ np.array([1.0, -2.0, 0.5, 3.0], np.float32) + 0.25
    # Weights grow, so that the batches of a window have others.
    return {"x": x, "y": y, "w": np.linspace(1.0, 3.0, rows, dtype=np.float32)}


def cut(arrays: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    starts = range(0, len(arrays["x"]), size)
    return [{k: a[i : i + size] for k, a in arrays.items()} for i in starts]


def trained(loader: Any, tx: Any = None, **options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    module = Regression(tx)
    result, _ = tiny.fit(loader, module=module, **options)
    return result, tiny.params_of(module)


def descend(windows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Gradient descent in NumPy, one update a window."""
    kernel, bias = np.zeros(tiny.FEATURES), 0.0
    for rows in windows:
        error = rows["w"] * (rows["x"] @ kernel + bias - rows["y"]) / rows["w"].sum()
        kernel -= RATE * 2 * error @ rows["x"]
        bias -= RATE * 2 * error.sum()
    return {"bias": np.array([bias]), "kernel": kernel[:, None]}


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_micro_batches_are_one_batch(steps: int):
    rows, options = make_rows(72), {"max_epochs": 2, "steps_per_dispatch": steps}
    _, small = trained(cut(rows, 8), accumulate_grad_batches=3, **options)
    _, large = trained(cut(rows, 24), **options)
    assert_close(small, large)


def test_micro_batches_are_clipped_together():
    rows = make_rows(48)
    options: Any = {"max_epochs": 1, "gradient_clip_val": 0.5}
    _, small = trained(cut(rows, 8), accumulate_grad_batches=3, **options)
    _, large = trained(cut(rows, 24), **options)
    _, free = trained(cut(rows, 24), max_epochs=1)
    assert_close(small, large)
    assert not np.allclose(large["kernel"], free["kernel"], rtol=0.1)


def test_one_batch_a_window_is_plain_descent():
    rows = make_rows(24)
    _, params = trained(cut(rows, 8), max_epochs=1)
    assert_close(params, descend(cut(rows, 8)))


def test_window_cut_short_is_weighed_by_what_it_has():
    rows = make_rows(56)
    _, params = trained(cut(rows, 8), accumulate_grad_batches=3, max_epochs=1)
    # 7 batches: two windows of 24 rows, and the last of 8.
    assert_close(params, descend(cut(rows, 24)))


def test_window_does_not_reach_into_the_next_epoch():
    rows = make_rows(32)
    _, params = trained(cut(rows, 8), accumulate_grad_batches=3, max_epochs=2)
    assert_close(params, descend([*cut(rows, 24), *cut(rows, 24)]))


def test_window_as_long_as_the_epoch_or_longer_is_one_update():
    rows = make_rows(32)
    result, params = trained(cut(rows, 8), accumulate_grad_batches=9, max_epochs=1)
    assert result.num_steps == 1
    assert_close(params, descend([rows]))


def test_global_step_counts_updates():
    rows = make_rows(56)
    result, _ = trained(cut(rows, 8), accumulate_grad_batches=3, max_epochs=2, log_every_n_steps=1)
    assert (result.num_steps, result.num_samples) == (6, 112)
    # The updates done after each of seven batches.
    first = [0, 0, 1, 1, 1, 2, 3]
    assert result.history.step["train/loss"].steps == [*first, *(3 + n for n in first)]
    assert result.history.epoch["train/loss"].steps == [3, 6]


def test_max_steps_counts_updates():
    rows = make_rows(56)
    result, params = trained(cut(rows, 8), accumulate_grad_batches=3, max_steps=2)
    assert (result.num_steps, result.num_samples) == (2, 48)
    assert_close(params, descend(cut(rows, 24)[:2]))


def test_schedule_counts_updates():
    # The rate is zero from the second update on.
    tx = optax.sgd(optax.piecewise_constant_schedule(RATE, {1: 0.0}))
    rows = make_rows(72)
    _, params = trained(cut(rows, 8), tx, accumulate_grad_batches=3, max_epochs=1)
    assert_close(params, descend(cut(rows, 24)[:1]))


def test_periods_count_updates():
    seen: list[int] = []

    class Every(Callback):
        every_n_train_steps = 2

        def on_save_point(self, run: Run) -> None:
            seen.append(run.total_batches)

    trained(
        cut(make_rows(80), 8),
        callbacks=[Every()],
        accumulate_grad_batches=3,
        max_epochs=1,
        steps_per_dispatch=10,
    )
    assert seen == [6, 10]
