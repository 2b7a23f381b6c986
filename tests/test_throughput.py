"""`Throughput`: rates on a clock that the test turns by hand, and the table of peaks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxtrainer import Run, TrainModule
from jaxtrainer.callbacks import Throughput
from jaxtrainer.display.text import format_metrics
from jaxtrainer.errors import ConfigError, OptionError
from jaxtrainer.hooks import CallbackList
from jaxtrainer.peaks import PEAKS, Arithmetic, peak_of
from tests.bad_input import refused
from tests.tiny import Tiny, line, make_batches, make_trainer


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Driver:
    """A run of batches of 8 samples, without a trainer; a first report has been made."""

    def __init__(self, throughput: Throughput, flops: float = float("nan")) -> None:
        self.clock = ManualClock()
        self.run = Run(clock=self.clock, batch_size=8)
        self.run.state = SimpleNamespace(params={"w": jax.numpy.zeros(2)})
        self.run.make_plan = lambda: SimpleNamespace(flops=flops)
        self.throughput = throughput
        throughput.check_batch("train", {"x": jax.numpy.zeros((8, 5))}, {})
        throughput.on_fit_start(self.run)
        throughput.on_train_start(self.run)
        throughput.on_train_epoch_start(self.run)
        self.report()

    def train(self, batches: int, seconds: float, updates: int | None = None) -> None:
        self.clock.now += seconds
        self.run.advance(batches, batches if updates is None else updates)

    def report(self) -> dict[str, float]:
        self.throughput.on_report(self.run, {}, self.run.global_step)
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


def test_first_report_only_starts_the_count():
    driver = Driver(Throughput())
    assert driver.run.metrics == {}


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
    driver = Driver(Throughput(flops_per_sample=1e6 / 8, peak_flops=1e8))
    driver.train(10, 1.0, updates=5)
    metrics = driver.report()
    assert metrics["throughput/steps_per_s"] == pytest.approx(5.0)
    assert metrics["throughput/batches_per_s"] == pytest.approx(10.0)
    assert metrics["throughput/flops_per_s"] == pytest.approx(1e7)
    assert metrics["throughput/mfu"] == pytest.approx(0.1)


@pytest.mark.parametrize("tokens", [5, lambda batch: batch["x"].shape[1]], ids=["number", "batch"])
def test_tokens_are_those_of_the_samples(tokens: Any):
    driver = Driver(Throughput(tokens_per_sample=tokens))
    driver.train(2, 0.5)
    assert driver.report()["throughput/tokens_per_s"] == pytest.approx(2 * 8 * 5 / 0.5)


@pytest.mark.parametrize(("tokens", "unit"), [(5, "tokens"), (None, "samples")])
def test_bar_shows_rate_and_mfu_if_asked_to(tokens: int | None, unit: str):
    driver = Driver(Throughput(tokens_per_sample=tokens, prog_bar=True))
    shown = {"train/loss", f"throughput/{unit}_per_s", "throughput/mfu"}
    assert driver.run.prog_bar == shown
    assert format_metrics({"throughput/mfu": 0.31}) == "mfu=0.3100"


def test_bar_shows_no_rate_by_default():
    assert Driver(Throughput()).run.prog_bar == set()


def test_operations_are_those_of_the_plan_by_default():
    driver = Driver(Throughput(), flops=1e6)
    driver.train(3, 1.0)
    assert driver.report()["throughput/flops_per_s"] == pytest.approx(3e6)


def test_what_is_not_known_is_left_out():
    driver = Driver(Throughput())
    driver.train(1, 1.0)
    names = ("samples", "batches", "steps")
    assert driver.report().keys() == {f"throughput/{n}_per_s" for n in names}


def test_mfu_is_left_out_where_the_peak_is_not_known():
    driver = Driver(Throughput(flops_per_sample=1e6))
    driver.train(1, 1.0)
    assert "throughput/flops_per_s" in driver.report()
    assert "throughput/mfu" not in driver.run.metrics


def test_peak_counts_every_device_of_the_mesh():
    throughput = Throughput(flops_per_sample=1e6, peak_flops=1e12)
    options: dict[str, Any] = {"max_epochs": 1, "mesh": {"data": 4}}
    make_trainer([throughput], **options).fit(Tiny(), make_batches(8))
    assert throughput._total_peak == 4e12


@pytest.mark.parametrize(
    ("precision", "flops"), [("32-true", 156e12), ("bf16-mixed", 312e12), ("bf16-true", 312e12)]
)
def test_peak_is_that_of_the_precision(
    monkeypatch: pytest.MonkeyPatch, precision: str, flops: float
):
    a100 = "jaxtrainer.callbacks.throughput.peak_of"
    monkeypatch.setattr(a100, lambda kind: PEAKS["NVIDIA A100"])
    throughput = Throughput()
    options: dict[str, Any] = {"max_epochs": 1, "precision": precision}
    make_trainer([throughput], **options).fit(Tiny(make=line), make_batches(2))
    assert throughput._total_peak == flops


def test_peak_of_whole_float32_is_that_of_no_shortened_product(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxtrainer.callbacks.throughput.peak_of", lambda _: PEAKS["NVIDIA A100"])
    with jax.default_matmul_precision("highest"):
        driver = Driver(Throughput())
    assert driver.throughput._total_peak == 19.5e12


def flops_of(steps: int, devices: int) -> float:
    throughput = Throughput()
    options: dict[str, Any] = {"steps_per_dispatch": steps, "mesh": {"data": devices}}
    make_trainer([throughput], max_epochs=1, **options).fit(Tiny(), make_batches(4))
    assert throughput.flops_per_batch is not None
    return throughput.flops_per_batch


@pytest.mark.slow
def test_operations_are_the_same_fused_and_on_several_devices():
    single = flops_of(1, 1)
    # Forward and backward: 2 FLOP for each weight and sample, three times but for the first layer.
    products = 8 * (2 * 2 * 4 * 8 + 3 * 2 * 8 * 3)
    assert products < single
    # What takes a batch out of a chunk of several counts too: a few operations.
    assert flops_of(4, 1) == pytest.approx(single, abs=50)
    assert flops_of(1, 4) == pytest.approx(single, abs=50)


def test_a_run_records_both_kinds():
    result = make_trainer([Throughput()], max_epochs=2).fit(Tiny(), make_batches(8))
    assert result.history.step["throughput/samples_per_s"].steps[-1] == 16
    assert result.history.epoch["throughput/samples_per_s"].epochs == [0, 1]
    assert min(result.history["throughput/samples_per_s"].values) > 0
    assert min(result.history["throughput/flops_per_s"].values) > 0


def test_nothing_is_asked_for_in_a_step():
    hooks = CallbackList([Throughput()], TrainModule())
    each = ("on_train_batch_start", "on_train_batch_end", "on_save_point")
    assert not any(hooks.has(name) for name in each)


@pytest.mark.parametrize(
    ("kind", "arithmetic", "flops"),
    [
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-PCIE-32GB", "tf32", 14e12),
        ("Tesla T4", "fp16", 65e12),
        ("Tesla T4", "bf16", None),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A100 80GB PCIe", "bf16", 312e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA H100 NVL", "tf32", 417.5e12),
        ("NVIDIA H200", "bf16", 989.5e12),
        ("NVIDIA H200 NVL", "bf16", 835.5e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "tf32", 183e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("AMD Instinct MI250X", "fp16", 191.5e12),
        ("AMD Instinct MI300X", "tf32", 163.4e12),
        ("TPU v3", "bf16", 61.5e12),
        ("TPU v4", "bf16", 275e12),
        ("TPU v5 lite", "tf32", 197e12),
        ("TPU v5", "bf16", 459e12),
        ("TPU v6 lite", "bf16", 918e12),
        ("TPU7x", "bf16", 1153.5e12),
        ("TPU7x", "fp32", None),
    ],
)
def test_peak_of_a_known_device(kind: str, arithmetic: Arithmetic, flops: float | None):
    peak = peak_of(kind)
    assert peak is not None
    assert peak.of(arithmetic) == flops


@pytest.mark.parametrize(
    "kind",
    [
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA L40",
        "TPU v4 lite",
        "cpu",
        "",
    ],
)
def test_peak_of_a_similar_device_is_not_guessed(kind: str):
    assert peak_of(kind) is None


def test_every_peak_names_its_source():
    assert all(p.source.startswith(("NVIDIA", "Google", "AMD")) for p in PEAKS.values())


def test_a_shorter_number_is_never_slower():
    for peak in PEAKS.values():
        rates = [r for r in (peak.fp32, peak.tf32, peak.fp16, peak.bf16) if r is not None]
        assert rates == sorted(rates)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"flops_per_sample": -1.0},
        {"peak_flops": "fast"},
        {"tokens_per_sample": float("nan")},
    ],
)
def test_option_that_cannot_work_is_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Throughput(**options)


def test_tokens_that_are_no_number_are_refused_before_compilation():
    callback = Throughput(tokens_per_sample=lambda batch: batch["x"].shape)
    refused(ConfigError, "tokens_per_sample", "(8, 4)", callbacks=[callback])


def test_option_of_lightning_says_what_takes_its_place():
    with pytest.raises(OptionError, match="tokens_per_sample"):
        Throughput(length_fn=len)  # pyright: ignore[reportCallIssue]
