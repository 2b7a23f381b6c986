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
import jax.numpy as jnp
import numpy as np

from jaxtrainer.programs import compile_all
from jaxtrainer.step import START, STOP, Program
from jaxtrainer.types import PyTree

MAX_STEPS = 32
CHUNK_BYTES = 32 << 20
LONG_STEP_S = 5e-3
"""Seconds a step above which fusing cannot gain: a dispatch costs less than a hundredth."""

_TRIALS = 3


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


def choose_dispatch(
    wanted: int | str,
    program: Program,
    lower: Callable[[Callable[..., Any]], Any],
    arguments: tuple[Any, ...],
    saved: Mapping[str, Any] | None,
) -> Dispatch:
    """Return the compiled program: as asked for, as saved with the checkpoint, or the faster one.

    Args:
        wanted: `steps_per_dispatch`.
        program: The traced step.
        lower: Traces and lowers one, for its `compile()`.
        arguments: Specs of its arguments.
        saved: What the checkpoint that is resumed was run with.
    """
    capacity = jax.tree.leaves(arguments[2])[0].shape[0]

    def made(step: Callable[..., Any], is_fused: bool, reason: str) -> Dispatch:
        return Dispatch(step=step, fused=is_fused, capacity=capacity, reason=reason)

    if saved is not None or wanted != "auto" or capacity == 1:
        is_fused = capacity > 1 and (bool(saved["fused"]) if saved is not None else wanted != 1)
        reason = "as asked for" if saved is None else "as in the checkpoint"
        chosen = program.fused if is_fused else program.single
        return made(lower(chosen).compile(), is_fused, reason)
    # Tracing is Python and goes one after the other; XLA compiles both at the same time.
    lowered = [lower(program.fused), lower(program.single)]
    together, alone = compile_all(*(x.compile for x in lowered))
    alone_s = _seconds_per_step(alone, arguments, 1, capacity)
    if alone_s > LONG_STEP_S:
        return made(alone, False, f"a step takes {alone_s * 1e3:.1f} ms")
    together_s = _seconds_per_step(together, arguments, capacity, capacity)
    faster = together_s < alone_s
    reason = f"{together_s * 1e6:.0f} us a step fused, {alone_s * 1e6:.0f} us one by one"
    return made(together if faster else alone, faster, reason)


def _seconds_per_step(
    program: Callable[..., Any], arguments: tuple[Any, ...], count: int, capacity: int
) -> float:
    """Return the best time of a step over a few trials, on zeros in place of state and data."""
    state, resident, chunk, control_spec = arguments
    state, resident, chunk = (jax.tree.map(_zeros, x) for x in (state, resident, chunk))
    best = float("inf")
    for _ in range(_TRIALS + 1):
        began = time.perf_counter()
        rows = None
        for start in range(0, capacity, count):
            control = np.zeros(control_spec.shape, np.int32)
            control[START], control[STOP] = start, start + count
            state, rows = program(state, resident, chunk, control)
        jax.block_until_ready(rows)
        best = min(best, (time.perf_counter() - began) / capacity)
        if best > LONG_STEP_S:
            break
    return best


def _zeros(spec: Any) -> jax.Array:
    if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), spec.sharding)
    return jax.device_put(np.zeros(spec.shape, spec.dtype), spec.sharding)
