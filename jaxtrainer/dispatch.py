"""How many steps one dispatch runs: decided by measurement, on copies, before training.

Inside a loop XLA's CPU backend runs convolutions several times slower, while a small dense
model gains several times from not returning to Python. Both programs are compiled
and timed. May import levels 0 to 3.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrainer import distributed
from jaxtrainer.control import STOP
from jaxtrainer.feed import Feed
from jaxtrainer.sharding import is_lockstep, place
from jaxtrainer.step import Program
from jaxtrainer.types import PyTree

MAX_STEPS = 128
CHUNK_BYTES = 32 << 20
SMALL_CHUNK_BYTES = 1 << 20
"""Up to this size a chunk may hold `MAX_STEPS` batches, above it a quarter."""

DISPATCH_S = 0.05
"""Seconds that a dispatch is meant to last at most: signals and the bar wait for its end."""

LONG_STEP_S = 5e-3
"""Seconds a step above which fusing cannot gain: a dispatch costs less than a hundredth."""

_LONG_STEP_FLOPS = {"cpu": 2e9, "gpu": 2e12, "tpu": 2e12}
_TRIAL_S = 0.015
_ROUNDS = 4
_SLACK = 1.1
"""Fused is taken unless it is slower by more than what a short measurement on a busy machine
gets wrong: it also frees the loop's thread."""


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The compiled training program, and how it was chosen.

    Attributes:
        capacity: Batches that a chunk holds.
        steps: Batches that one call runs at most.
    """

    step: Callable[..., Any]
    fused: bool
    capacity: int
    steps: int
    reason: str


def chunk_capacity(
    wanted: int | str,
    fed: PyTree,
    num_batches: int | None,
    most: int = MAX_STEPS,
    *,
    is_mixed: bool = False,
) -> int:
    """Return how many batches the feed stacks to a chunk: bounded in bytes and by the epoch.

    Where batches of several shapes are mixed, few chunks are full, and all travel whole.
    """
    if isinstance(wanted, int) and wanted > 1:
        return wanted
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(fed))
    most = min(most, MAX_STEPS // 4) if is_mixed else most
    most = most if size * most <= SMALL_CHUNK_BYTES else min(most, MAX_STEPS // 4)
    most_bytes = SMALL_CHUNK_BYTES if is_mixed else CHUNK_BYTES
    bounds = [most, max(1, most_bytes // max(size, 1))]
    return min([*bounds, num_batches] if num_batches else bounds)


class DispatchChoice:
    """Which programs to compile for the training step, and then which one to run.

    Args:
        wanted: `steps_per_dispatch`.
        program: The traced step.
        lower: Traces and lowers one of its functions, for `compile()`.
        arguments: Specs of the arguments: state, resident data, chunk, control.
        saved: What the checkpoint that is resumed was run with, so that the bits stay the same.
        memory: Directory in which measured choices are kept: a later run of the same program on
            the same kind of device is then the same choice, and compiles one program only.

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
        memory: Path | None = None,
    ) -> None:
        self.arguments = arguments
        self._file = None if memory is None else memory / f"{_key(program, arguments)}.json"
        self.capacity = jax.tree.leaves(arguments[2])[0].shape[0]
        self.steps = self.capacity
        self.reason = "as asked for" if saved is None else "as in the checkpoint"
        if saved is not None:
            names = ["fused" if saved["fused"] else "single"]
            self.steps = saved["steps"]
        elif wanted != "auto" or self.capacity == 1:
            names = ["fused" if wanted != 1 and self.capacity > 1 else "single"]
        elif remembered := distributed.broadcast(self._remembered(), "dispatch"):
            self.reason = "as measured before"
            name, self.steps = remembered
            names = [name]
        else:
            names = ["single", "fused"]
        self.lowered: dict[str, Any] = {}
        for name in names:
            self.lowered[name] = lower(getattr(program, name))
            if len(names) > 1 and _is_long(self.lowered[name]):
                self.reason = "a step takes long"
                break

    def decide(self, compiled: Mapping[str, Callable[..., Any]], feed: Feed) -> Dispatch:
        """Return the faster of the compiled candidates; of the feed its resident data is used."""
        name = next(iter(compiled))
        if len(compiled) > 1:
            name = self._faster(compiled["single"], compiled["fused"], feed.resident)
            self._remember(name)
        return Dispatch(
            step=compiled[name],
            fused=name == "fused",
            capacity=self.capacity,
            steps=self.steps,
            reason=self.reason,
        )

    def _remembered(self) -> tuple[str, int] | None:
        try:
            found = json.loads(self._file.read_text()) if self._file else {}
            name, steps = found["form"], int(found["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (name, steps) if name in ("single", "fused") and steps > 0 else None

    def _remember(self, name: str) -> None:
        if self._file is None or not distributed.is_first():
            return
        # A cache that cannot be written costs the next run a measurement, and nothing else.
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft = self._file.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps({"form": name, "steps": self.steps, "reason": self.reason}))
            draft.replace(self._file)

    def _faster(
        self, single: Callable[..., Any], fused: Callable[..., Any], resident: PyTree
    ) -> str:
        trials = _Trials(self.arguments, resident)
        alone, together = trials.of(single), trials.of(fused)
        # The first calls set up threads and memory, and are no measure; of the next the best is.
        quick_s = distributed.broadcast(min(alone.run(1, 1) for _ in range(4)), "dispatch")
        if quick_s > LONG_STEP_S:
            self.reason = f"a step takes {quick_s * 1e3:.1f} ms"
            return "single"
        steps = max(2, min(self.capacity, int(_TRIAL_S / quick_s)))
        together.run(steps, 1)
        # In turn, and the best of each: a machine that slows down meanwhile slows down both.
        for _ in range(_ROUNDS):
            alone.run(1, steps)
            together.run(steps, 1)
        # Each process has its own clock: process 0 decides for all.
        fused_s, single_s = distributed.broadcast([together.best_s, alone.best_s], "dispatch")
        self.steps = max(1, min(self.capacity, int(DISPATCH_S / fused_s)))
        self.reason = f"{fused_s * 1e6:.0f} us a step fused, {single_s * 1e6:.0f} us one by one"
        return "fused" if fused_s < single_s * _SLACK else "single"


class _Trials:
    """Runs forms of the step in turn, on one set of zeros in place of state and batches."""

    def __init__(self, arguments: tuple[Any, ...], resident: PyTree) -> None:
        state, _, chunk, control_spec = arguments
        self.resident = resident
        self.state, self.chunk = jax.tree.map(_zeros, state), jax.tree.map(_zeros, chunk)
        self.control = np.zeros(control_spec.shape, np.int32)
        self.is_lockstep = is_lockstep(jax.tree.leaves(arguments[2])[0].sharding.mesh)

    def of(self, program: Callable[..., Any]) -> _Trial:
        """Return the trial of one form."""
        return _Trial(self, program)


class _Trial:
    """A compiled form of the step.

    Attributes:
        best_s: Least seconds a step so far.
    """

    def __init__(self, trials: _Trials, program: Callable[..., Any]) -> None:
        self._trials = trials
        self._program = program
        self.best_s = float("inf")

    def run(self, steps: int, calls: int) -> float:
        """Return the seconds a step of `calls` dispatches of `steps` each."""
        on = self._trials
        on.control[STOP] = steps
        began = time.perf_counter()
        for _ in range(calls):
            arguments = on.state, on.resident, on.chunk, on.control.copy()
            on.state, rows = self._program(*arguments)
            if on.is_lockstep:
                rows.block_until_ready()
        jax.block_until_ready(on.state)
        seconds = (time.perf_counter() - began) / (steps * calls)
        self.best_s = min(self.best_s, seconds)
        return seconds


def _key(program: Program, arguments: tuple[Any, ...]) -> str:
    specs = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(arguments)]
    mesh = jax.tree.leaves(arguments[2])[0].sharding.mesh
    where = jax.devices()[0].device_kind, dict(mesh.shape), jax.device_count()
    text = repr((program.fingerprint, specs, where, jax.__version__))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_long(lowered: Any) -> bool:
    """Return whether a step has so much to compute that its dispatch cannot matter."""
    cost = lowered.cost_analysis() or {}
    return cost.get("flops", 0.0) > _LONG_STEP_FLOPS.get(jax.default_backend(), 2e12)


def _zeros(spec: Any) -> jax.Array:
    return place(np.zeros(spec.shape, spec.dtype), spec.sharding)
