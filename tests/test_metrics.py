"""What `log` records while tracing, and totals that stay exact over any number of samples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer.errors import LogError
from jaxtrainer.metrics import LoggedOutputs, MetricSpec, Recorder, Totals, series_name


def spec(name: str = "train/x", **options: Any) -> MetricSpec:
    defaults = {"reduce": "mean", "prog_bar": False, "on_step": True, "on_epoch": True}
    return MetricSpec(name=name, **{**defaults, **options})


def reduced(reduce: str, rows: Any, weights: Any = None, repeat: int = 1) -> float:
    """Reduce a series of values in a compiled loop, as the step does it."""
    totals = Totals((spec(reduce=reduce),))
    values = jnp.asarray(rows, jnp.float32)[:, None]
    weighing = jnp.asarray(weights or [1.0] * len(values), jnp.float32)[:, None]

    @jax.jit
    def add(values: jax.Array, weights: jax.Array) -> jax.Array:
        def body(i: jax.Array, sums: jax.Array) -> jax.Array:
            row = i % values.shape[0]
            return totals.update(sums, values[row], weights[row])

        return jax.lax.fori_loop(0, repeat * len(values), body, jnp.asarray(totals.initial()))

    return totals.compute(np.asarray(add(values, weighing)))["train/x"]


def test_totals_count_beyond_the_integers_of_float32():
    # A plain float32 sum of ones stands still at 2**24.
    assert np.float32(2**24) + np.float32(1) == np.float32(2**24)
    assert reduced("sum", [1.0], repeat=2**24 + 5) == 2**24 + 5


def test_totals_keep_the_mean_beyond_the_integers_of_float32():
    # One value in four is 1: plain sums of 2**25 weights would be off by a factor.
    assert reduced("mean", [1.0, 0.0, 0.0, 0.0], repeat=2**23) == 0.25


def test_totals_weigh_the_mean():
    got = reduced("mean", [1.0, 2.0, 4.0], weights=[3.0, 1.0, 0.5])
    assert got == pytest.approx((3.0 + 2.0 + 2.0) / 4.5, rel=1e-7)


def test_totals_of_many_small_values_do_not_drift():
    # Compensated sums are off by 2 ulp of the result, whatever the count; plain ones by 1e-3.
    value = float(np.float32(0.1))
    assert reduced("sum", [value], repeat=10**6) == pytest.approx(1e6 * value, rel=2.4e-7)


@pytest.mark.parametrize(
    ("reduce", "expected"), [("min", -3.0), ("max", 5.0), ("sum", 4.0), ("mean", 1.0)]
)
def test_totals_reduce_as_asked(reduce: str, expected: float):
    assert reduced(reduce, [2.0, -3.0, 5.0, 0.0]) == expected


@pytest.mark.parametrize("reduce", ["min", "max"])
def test_totals_of_extremes_do_not_depend_on_weights(reduce: str):
    assert reduced(reduce, [7.0], weights=[3.0]) == 7.0


@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max"])
def test_totals_do_not_hide_a_nan(reduce: str):
    assert np.isnan(reduced(reduce, [1.0, np.nan, 2.0]))


def test_totals_of_an_infinite_loss_are_infinite():
    assert reduced("mean", [1.0, np.inf, 2.0]) == np.inf


def test_totals_report_what_was_asked_for():
    totals = Totals((spec("train/a", on_step=False), spec("train/b", on_epoch=False)))
    sums = totals.update(jnp.asarray(totals.initial()), jnp.array([1.0, 2.0]), jnp.ones(2))
    assert totals.compute(np.asarray(sums)) == {"train/a": 1.0}
    assert totals.step_values(np.array([1.0, 2.0])) == {"train/b": 2.0}


@pytest.mark.parametrize(
    ("stage", "name", "expected"),
    [
        ("train", "loss", "train/loss"),
        ("validate", "loss", "val/loss"),
        ("test", "accuracy", "test/accuracy"),
        ("validate", "val_loss", "val_loss"),
        ("validate", "train_loss", "val/train_loss"),
        ("test", "head/loss", "head/loss"),
    ],
)
def test_series_name_puts_the_stage_in_front(stage: Any, name: str, expected: str):
    assert series_name(stage, name) == expected


def test_recorder_keeps_the_order_of_logging():
    recorder = Recorder("train", default_weight=8.0)
    recorder.log("b", 1.0)
    recorder.log("a", jnp.array([2]), weight=3)
    assert list(recorder.specs) == ["train/b", "train/a"]
    np.testing.assert_array_equal(recorder.row(), [1.0, 2.0])
    np.testing.assert_array_equal(recorder.weight_row(), [8.0, 3.0])


@pytest.mark.parametrize(("stage", "on_step"), [("train", True), ("validate", False)])
def test_recorder_reports_steps_in_training_only(stage: Any, on_step: bool):
    recorder = Recorder(stage)
    recorder.log("loss", 1.0)
    (only,) = recorder.specs.values()
    assert (only.on_step, only.on_epoch) == (on_step, True)


@pytest.mark.parametrize(
    ("name", "value", "options", "message"),
    [
        ("", 1.0, {}, "pass a string"),
        (3, 1.0, {}, "pass a string"),
        ("loss", np.ones(3), {}, r"shape \(3,\).*jnp.mean"),
        ("loss", "high", {}, "of type str"),
        ("loss", 1j, {}, "complex"),
        ("loss", 1.0, {"reduce": "average"}, "use 'mean'"),
        ("loss", 1.0, {"weight": np.ones(2)}, "weight of shape"),
    ],
)
def test_recorder_refuses_what_is_no_scalar(name: Any, value: Any, options: Any, message: str):
    with pytest.raises(LogError, match=message):
        Recorder("train").log(name, value, **options)


def test_recorder_refuses_a_name_used_twice():
    recorder = Recorder("validate")
    recorder.log("loss", 1.0)
    with pytest.raises(LogError, match="twice"):
        recorder.log("val/loss", 1.0)


@pytest.mark.parametrize("transform", [jax.grad, jax.vmap, jax.jit], ids=["grad", "vmap", "jit"])
def test_recorder_refuses_a_nested_transform(transform: Any):
    recorder = Recorder("train")

    def inner(x: jax.Array) -> jax.Array:
        recorder.log("loss", x)
        return x

    with pytest.raises(LogError, match="nested transform"):
        transform(inner)(jnp.ones(3) if transform is jax.vmap else jnp.ones(()))


def test_recorder_without_metrics_has_empty_rows():
    assert Recorder("train").row().shape == (0,)
    assert Totals(()).compute(np.zeros((4, 0))) == {}


def matrix_between() -> Recorder:
    recorder = Recorder("train", default_weight=2.0)
    recorder.log("a", 1.0)
    recorder.log("_matrix", jnp.array([[1, 2, 3], [4, 5, 6]]), reduce="sum")
    recorder.log("b", 7.0)
    return recorder


def test_private_series_may_be_an_array():
    recorder = matrix_between()
    assert recorder.specs["train/_matrix"].shape == (2, 3)
    np.testing.assert_array_equal(recorder.row(), [1, 1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(recorder.weight_row(), [2.0] * 8)


def test_totals_reduce_an_array_by_element():
    recorder = matrix_between()
    totals = Totals(tuple(recorder.specs.values()))
    sums = jnp.asarray(totals.initial())
    for _ in range(2):
        sums = totals.update(sums, recorder.row(), recorder.weight_row())
    got = np.asarray(sums)
    assert totals.shape == (4, 8)
    assert totals.compute(got) == {"train/a": 1.0, "train/b": 7.0}
    np.testing.assert_array_equal(totals.arrays(got)["train/_matrix"], [[2, 4, 6], [8, 10, 12]])


def test_array_is_no_part_of_what_a_step_reports():
    recorder = matrix_between()
    specs = tuple(recorder.specs.values())
    row = Totals(specs).scalars(recorder.row())
    assert Totals(specs).num_scalars == 2
    assert Totals(specs).step_values(np.asarray(row)) == {"train/a": 1.0, "train/b": 7.0}
    assert float(LoggedOutputs(specs, row[None], 0)["b"]) == 7.0


@pytest.mark.parametrize("name", ["matrix", "val/matrix"])
def test_public_series_is_no_array(name: str):
    with pytest.raises(LogError, match=r"shape \(2,\)"):
        Recorder("train").log(name, jnp.ones(2))


def test_recorder_may_take_no_arrays():
    with pytest.raises(LogError, match="records scalars"):
        Recorder("train", takes_arrays=False).log("_matrix", jnp.ones(2))


def test_totals_leave_out_what_has_no_weight():
    assert reduced("mean", [1.0, np.nan, 3.0], weights=[1.0, 0.0, 1.0]) == 2.0


def test_logged_outputs_answer_to_both_names():
    outputs = LoggedOutputs((spec("val/loss"), spec("head/loss")), jnp.array([[1.0, 2.0]]), 0)
    assert float(outputs["loss"]) == float(outputs["val/loss"]) == 1.0
    assert float(outputs["head/loss"]) == 2.0
    assert list(outputs) == ["val/loss", "head/loss"]
    assert len(outputs) == 2


def test_logged_outputs_name_what_was_logged():
    outputs = LoggedOutputs((spec("train/loss"),), jnp.ones((1, 1)), 0)
    with pytest.raises(KeyError, match="logged: train/loss"):
        outputs["accuracy"]
