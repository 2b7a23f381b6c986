"""`DeviceStats`: the memory of devices and host at every report."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax

from jaxtrainer.callback import Callback
from jaxtrainer.errors import checks_options
from jaxtrainer.run import Run

_KEYS = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
_STATM = Path("/proc/self/statm")


class DeviceStats(Callback):
    """Record the memory that is in use and the processor time, as step series.

    Of each device of this process `device/<id>/bytes_in_use`, `.../peak_bytes_in_use` and
    `.../bytes_limit`, where its allocator keeps them (GPU and TPU; CPU devices keep none), and of
    this process `host/rss_bytes`, its resident memory, and `host/cpu_percent`, the processor time
    of its threads since the last record: 100 is one core.

    Example:
        >>> callback = DeviceStats()
    """

    _elsewhere: ClassVar[dict[str, str]] = {
        "cpu_stats": "Those of this process are always recorded.",
        "filter_keys": "All are recorded: choose among them where you look at them.",
    }

    @checks_options
    def __init__(self) -> None:
        self._devices: list[Any] = []
        self._step = -1
        self._mark = (0.0, 0.0)

    def on_train_start(self, run: Run) -> None:
        """Find the devices that can tell."""
        self._step, self._mark = -1, (time.process_time(), run.clock())
        self._devices = [d for d in jax.local_devices() if d.memory_stats()]

    def on_report(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        """Record what they say now, at the newest step."""
        # A fused dispatch may bring several reports at once.
        if run.global_step == self._step:
            return
        self._step = run.global_step
        values = {**host_memory(), **self._processor_time(run)}
        for device in self._devices:
            stats = device.memory_stats() or {}
            values.update({f"device/{device.id}/{k}": float(stats[k]) for k in _KEYS if k in stats})
        run.record("step", values)

    def _processor_time(self, run: Run) -> dict[str, float]:
        before, self._mark = self._mark, (time.process_time(), run.clock())
        busy_s, spent_s = (now - then for now, then in zip(self._mark, before, strict=True))
        return {"host/cpu_percent": 100.0 * busy_s / spent_s} if spent_s > 0.0 else {}


def host_memory() -> dict[str, float]:
    """Return `host/rss_bytes` of this process; where the system does not tell, nothing."""
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except OSError:
        return {}
    return {"host/rss_bytes": float(pages * os.sysconf("SC_PAGE_SIZE"))}
