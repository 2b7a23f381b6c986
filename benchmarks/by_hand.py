"""The references: what a good user of JAX writes by hand, and what the machine can do at most."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import Block
from benchmarks.workloads import Batch, Params, Workload

State = tuple[Any, Any, jax.Array]
"""Parameters, optimiser state, and sums over the epoch: `[loss, accuracy]`."""


class ByHand:
    """One workload, compiled by hand; every method trains it from the start and is a `Block`.

    Args:
        workload: What to train.
        epochs: How many are timed.
    """

    def __init__(self, workload: Workload, epochs: int) -> None:
        self.workload = workload
        self.epochs = epochs
        self.init = jax.jit(self._init)
        self.step = jax.jit(self.update, donate_argnums=0)
        self.whole_epoch = jax.jit(self._whole_epoch, donate_argnums=0)
        self._resident: Batch = {}

    def loop(self) -> Block:
        """A jitted, donated step for each batch, gathered by NumPy."""
        rng, arrays = np.random.default_rng(0), self.workload.arrays

        def epoch(state: State) -> State:
            for rows in self._order(rng):
                state = self.step(state, {name: a[rows] for name, a in arrays.items()})
            return state

        return self._timed(epoch)

    def limit(self) -> Block:
        """All data on the device, and one scan an epoch."""
        rng, arrays = np.random.default_rng(0), self._on_device()
        # Shuffled beforehand: a limit has no host work in it.
        orders = iter(jax.device_put([self._order(rng) for _ in range(self.epochs + 1)]))
        return self._timed(lambda state: self.whole_epoch(state, arrays, next(orders)))

    def bare(self) -> Block:
        """The jitted step alone, on batches that lie on the device already."""
        rows = list(self._order(np.random.default_rng(0)))[:64]
        arrays = self.workload.arrays
        batches = jax.device_put([{name: a[r] for name, a in arrays.items()} for r in rows])

        def epoch(state: State) -> State:
            for batch in itertools.islice(itertools.cycle(batches), self.workload.num_batches):
                state = self.step(state, batch)
            return state

        return self._timed(epoch)

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of each batch of an epoch: `[num_batches, batch]`, int32."""
        w = self.workload
        order = rng.permutation(np.arange(w.num_samples, dtype=np.int32))
        return order[: w.num_batches * w.batch_size].reshape(w.num_batches, w.batch_size)

    def _on_device(self) -> Batch:
        self._resident = self._resident or jax.device_put(self.workload.arrays)
        return self._resident

    def _timed(self, epoch: Callable[[State], State]) -> Block:
        def run(state: State) -> tuple[State, float]:
            params, opt_state, sums = epoch(state)
            loss = float(sums[0]) / self.workload.num_batches
            jax.block_until_ready(params)
            return (params, opt_state, jnp.zeros_like(sums)), loss

        began = time.perf_counter()
        state, loss = run(self.init(jax.random.key(0)))
        first = time.perf_counter()
        for _ in range(self.epochs):
            state, loss = run(state)
        epoch_s = (time.perf_counter() - first) / self.epochs
        return Block(epoch_s=epoch_s, first_s=first - began, loss=loss)

    def _init(self, key: jax.Array) -> State:
        params = self.workload.init(key)
        return params, self.workload.tx.init(params), jnp.zeros(2)

    def update(self, state: State, batch: Batch) -> State:
        params, opt_state, sums = state
        batch = self.workload.prepare(batch)

        def loss_fn(params: Params) -> tuple[jax.Array, jax.Array | None]:
            return self.workload.loss(_bf16(params) if self.workload.bf16 else params, batch)

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = self.workload.tx.update(grads, opt_state, params)
        accuracy = jnp.zeros(())
        if logits is not None:
            accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32))
        sums = sums + jnp.stack([loss, accuracy])
        return optax.apply_updates(params, updates), opt_state, sums

    def _whole_epoch(self, state: State, arrays: Batch, order: jax.Array) -> State:
        def body(state: State, rows: jax.Array) -> tuple[State, None]:
            # The rows are known to exist, so that no bounds are checked.
            batch = {n: a.at[rows].get(mode="promise_in_bounds") for n, a in arrays.items()}
            return self.update(state, batch), None

        return jax.lax.scan(body, state, order)[0]


def _bf16(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
