"""How many steps one dispatch runs: decided by measurement, on copies, before training.

Inside a loop XLA's CPU backend runs convolutions several times slower, while a small dense
model gains several times from not returning to Python. Both programs are compiled side by side
and timed. May import levels 0 to 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtrainer.sharding import is_lockstep
from jaxtrainer.step import STOP, Program
from jaxtrainer.types import PyTree

MAX_STEPS = 32
CHUNK_BYTES = 32 << 20
LONG_STEP_S = 5e-3
"""Seconds a step above which fusing cannot gain: a dispatch costs less than a hundredth."""

_LONG_STEP_FLOPS = {"cpu": 2e9, "gpu": 2e12, "tpu": 2e12}
_TRIAL_S = 0.03
_SLACK = 1.02


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The compiled training program, and how it was chosen."""

    step: Callable[..., Any]
    fused: bool
    capacity: int
    reason: str


def chunk_capacity(wanted: int | str, fed: PyTree, num_batches: int | None) -> int:
    """Return how many batches the feed stacks to a chunk: bounded in bytes and by the epoch."""
    if isinstance(wanted, int) and wanted > 1:
        return wanted
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(fed))
    bounds = [MAX_STEPS, max(1, CHUNK_BYTES // max(size, 1))]
    return min([*bounds, num_batches] if num_batches else bounds)


class DispatchChoice:
    """Which programs to compile for the training step, and then which one to run.

    Args:
        wanted: `steps_per_dispatch`.
        program: The traced step.
        lower: Traces and lowers one of its functions, for `compile()`.
        arguments: Specs of the arguments: state, resident data, chunk, control.
        saved: What the checkpoint that is resumed was run with, so that the bits stay the same.

    Attributes:
        lowered: The candidates by name, `"fused"` and `"single"`.
    """

    def __init__(
        self,
        wanted: int | str,
        program: Program,
        lower: Callable[[Callable[..., Any]], Any],
        arguments: tuple[Any, ...],
        saved: Mapping[str, Any] | None,
    ) -> None:
        self.arguments = arguments
        self.capacity = jax.tree.leaves(arguments[2])[0].shape[0]
        self.reason = "as asked for" if saved is None else "as in the checkpoint"
        if saved is not None or wanted != "auto" or self.capacity == 1:
            is_fused = bool(saved["fused"]) if saved is not None else wanted != 1
            names = ["fused" if is_fused and self.capacity > 1 else "single"]
        else:
            names = ["single", "fused"]
        self.lowered: dict[str, Any] = {}
        for name in names:
            self.lowered[name] = lower(getattr(program, name))
            if len(names) > 1 and _is_long(self.lowered[name]):
                self.reason = "a step takes long"
                break

    def decide(self, compiled: Mapping[str, Callable[..., Any]]) -> Dispatch:
        """Return the faster of the compiled candidates."""
        name = next(iter(compiled))
        if len(compiled) > 1:
            name = self._faster(compiled["single"], compiled["fused"])
        return Dispatch(
            step=compiled[name], fused=name == "fused", capacity=self.capacity, reason=self.reason
        )

    def _faster(self, single: Callable[..., Any], fused: Callable[..., Any]) -> str:
        alone_s = self._seconds_per_step(single, 1, _TRIAL_S)
        if alone_s > LONG_STEP_S:
            self.reason = f"a step takes {alone_s * 1e3:.1f} ms"
            return "single"
        count = max(2, min(self.capacity, int(_TRIAL_S / alone_s)))
        together_s = self._seconds_per_step(fused, count, _TRIAL_S)
        self.reason = f"{together_s * 1e6:.0f} us a step fused, {alone_s * 1e6:.0f} us one by one"
        return "fused" if together_s < alone_s * _SLACK else "single"

    def _seconds_per_step(self, program: Callable[..., Any], count: int, budget_s: float) -> float:
        """Return the best time of a step over some trials, on zeros in place of state and data."""
        *arrays, control_spec = self.arguments
        state, resident, chunk = (jax.tree.map(_zeros, tree) for tree in arrays)
        control = np.zeros(control_spec.shape, np.int32)
        control[STOP] = count
        best, rows, spent = float("inf"), None, 0.0
        calls = max(1, MAX_STEPS // (4 * count))
        lockstep = is_lockstep(jax.tree.leaves(self.arguments[2])[0].sharding.mesh)
        # The first trial warms up, and is left out.
        for trial in range(6):
            began = time.perf_counter()
            for _ in range(calls if trial else 1):
                state, rows = program(state, resident, chunk, control)
                if lockstep:
                    rows.block_until_ready()
            jax.block_until_ready(rows)
            seconds = time.perf_counter() - began
            spent += seconds
            best = min(best, seconds / (count * calls)) if trial else best
            if trial and (spent > budget_s or best > LONG_STEP_S):
                break
        return best


def _is_long(lowered: Any) -> bool:
    """Return whether a step has so much to compute that its dispatch cannot matter."""
    cost = lowered.cost_analysis() or {}
    return cost.get("flops", 0.0) > _LONG_STEP_FLOPS.get(jax.default_backend(), 2e12)


def _zeros(spec: Any) -> jax.Array:
    return jax.device_put(np.zeros(spec.shape, spec.dtype), spec.sharding)
