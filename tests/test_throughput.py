"""`Throughput`: rates on a clock that the test turns by hand, and the table of peaks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxtrainer import TrainModule
from jaxtrainer.callback import CallbackList
from jaxtrainer.callbacks import Throughput
from jaxtrainer.callbacks.throughput import PEAKS, peak_of
from jaxtrainer.errors import ConfigError
from jaxtrainer.run import Run
from tests.tiny import Tiny, make_batches, make_trainer


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Driver:
    """A run of batches of 8 samples, without a trainer."""

    def __init__(self, throughput: Throughput) -> None:
        self.clock = ManualClock()
        self.run = Run(clock=self.clock, batch_size=8)
        self.run.state = SimpleNamespace(params={"w": jax.numpy.zeros(2)})
        self.throughput = throughput
        throughput.on_train_start(self.run)
        throughput.on_train_epoch_start(self.run)

    def train(self, batches: int, seconds: float, updates: int | None = None) -> None:
        self.clock.now += seconds
        self.run.advance(batches, batches if updates is None else updates)

    def report(self) -> dict[str, float]:
        self.throughput.on_report(self.run, {})
        return self.run.metrics


def test_rates_at_a_report_are_over_the_window():
    driver = Driver(Throughput(window=10))
    driver.train(10, 10.0)
    assert driver.report()["throughput/samples_per_s"] == pytest.approx(8.0)
    driver.train(10, 1.0)
    assert driver.report()["throughput/steps_per_s"] == pytest.approx(10.0)
    assert driver.run.history.step["throughput/samples_per_s"].steps == [10, 20]


def test_window_reaches_over_several_reports():
    driver = Driver(Throughput(window=20))
    for seconds in (10.0, 1.0, 3.0):
        driver.train(10, seconds)
        driver.report()
    assert driver.run.metrics["throughput/steps_per_s"] == pytest.approx(20 / 4)


def test_epoch_rate_leaves_out_validation_and_compilation():
    driver = Driver(Throughput())
    driver.train(10, 2.0)
    for phase in ("validate", "compile", "checkpoint"):
        with driver.run.timings.phase(phase):
            driver.clock.now += 7.0
    driver.throughput.on_train_epoch_end(driver.run)
    series = driver.run.history.epoch["throughput/samples_per_s"]
    assert series.values == pytest.approx([40.0])


def test_reports_of_one_dispatch_make_one_point():
    driver = Driver(Throughput())
    driver.train(4, 1.0)
    driver.report()
    driver.report()
    assert len(driver.run.history.step["throughput/steps_per_s"]) == 1


def test_steps_are_optimiser_steps_and_operations_those_of_batches():
    driver = Driver(Throughput(flops_per_step=1e6, peak_flops=1e8))
    driver.train(10, 1.0, updates=5)
    metrics = driver.report()
    assert metrics["throughput/steps_per_s"] == pytest.approx(5.0)
    assert metrics["throughput/flops_per_s"] == pytest.approx(1e7)
    assert metrics["throughput/mfu"] == pytest.approx(0.1)


def test_mfu_is_left_out_where_the_peak_is_not_known():
    driver = Driver(Throughput(flops_per_step=1e6))
    driver.train(1, 1.0)
    assert driver.report().keys() == {
        f"throughput/{n}_per_s" for n in ("samples", "steps", "flops")
    }


def test_peak_counts_every_device_of_the_mesh():
    throughput = Throughput(flops_per_step=1e6, peak_flops=1e12)
    options: dict[str, Any] = {"max_epochs": 1, "mesh": {"data": 4}}
    make_trainer([throughput], **options).fit(Tiny(), make_batches(8))
    assert throughput._total_peak == 4e12


def test_a_run_records_both_kinds():
    result = make_trainer([Throughput()], max_epochs=2).fit(Tiny(), make_batches(8))
    assert result.history.step["throughput/samples_per_s"].steps[-1] == 16
    assert result.history.epoch["throughput/samples_per_s"].epochs == [0, 1]
    assert min(result.history["throughput/samples_per_s"].values) > 0


def test_nothing_is_asked_for_in_a_step():
    hooks = CallbackList([Throughput()], TrainModule())
    each = ("on_train_batch_start", "on_train_batch_end", "on_save_point")
    assert not any(hooks.has(name) for name in each)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_peak_of_a_known_device(kind: str, flops: float):
    peak = peak_of(kind)
    assert peak is not None
    assert peak.flops == flops


@pytest.mark.parametrize("kind", ["NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "cpu", ""])
def test_peak_of_a_similar_device_is_not_guessed(kind: str):
    assert peak_of(kind) is None


def test_every_peak_names_its_source():
    assert all("NVIDIA" in p.source or "Google" in p.source for p in PEAKS.values())


@pytest.mark.parametrize("options", [{"window": 0}, {"flops_per_step": -1.0}, {"peak_flops": 1e12}])
def test_option_that_cannot_work_is_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Throughput(**options)
