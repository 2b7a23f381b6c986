"""Clipping, the gradient norm, and a rate that falls on a plateau: as written by hand with Optax.

Tolerance: the same float32 operations in programs that XLA may order otherwise, a few units in
the last place (6e-8) for each of at most 16 updates.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from tests.test_accumulation import RATE, Regression, cut, make_rows

pytestmark = pytest.mark.usefixtures("compiled_once")

ROUNDING: Any = {"rtol": 5e-6, "atol": 5e-7}


def plateau() -> Any:
    # The loss falls by less than a tenth between most updates, so that the rate does, too.
    falls = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.1)
    return optax.chain(optax.sgd(RATE), falls)


def by_hand(batches: list[dict[str, np.ndarray]], tx: Any) -> dict[str, Any]:
    """Train the regression with Optax alone; returns parameters, norms and optimiser state."""

    def loss_of(params: Any, batch: Any) -> Any:
        errors = ((batch["x"] @ params["kernel"])[:, 0] + params["bias"] - batch["y"]) ** 2
        return (errors * batch["w"]).sum() / batch["w"].sum()

    params: Any = {"bias": jnp.zeros((1,)), "kernel": jnp.zeros((tiny.FEATURES, 1))}
    state, norms = tx.init(params), []
    for batch in batches:
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        norms.append(float(optax.tree.norm(grads)))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    return {"params": jax.tree.map(np.asarray, params), "norms": norms, "state": state}


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({"gradient_clip_val": 0.5}, optax.clip_by_global_norm(0.5)),
        ({"gradient_clip_val": 0.2, "gradient_clip_algorithm": "value"}, optax.clip(0.2)),
    ],
    ids=["norm", "value"],
)
def test_clipping_is_that_of_optax(options: Any, clip: Any):
    batches, module = cut(make_rows(64), 8), Regression()
    tiny.fit(batches, module=module, max_epochs=1, **options)
    expected = by_hand(batches, optax.chain(clip, optax.sgd(RATE)))["params"]
    free = by_hand(batches, optax.sgd(RATE))["params"]
    for name, array in tiny.params_of(module).items():
        np.testing.assert_allclose(array, expected[name], **ROUNDING, err_msg=name)
        assert not np.allclose(array, free[name], rtol=0.01)


def test_gradient_norm_is_that_before_clipping():
    batches = cut(make_rows(64), 8)
    options: Any = {"gradient_clip_val": 0.5, "log_every_n_steps": 1}
    result, _ = tiny.fit(batches, module=Regression(), max_epochs=1, **options)
    expected = by_hand(batches, optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(RATE)))
    norms = result.history.step["train/grad_norm"].values
    np.testing.assert_allclose(norms, expected["norms"], rtol=1e-5)
    assert max(norms) > 0.5


def test_gradient_norm_is_that_of_the_latest_window():
    rows = make_rows(56)
    options: Any = {"gradient_clip_val": 0.5, "log_every_n_steps": 1, "max_epochs": 1}
    result, _ = tiny.fit(cut(rows, 8), module=Regression(), accumulate_grad_batches=3, **options)
    series = result.history.step["train/grad_norm"]
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(RATE))
    norms = by_hand(cut(rows, 24), tx)["norms"]
    # Batches 3 to 7 of 7: none is known before the first update.
    assert series.steps == [1, 1, 1, 2, 3]
    np.testing.assert_allclose(series.values, np.take(norms, [0, 0, 0, 1, 2]), rtol=1e-5)


def test_gradient_norm_is_not_reported_where_values_are_clipped():
    options: Any = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
    result, _ = tiny.fit(cut(make_rows(16), 8), module=Regression(), max_epochs=1, **options)
    assert [*result.history] == ["train/loss"]


def test_rate_falls_on_a_plateau_of_the_loss():
    batches, module = cut(make_rows(64), 8), Regression(plateau())
    _, state = tiny.fit(batches, module=module, max_epochs=2)
    expected = by_hand([*batches, *batches], plateau())
    for name, array in tiny.params_of(module).items():
        np.testing.assert_allclose(array, expected["params"][name], **ROUNDING, err_msg=name)
    scale = state[".opt_state['default'][1].scale"]
    assert scale == expected["state"][1].scale
    assert scale < 1.0


def test_plateau_sees_the_mean_loss_of_a_window():
    rows = make_rows(72)
    options: Any = {"max_epochs": 2}
    small, large = Regression(plateau()), Regression(plateau())
    _, state = tiny.fit(cut(rows, 8), module=small, accumulate_grad_batches=3, **options)
    _, expected = tiny.fit(cut(rows, 24), module=large, **options)
    best = ".opt_state['default'][1].best_value"
    np.testing.assert_allclose(state[best], expected[best], rtol=1e-5)
    for name, array in tiny.params_of(small).items():
        np.testing.assert_allclose(array, tiny.params_of(large)[name], **ROUNDING, err_msg=name)
