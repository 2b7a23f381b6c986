"""`DeviceStats`: memory of devices that tell, and of the process."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from jaxtrainer.callbacks import DeviceStats, device_stats
from jaxtrainer.run import Run
from tests.tiny import Tiny, make_batches, make_trainer


class Device:
    def __init__(self, index: int, stats: dict[str, int] | None) -> None:
        self.id = index
        self.stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def report(monkeypatch: pytest.MonkeyPatch, *devices: Any) -> Run:
    monkeypatch.setattr(jax, "local_devices", lambda: list(devices))
    run, callback = Run(global_step=4), DeviceStats()
    callback.on_train_start(run)
    callback.on_report(run, {}, 1)
    callback.on_report(run, {}, 1)
    return run


def test_device_memory_is_recorded_once_a_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_stats, "host_memory", dict)
    monkeypatch.setattr(device_stats.time, "process_time", lambda: 0.0)
    stats = {"bytes_in_use": 10, "peak_bytes_in_use": 20, "num_allocs": 3}
    run = report(monkeypatch, Device(0, stats), Device(1, None))
    assert run.metrics == {
        "device/0/bytes_in_use": 10.0,
        "device/0/peak_bytes_in_use": 20.0,
        "host/cpu_percent": 0.0,
    }
    assert run.history.step["device/0/bytes_in_use"].steps == [4]


def test_cpu_run_has_host_memory_only():
    result = make_trainer([DeviceStats()], max_epochs=1).fit(Tiny(), make_batches(8))
    series = result.history.step["host/rss_bytes"]
    assert min(series.values) > 1 << 20
    assert not [name for name in result.history if name.startswith("device/")]


def test_system_that_does_not_tell_records_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(device_stats, "_STATM", tmp_path / "missing")
    assert "host/rss_bytes" not in report(monkeypatch).metrics


def test_processor_time_is_a_share_of_the_clock(monkeypatch: pytest.MonkeyPatch):
    now = [10.0]
    busy = iter([1.0, 3.0, 7.0])
    monkeypatch.setattr(device_stats.time, "process_time", lambda: next(busy))
    run, callback = Run(clock=lambda: now[0]), DeviceStats()
    callback.on_train_start(run)
    for step, seconds in ((1, 4.0), (2, 2.0)):
        run.global_step, now[0] = step, now[0] + seconds
        callback.on_report(run, {}, step)
    # Two of four seconds on one core, then four in two: two cores.
    assert run.history.step["host/cpu_percent"].values == [50.0, 200.0]
