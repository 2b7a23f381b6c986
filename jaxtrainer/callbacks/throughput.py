"""`Throughput`: how fast the run is, from its counters and clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.run import Run

_PAUSES = ("validate", "checkpoint", "compile")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The dense bfloat16 peak of a device: FLOP/s, and the data sheet that says so."""

    flops: float
    source: str


_A100 = Peak(flops=312e12, source="NVIDIA A100 Tensor Core GPU data sheet, BF16")
_TPU = "Google Cloud TPU documentation, {} system architecture, peak compute per chip, bf16"
_V5E = Peak(flops=197e12, source=_TPU.format("v5e"))
_V5P = Peak(flops=459e12, source=_TPU.format("v5p"))
_V6E = Peak(flops=918e12, source=_TPU.format("v6e"))

PEAKS: dict[str, Peak] = {
    "NVIDIA A100": _A100,
    "NVIDIA H100 80GB HBM3": Peak(
        flops=989e12, source="NVIDIA H100 Tensor Core GPU data sheet, SXM, BF16, without sparsity"
    ),
    "NVIDIA H200": Peak(
        flops=989e12, source="NVIDIA H200 Tensor Core GPU data sheet, SXM, BF16, without sparsity"
    ),
    "NVIDIA L4": Peak(
        flops=121e12, source="NVIDIA L4 Tensor Core GPU data sheet, BF16, without sparsity"
    ),
    # It has no bfloat16; float16 runs at this rate.
    "Tesla T4": Peak(flops=65e12, source="NVIDIA T4 Tensor Core GPU data sheet, mixed precision"),
    "TPU v4": Peak(flops=275e12, source=_TPU.format("v4")),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}
"""Peaks by the beginning of JAX's `device_kind`."""

_OTHERS = ("NVIDIA H200 NVL", "TPU v4 lite")
"""Kinds that begin like one above, and are slower."""


def peak_of(device_kind: str) -> Peak | None:
    """Return the peak of a kind of device; None if it is not known.

    Args:
        device_kind: As in `jax.devices()[0].device_kind`.

    Example:
        >>> peak_of("NVIDIA A100-SXM4-80GB").flops
        312000000000000.0
        >>> peak_of("NVIDIA L40S")
    """
    words = device_kind.replace("-", " ") + " "
    known = [k for k in (*PEAKS, *_OTHERS) if words.startswith(f"{k} ")]
    return PEAKS.get(max(known, key=len, default=""))


@dataclass(frozen=True)
class _Mark:
    time_s: float
    samples: int
    batches: int
    steps: int


class Throughput(Callback):
    """Record samples and steps a second, and with `flops_per_step` FLOP/s and MFU.

    At reports over the last `window` steps, at the ends of epochs over the whole epoch. Time in
    validation, checkpoints and compilation is left out. Reads integers and a clock: nothing is
    done in a step, and the device is never waited for; at a report a few steps may still be in its
    queue, at the end of an epoch none are.

    Series: `throughput/samples_per_s`, `throughput/steps_per_s` (optimiser steps),
    `throughput/flops_per_s` and `throughput/mfu`, the share of the devices' peak (model FLOP/s
    utilisation).

    Args:
        window: Optimiser steps that the rates at reports are over, at least.
        flops_per_step: Floating-point operations of one `training_step`, one batch, on all
            devices together: `plan = trainer.plan(module, loader)` has
            `plan.flops * plan.num_devices`.
        peak_flops: Peak FLOP/s of one device; known for common ones, see `PEAKS`.

    Raises:
        ConfigError: For a value that cannot work.

    References:
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B: MFU.

    Example:
        >>> throughput = Throughput(flops_per_step=2.1e9, peak_flops=312e12)
    """

    @checks_options
    def __init__(
        self,
        *,
        window: int = 100,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ConfigError(f"window must be a positive number of steps, got {window!r}.")
        for name, value in (("flops_per_step", flops_per_step), ("peak_flops", peak_flops)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, got {value!r}.")
        if peak_flops is not None and flops_per_step is None:
            raise ConfigError("peak_flops is for the MFU, which needs `flops_per_step=` too.")
        self.window = window
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops
        self._total_peak: float | None = None
        self._marks: deque[_Mark] = deque()
        self._epoch_start: _Mark | None = None

    def on_train_start(self, run: Run) -> None:
        """Start counting."""
        self._total_peak = self._peak(run)
        self._marks = deque([_mark(run)])
        self._epoch_start = self._marks[0]

    def on_train_epoch_start(self, run: Run) -> None:
        """Start counting the epoch."""
        self._epoch_start = _mark(run)

    def on_report(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Record the rates of the last steps, up to the newest one."""
        now = _mark(run)
        # A fused dispatch may bring several reports at once: one rate serves them.
        if now.batches == self._marks[-1].batches:
            return
        self._marks.append(now)
        while now.steps - self._marks[1].steps >= self.window:
            self._marks.popleft()
        run.record("step", self._rates(self._marks[0], now))

    def on_train_epoch_end(self, run: Run) -> None:
        """Record the rates of the epoch."""
        if self._epoch_start is not None:
            run.record("epoch", self._rates(self._epoch_start, _mark(run)))

    def _peak(self, run: Run) -> float | None:
        devices = list(jax.tree.leaves(run.state.params)[0].sharding.device_set)
        known = peak_of(devices[0].device_kind)
        peak = self.peak_flops or (known.flops if known else None)
        return None if peak is None else peak * len(devices)

    def _rates(self, start: _Mark, end: _Mark) -> dict[str, float]:
        spent_s, batches = end.time_s - start.time_s, end.batches - start.batches
        if spent_s <= 0.0 or not batches:
            return {}
        rates = {
            "throughput/samples_per_s": (end.samples - start.samples) / spent_s,
            "throughput/steps_per_s": (end.steps - start.steps) / spent_s,
        }
        if self.flops_per_step is not None:
            rates["throughput/flops_per_s"] = self.flops_per_step * batches / spent_s
            if self._total_peak is not None:
                rates["throughput/mfu"] = rates["throughput/flops_per_s"] / self._total_peak
        return rates


def _mark(run: Run) -> _Mark:
    pauses_s = sum(run.timings.seconds.get(phase, 0.0) for phase in _PAUSES)
    return _Mark(run.clock() - pauses_s, run.samples, run.total_batches, run.global_step)
