"""`Throughput`: how fast the run is, from its counters and clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.peaks import arithmetic_of, peak_of
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree, Stage

_PAUSES = ("validate", "checkpoint", "compile")


@dataclass(frozen=True)
class _Mark:
    time_s: float
    samples: int
    batches: int
    steps: int


class Throughput(Callback):
    """Record samples, batches and steps a second, tokens, FLOP/s and MFU.

    At reports over the last `window` steps, from the second report on; at the ends of epochs over
    the whole epoch. Time in validation, checkpoints and compilation is left out. Reads integers
    and a clock: nothing is done in a step, and the device is never waited for; at a report a few
    steps may still be in its queue, at the end of an epoch none are.

    Series: `throughput/samples_per_s`, `throughput/batches_per_s`, `throughput/steps_per_s`
    (optimiser steps), `throughput/tokens_per_s`, `throughput/flops_per_s` and `throughput/mfu`,
    the share of the devices' peak (model FLOP/s utilisation). All are of all devices together.

    The peak is the dense one for the trainer's precision: with `"32-true"` that of the shortened
    products (TF32) which XLA uses by default, unless `matmul_precision` asks for more.

    Args:
        window: Optimiser steps that the rates at reports are over, at least.
        flops_per_sample: Floating-point operations of `training_step` and the update for one
            sample. By default XLA's count for the step (`run.plan`). It counts the body of a loop
            once, and custom kernels not at all: pass a figure for a model with either, e.g.
            `6 * num_params * sequence_length` for a language model.
        tokens_per_sample: Tokens of a sample, or a function of the first batch (NumPy) that
            returns them: `lambda batch: batch["tokens"].shape[1]`.
        peak_flops: Peak FLOP/s of one device; known for common ones, see `jaxtrainer.peaks`.
        prog_bar: Show tokens (without them, samples) a second and MFU in the progress bar.

    Attributes:
        flops_per_batch: Operations of one batch on all devices; None where they are not known.

    Raises:
        ConfigError: For a value that cannot work.

    References:
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B: MFU.

    Example:
        >>> throughput = Throughput(flops_per_sample=2.1e9, tokens_per_sample=512)
    """

    _elsewhere: ClassVar[dict[str, str]] = {
        "window_size": "Pass `window=`.",
        "batch_size_fn": "The batch size is known.",
        "length_fn": "Pass `tokens_per_sample=`.",
        "flops_per_step": "Pass `flops_per_sample=`, or nothing: XLA counts them.",
    }

    @checks_options
    def __init__(
        self,
        *,
        window: int = 100,
        flops_per_sample: float | None = None,
        tokens_per_sample: float | Callable[[PyTree], float] | None = None,
        peak_flops: float | None = None,
        prog_bar: bool = False,
    ) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ConfigError(f"window must be a positive number of steps, got {window!r}.")
        self.window = window
        self.flops_per_sample = _positive("flops_per_sample", flops_per_sample)
        self.peak_flops = _positive("peak_flops", peak_flops)
        if not callable(tokens_per_sample):
            _positive("tokens_per_sample", tokens_per_sample)
        self.tokens_per_sample = tokens_per_sample
        self.prog_bar = prog_bar
        self.flops_per_batch: float | None = None
        self._tokens: float | None = None
        self._total_peak: float | None = None
        self._marks: deque[_Mark] = deque()
        self._epoch_start: _Mark | None = None

    def check_batch(self, stage: Stage, batch: PyTree, outputs: Mapping[str, Any]) -> None:
        """Count the tokens of a sample in the first batch."""
        if stage != "train":
            return
        tokens = self.tokens_per_sample
        given = tokens(batch) if callable(tokens) else tokens
        self._tokens = _positive("tokens_per_sample", given)

    def on_fit_start(self, run: Run) -> None:
        """Find the operations of a batch, and the peak."""
        devices = list(jax.tree.leaves(run.state.params)[0].sharding.device_set)
        flops = None if self.flops_per_sample is None else self.flops_per_sample * run.batch_size
        if flops is None:
            flops = run.plan.flops * len(devices)
        self.flops_per_batch = flops if flops > 0.0 and math.isfinite(flops) else None
        known = peak_of(devices[0].device_kind)
        peak = self.peak_flops or (
            known.of(arithmetic_of(run.precision, run.matmul_precision)) if known else None
        )
        self._total_peak = None if peak is None else peak * len(devices)
        if self.prog_bar:
            unit = "samples" if self._tokens is None else "tokens"
            # The loss is shown where nothing else is; it is to stay.
            run.prog_bar = run.prog_bar or {"train/loss"}
            run.prog_bar |= {f"throughput/{unit}_per_s", "throughput/mfu"}

    def on_train_start(self, run: Run) -> None:
        """Start counting."""
        # From the first report: until then the device's queue fills, which looks like speed.
        self._marks = deque()
        self._epoch_start = _mark(run)

    def on_train_epoch_start(self, run: Run) -> None:
        """Start counting the epoch."""
        self._epoch_start = _mark(run)

    def on_report(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        """Record the rates of the last steps, up to the newest one."""
        now = _mark(run)
        # A fused dispatch may bring several reports at once: one rate serves them.
        if self._marks and now.batches == self._marks[-1].batches:
            return
        self._marks.append(now)
        while len(self._marks) > 1 and now.steps - self._marks[1].steps >= self.window:
            self._marks.popleft()
        run.record("step", self._rates(self._marks[0], now))

    def on_train_epoch_end(self, run: Run) -> None:
        """Record the rates of the epoch."""
        if self._epoch_start is not None:
            run.record("epoch", self._rates(self._epoch_start, _mark(run)))

    def _rates(self, start: _Mark, end: _Mark) -> dict[str, float]:
        spent_s, batches = end.time_s - start.time_s, end.batches - start.batches
        if spent_s <= 0.0 or not batches:
            return {}
        samples = end.samples - start.samples
        counts: dict[str, float] = {
            "samples": samples,
            "batches": batches,
            "steps": end.steps - start.steps,
        }
        if self._tokens is not None:
            counts["tokens"] = samples * self._tokens
        if self.flops_per_batch is not None:
            counts["flops"] = self.flops_per_batch * batches
        rates = {f"throughput/{name}_per_s": n / spent_s for name, n in counts.items()}
        if self.flops_per_batch is not None and self._total_peak is not None:
            rates["throughput/mfu"] = rates["throughput/flops_per_s"] / self._total_peak
        return rates


def _positive(name: str, value: float | None) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0.0 < value < math.inf):
        raise ConfigError(f"{name} must be a positive number, got {value!r}.")
    return value


def _mark(run: Run) -> _Mark:
    pauses_s = sum(run.timings.seconds.get(phase, 0.0) for phase in _PAUSES)
    return _Mark(run.clock() - pauses_s, run.samples, run.total_batches, run.global_step)
