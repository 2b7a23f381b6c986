"""Norms and histograms of gradients: against NumPy, at reports only, and never of another step.

Tolerance: NumPy in float64 against sums of at most 67 float32 squares, a few units in the last
place (6e-8 each).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, Optimizer, Run
from jaxtrainer.callbacks import Checkpoint, GradientMonitor, TerminateOnNaN
from jaxtrainer.errors import ConfigError, LogError
from tests import tiny
from tests.bad_input import loss_of, module_with, refused
from tests.test_accumulation import Regression, cut, make_rows

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCH = 8
REL: Any = {"rel": 1e-6}
RATE = 0.5


class Kernels(Callback):
    """Host copies of all parameters: at the start, and after each batch."""

    def __init__(self) -> None:
        self.params: list[dict[str, Any]] = []

    def on_fit_start(self, run: Run) -> None:
        self.params.append(jax.tree.map(np.array, run.state.params))

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.on_fit_start(run)


def norm(*arrays: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays)))


def descended(monitor: Callback | None = None, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Descend two epochs, one step a dispatch; the gradient is the step over the rate."""
    seen = Kernels()
    settings = {"max_epochs": 2, "steps_per_dispatch": 1, **options}
    callbacks = [seen] if monitor is None else [monitor, seen]
    module = tiny.Tiny(tx=optax.sgd(RATE))
    result, _ = tiny.fit(module=module, callbacks=callbacks, **settings)
    return result.history.step, seen.params


def test_monitor_records_norms_of_each_module():
    steps, params = descended(GradientMonitor())
    for point, step in enumerate((4, 8, 12, 16)):
        before, after = params[step - 1], params[step]
        for name in ("first", "last", "norm"):
            change = norm(*(after[name][k] - before[name][k] for k in before[name]))
            # A difference of float32 weights of order one: 1e-7 of them, in steps of 0.01.
            assert steps[f"update_norm/{name}"].values[point] == pytest.approx(change, rel=1e-4)
            assert steps[f"grad_norm/{name}"].values[point] == pytest.approx(
                change / RATE, rel=1e-4
            )
            expected = norm(*before[name].values())
            assert steps[f"param_norm/{name}"].values[point] == pytest.approx(expected, **REL)


def test_monitor_records_at_reports_only():
    steps, _ = descended(GradientMonitor(), log_every_n_steps=6)
    assert steps["grad_norm/total"].steps == [6, 12]
    # The last step is reported too, without what was not computed there.
    assert steps["train/loss"].steps == [6, 12, 16]


def test_monitor_total_is_the_norm_that_clipping_computes():
    steps, _ = descended(GradientMonitor(), gradient_clip_val=0.1)
    clipped = dict(
        zip(steps["train/grad_norm"].steps, steps["train/grad_norm"].values, strict=True)
    )
    total = dict(zip(steps["grad_norm/total"].steps, steps["grad_norm/total"].values, strict=True))
    assert total
    assert total == pytest.approx({step: clipped[step] for step in total}, **REL)
    modules = [steps[f"grad_norm/{name}"].values for name in ("first", "last", "norm")]
    assert list(total.values()) == pytest.approx(
        [norm(*m) for m in zip(*modules, strict=True)], **REL
    )


@pytest.mark.parametrize(
    ("depth", "names"),
    [
        (0, []),
        (1, ["first", "last", "norm"]),
        (2, ["first/bias", "first/kernel", "last/bias", "last/kernel", "norm/bias", "norm/scale"]),
    ],
)
def test_monitor_tells_modules_apart_down_to_a_depth(depth: int, names: list[str]):
    result, _ = tiny.fit(callbacks=[GradientMonitor(depth=depth)], max_epochs=1)
    found = [n.removeprefix("grad_norm/") for n in result.history if n.startswith("grad_norm/")]
    assert found == [*names, "total"]


def test_monitor_leaves_frozen_modules_out():
    module = tiny.Tiny(tx=Optimizer(optax.sgd(RATE), wrt=["last", "norm"]))
    result, _ = tiny.fit(module=module, callbacks=[GradientMonitor()], max_epochs=1)
    found = [n.removeprefix("grad_norm/") for n in result.history if n.startswith("grad_norm/")]
    assert found == ["last", "norm", "total"]


def test_monitor_looks_less_often_than_reports_come():
    result, _ = tiny.fit(
        callbacks=[GradientMonitor(every_n_steps=6)], max_epochs=2, log_every_n_steps=3
    )
    assert result.history.step["grad_norm/total"].steps == [6, 12]
    assert result.history.step["train/loss"].steps == [3, 6, 9, 12, 15, 16]


def test_monitor_computes_nothing_between_reports():
    seen: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(float(outputs["grad_norm/total"]))

    tiny.fit(callbacks=[GradientMonitor(), Look()], max_epochs=1, steps_per_dispatch=1)
    assert [np.isfinite(value) for value in seen] == [False, False, False, True] * 2


@pytest.mark.parametrize("every", [2, 5], ids=["often", "seldom"])
@pytest.mark.parametrize("clip", [None, 1e3], ids=["free", "clipped"])
def test_monitor_has_the_latest_update_under_accumulation(every: int, clip: float | None):
    seen, module = Kernels(), Regression()
    monitor = GradientMonitor(depth=0)
    options: Any = {"accumulate_grad_batches": 3, "log_every_n_steps": every}
    result, _ = tiny.fit(
        cut(make_rows(88), 8),
        module=module,
        callbacks=[monitor, seen],
        max_epochs=1,
        steps_per_dispatch=1,
        gradient_clip_val=clip,
        **options,
    )
    updates = {3: 0, 6: 3, 9: 6, 11: 9}
    expected = {}
    for batch in range(every, 12, every):
        last = max((u for u in updates if u <= batch), default=None)
        if last is not None:
            pair = seen.params[updates[last]], seen.params[last]
            expected[batch] = norm(*(pair[1][k] - pair[0][k] for k in pair[0])) / 0.1
    series = result.history.step["grad_norm/total"].values
    # Differences of float32 weights of order one.
    assert series == pytest.approx([*expected.values()], rel=1e-4)
    if clip:
        assert result.history.step["train/grad_norm"].values[: len(series)] == series


@pytest.mark.slow
def test_monitor_survives_a_resume(tmp_path: Path):
    options: Any = {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0, "log_every_n_steps": 4}
    whole, expected = tiny.fit(callbacks=[GradientMonitor()], max_epochs=2, **options)
    saver = Checkpoint(tmp_path)
    tiny.fit(callbacks=[GradientMonitor(), saver], max_epochs=2, max_steps=4, **options)
    resumed, state = tiny.fit(
        callbacks=[GradientMonitor()], ckpt_path=tmp_path, max_epochs=2, **options
    )
    tiny.assert_same_bits(state, expected)
    name = "grad_norm/first"
    assert resumed.history.step[name].values == whole.history.step[name].values[-2:]


@pytest.mark.slow
@pytest.mark.parametrize("monitor", [None, GradientMonitor(histograms=True)], ids=["off", "on"])
def test_monitor_leaves_training_alone(monitor: Callback | None):
    _, params = descended(monitor)
    _, plain = descended()
    # Another program, which XLA may order otherwise: float32 rounding, grown over 16 updates.
    for a, b in zip(jax.tree.leaves(params[-1]), jax.tree.leaves(plain[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_monitor_does_not_depend_on_the_kind_of_dispatch():
    (fused, _), (single, _) = (
        tiny.fit(callbacks=[GradientMonitor()], max_epochs=2, steps_per_dispatch=n) for n in (4, 1)
    )
    for name in ("grad_norm/first", "param_norm/total", "update_norm/last"):
        got, want = fused.history.step[name], single.history.step[name]
        assert got.steps == want.steps == [4, 8, 12, 16]
        # Two programs: float32 rounding, grown over 16 Adam steps.
        np.testing.assert_allclose(got.values, want.values, rtol=1e-3)


def test_histograms_count_magnitudes():
    class Spread(tiny.Tiny):
        """The gradient of each number is the number itself."""

        def configure_model(self, rngs: nnx.Rngs) -> Any:
            values = np.array([0.0, 1e-12, -3e-8, 2e-3, -0.5, 0.7, 5.0, -20.0, np.nan], np.float32)
            return {"layer": {"w": jax.numpy.asarray(values)}}

        def training_step(self, model: Any, batch: Any) -> Any:
            return 0.5 * (model["layer"]["w"] ** 2).sum() + 0.0 * batch["x"].sum()

    monitor = GradientMonitor(histograms=True)
    module = Spread(tx=optax.set_to_zero())
    tiny.fit(module=module, callbacks=[monitor], max_epochs=1)
    assert [step for step, _ in monitor.histograms["layer"]] == [4, 8]
    counts = monitor.histograms["layer"][0][1]
    sizes = np.array([0.0, 1e-12, 3e-8, 2e-3, 0.5, 0.7, 5.0, 20.0, np.inf])
    bins = np.searchsorted(monitor.edges, sizes, side="right")
    np.testing.assert_array_equal(counts, np.bincount(bins, minlength=32))


def test_histograms_are_private_and_leave_nothing_behind():
    class Metrics(Callback):
        def on_train_end(self, run: Run) -> None:
            self.names = [*run.metrics]

    metrics, monitor = Metrics(), GradientMonitor(histograms=True)
    result, _ = tiny.fit(callbacks=[monitor, metrics], max_epochs=1)
    assert [len(points) for points in monitor.histograms.values()] == [2, 2, 2]
    assert sum(monitor.histograms["last"][0][1]) == 27
    assert not [name for name in (*result.history, *metrics.names) if "hist" in name]


def test_histograms_are_of_the_last_call():
    monitor = GradientMonitor(histograms=True)
    for _ in range(2):
        tiny.fit(callbacks=[monitor], max_epochs=1)
    assert [step for step, _ in monitor.histograms["first"]] == [4, 8]


def test_nan_gradients_are_reported_as_such():
    def training_step(self: Any, model: Any, batch: Any) -> Any:
        return jax.numpy.sqrt(loss_of(model, batch) * 0.0)

    seen, monitor = TerminateOnNaN("grad_norm/total"), GradientMonitor()
    module = module_with(training_step=training_step)
    result, _ = tiny.fit(
        tiny.make_batches(8), module=module, callbacks=[monitor, seen], max_epochs=9
    )
    assert "grad_norm/total" in result.stop_reason
    assert np.isnan(result.history.step["grad_norm/total"].values[0])


def test_update_hook_sees_gradients_parameters_and_updates():
    class Product(Callback):
        def traced_update(self, grads: Any, params: Any, updates: Any, log: Any) -> None:
            products = jax.tree.map(lambda g, u: (g * u).sum(), grads, updates)
            log("product", sum(jax.tree.leaves(products)))
            log("size", float(sum(p.size for p in jax.tree.leaves(params))), prog_bar=True)

    steps, _ = descended(Product())
    slow = descended(GradientMonitor(depth=0))[0]["grad_norm/total"].values
    expected = [-RATE * value**2 for value in slow]
    np.testing.assert_allclose(steps["train/product"].values, expected, rtol=1e-4)
    assert set(steps["train/size"].values) == {83.0}


def test_series_of_step_and_update_may_not_share_a_name():
    def training_step(self: Any, model: Any, batch: Any) -> Any:
        loss = loss_of(model, batch)
        self.log("grad_norm", loss)
        return loss

    module = module_with(training_step=training_step)
    refused(LogError, "'train/grad_norm' is logged by the step", module=module, gradient_clip_val=1)


def test_monitor_refuses_a_period_between_reports():
    parts = ("GradientMonitor looks at every 6 steps", "reports come every 4")
    advice, monitor = "`Trainer(log_every_n_steps=6)`", GradientMonitor(every_n_steps=6)
    refused(ConfigError, *parts, advice, callbacks=[monitor])


@pytest.mark.parametrize("options", [{"depth": -1}, {"every_n_steps": 0}, {"depth": 1.5}])
def test_monitor_refuses_a_value(options: Any):
    with pytest.raises(ConfigError, match="must be an integer"):
        GradientMonitor(**options)
