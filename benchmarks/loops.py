"""Three ways to run the steps of one chunk of K batches: `fori_loop`, `scan`, one by one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks.by_hand import ByHand, State
from benchmarks.common import interleave
from benchmarks.workloads import Batch, Workload


def loop_rows(workload: Workload, sizes: Sequence[int], steps: int, rounds: int) -> list[dict]:
    """Microseconds a step of the three loops at each K."""
    hand = ByHand(workload, 1)
    rows = []
    for k in sizes:
        order = np.arange(k * workload.batch_size).reshape(k, -1) % workload.num_samples
        chunk = jax.device_put({name: a[order] for name, a in workload.arrays.items()})
        runs = {
            name: functools.partial(_us_per_step, hand, run, chunk, k, steps)
            for name, run in _loops(hand).items()
        }
        interleave(runs, 1)  # compiles
        results = interleave(runs, rounds)
        rows.append({"K": str(k), **{name: median(us) for name, us in results.items()}})
    return rows


def _loops(hand: ByHand) -> dict[str, Callable[[State, Batch, int], State]]:
    def at(chunk: Batch, i: Any) -> Batch:
        return {name: a[i] for name, a in chunk.items()}

    @functools.partial(jax.jit, donate_argnums=0)
    def fori(state: State, chunk: Batch, count: int) -> State:
        return jax.lax.fori_loop(0, count, lambda i, s: hand.update(s, at(chunk, i)), state)

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(state: State, chunk: Batch, count: int) -> State:
        return jax.lax.scan(lambda s, batch: (hand.update(s, batch), None), state, chunk)[0]

    def single(state: State, chunk: Batch, count: int) -> State:
        for i in range(count):
            state = take(state, chunk, i)
        return state

    @functools.partial(jax.jit, donate_argnums=0)
    def take(state: State, chunk: Batch, i: int) -> State:
        return hand.update(state, at(chunk, i))

    return {"fori_loop": fori, "scan": scan, "one by one": single}


def _us_per_step(hand: ByHand, run: Any, chunk: Batch, k: int, steps: int) -> float:
    state = jax.block_until_ready(run(hand.init(jax.random.key(0)), chunk, k))
    calls = max(1, steps // k)
    began = time.perf_counter()
    for _ in range(calls):
        state = run(state, chunk, k)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / (calls * k) * 1e6
