"""The guard in the compiled step: are loss and gradients numbers, and what happens if not.

All of it is traced but `frozen_batch` and `unfit`, which look at what it left behind. May import
levels 0 to 2.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrainer.loss_scale import init_scale, rescale
from jaxtrainer.metrics import MetricSpec
from jaxtrainer.precision import LossScale
from jaxtrainer.state import Nested, TrainState, named_leaves
from jaxtrainer.types import Array, PyTree

SKIPPED, NON_FINITE = "train/skipped_batches", "train/_non_finite"
LOSS_SCALE = "train/loss_scale"
_HIGH, _LOW = "train/_frozen_high", "train/_frozen_low"
_SPLIT = 1 << 20
"""A row is float32, exact up to 2**24 only: the index of a batch travels in two parts."""

_ON_HOST_BYTES = 16 << 20
"""Size up to which an array is looked at on the host."""

_MEMORY = 0.01
"""Least weight of a new norm in the running mean: it remembers some hundred batches."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How the compiled step answers to a batch whose loss or gradients are not finite.

    Such a batch changes nothing. After `max_skips` of them the next one freezes the state, as it
    was before it, until the host looks: no later batch changes anything either.

    Attributes:
        max_skips: Batches that may be left out.
        spike_z: Leave out a batch whose gradients' norm is that many standard deviations above
            its running mean, too; None does not.
        warm_up: Batches whose norms are only learnt from.
        loss_scale: How the loss is scaled, if it is. A batch that is not finite while the scale
            can still fall is one of its overflows: left out, and counted with no other.
    """

    max_skips: int = 0
    spike_z: float | None = None
    warm_up: int = 100
    loss_scale: LossScale | None = None


class Verdict(NamedTuple):
    """What the guard says of one batch.

    Attributes:
        leaves_out: Whether the batch is to change nothing: `[]`, bool.
        is_frozen: Whether the state is frozen, by this batch or an earlier one: `[]`, bool.
        guard: The guard's own state after the batch.
    """

    leaves_out: Array
    is_frozen: Array
    guard: Nested


def init_guard(guard: Guard | None) -> Nested:
    """Return the guard's state: counters, `[]` int32, and moments of the norm, `[]` float32.

    With a loss scale that is there too. `frozen` is the index of the batch that froze the state,
    plus one; 0 for none.
    """
    if guard is None:
        return {}
    counters = ("skipped", "non_finite", "frozen")
    moments = {k: jnp.float32(0) for k in ("mean", "variance")} | {"seen": jnp.int32(0)}
    state: Nested = {k: jnp.int32(0) for k in counters} | init_scale(guard.loss_scale)
    return state if guard.spike_z is None else state | moments


def num_trained(state: TrainState) -> Array:
    """Return how many batches have changed something: that of a step's random key.

    A batch that is left out takes no key, so that the run goes on as without it.
    """
    return state.batch_count - state.guard["skipped"] if state.guard else state.batch_count


def judge(
    guard: Guard, state: TrainState, loss: Array, changes: PyTree, is_known: Array
) -> Verdict:
    """Return the verdict on a batch.

    Args:
        guard: The rules.
        state: Before the batch.
        loss: Scalar.
        changes: Gradients; or, of a step that makes its own updates, the new parameters.
        is_known: Whether the host has said to leave this batch out.
    """
    before = state.guard
    was_frozen = before["frozen"] > 0
    is_asked = ~is_known & ~was_frozen
    counts = ~all_finite((loss, changes)) & is_asked
    overflows = jnp.zeros((), bool)
    if guard.loss_scale is not None:
        overflows = counts & (before["scale"] > guard.loss_scale.min_scale)
        counts = counts & ~overflows
    non_finite = before["non_finite"] + counts.astype(jnp.int32)
    freezes = counts & (non_finite > guard.max_skips)
    frozen = jnp.where(freezes, state.batch_count + 1, before["frozen"])
    out = counts | overflows | is_known | was_frozen
    moments: Nested = {}
    if guard.loss_scale is not None:
        moments = rescale(guard.loss_scale, before, overflows, is_asked & ~out)
    if guard.spike_z is not None:
        out, of_norm = _without_spikes(guard, before, _norm(changes), out)
        moments |= of_norm
    is_frozen = frozen > 0
    skipped = before["skipped"] + (out & ~is_frozen).astype(jnp.int32)
    after = {"skipped": skipped, "non_finite": non_finite, "frozen": frozen}
    return Verdict(out, is_frozen, after | moments)


def withhold(
    verdict: Verdict, window: Nested, grads: PyTree, loss: Array, weight: Array, apply: Array
) -> tuple[PyTree, Array, Array, Array]:
    """Return what an accumulation window gets: of a batch that is left out, nothing.

    Args:
        verdict: On the batch.
        window: `TrainState.accumulated` before it.
        grads: Of the batch.
        loss: Scalar of the batch.
        weight: Scalar weight of the batch.
        apply: Whether the batch ends the window. A window of which nothing is left has no update.
    """
    out = verdict.leaves_out

    def without(x: Array) -> Array:
        return jnp.where(out, jnp.zeros_like(x), x)

    is_empty = out & (window["weight"] == 0)
    apply = apply & ~verdict.is_frozen & ~is_empty
    return jax.tree.map(without, grads), without(loss), without(weight), apply


def settle(
    verdict: Verdict, before: TrainState, after: TrainState, *, is_windowed: bool
) -> TrainState:
    """Return the state after a batch: but for counters that before it, if it is left out.

    Of an accumulation window only the model's own state is put back: see `withhold`.
    """
    parts = ("model_state",) if is_windowed else ("params", "model_state", "opt_state")
    kept = {
        name: jax.tree.map(
            lambda old, new: jnp.where(verdict.leaves_out, old, new),
            getattr(before, name),
            getattr(after, name),
        )
        for name in parts
    }
    return after._replace(**kept, guard=verdict.guard)


def guard_specs(guard: Guard | None) -> tuple[MetricSpec, ...]:
    """Return what the guard reports, in the order of `guard_row`."""
    if guard is None:
        return ()
    is_scaled = guard.loss_scale is not None
    skips = guard.max_skips > 0 or guard.spike_z is not None or is_scaled
    names = (*([SKIPPED] if skips else ()), NON_FINITE, _HIGH, _LOW)
    how: Any = {"prog_bar": False, "on_step": True, "on_epoch": True}
    # Counters only grow: the largest of an epoch is the last. Of scales the lowest tells.
    scale = [MetricSpec(name=LOSS_SCALE, reduce="min", **how)] if is_scaled else []
    return (*(MetricSpec(name=name, reduce="max", **how) for name in names), *scale)


def guard_row(specs: tuple[MetricSpec, ...], state: Nested) -> Array:
    """Return the guard's numbers: `[num_specs]`, float32."""
    if not specs:
        return jnp.zeros((0,), jnp.float32)
    high, low = state["frozen"] // _SPLIT, state["frozen"] % _SPLIT
    values = {SKIPPED: state["skipped"], NON_FINITE: state["non_finite"], _HIGH: high, _LOW: low}
    values[LOSS_SCALE] = state.get("scale")
    return jnp.stack([values[spec.name].astype(jnp.float32) for spec in specs])


def all_finite(tree: PyTree) -> Array:
    """Return whether every floating-point number of a tree is finite: `[]`, bool."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    flags = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return functools.reduce(jnp.logical_and, flags, jnp.asarray(True))


def _without_spikes(guard: Guard, before: Nested, norm: Array, out: Array) -> tuple[Array, Nested]:
    """Return which batches are left out with spikes among them, and the moments of the others.

    Mean and variance are exponentially weighted (Finch, "Incremental calculation of weighted mean
    and variance", 2009), and equally as long as they have seen few.
    """
    mean, variance, seen = before["mean"], before["variance"], before["seen"]
    change = norm - mean
    is_warm = seen >= guard.warm_up
    out = out | (is_warm & (change > jnp.float32(guard.spike_z) * jnp.sqrt(variance)))
    weight = jnp.maximum(1 / (seen + 1).astype(jnp.float32), _MEMORY)
    # A step is no number where the norm is none, and is then not taken.
    new = {
        "mean": mean + weight * change,
        "variance": (1 - weight) * (variance + weight * change * change),
        "seen": seen + 1,
    }
    return out, {k: jnp.where(out, before[k], new[k]) for k in new}


def _norm(tree: PyTree) -> Array:
    squares = [jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def frozen_batch(metrics: Mapping[str, float]) -> int | None:
    """Return the index in the run of the batch that froze the state, from reported values."""
    index = int(metrics.get(_HIGH, 0.0)) * _SPLIT + int(metrics.get(_LOW, 0.0)) - 1
    return index if index >= 0 else None


def unfit(state: TrainState) -> str:
    """Return why a state is none to go on from, or an empty string; reads the device.

    Infinities are an error in parameters only: elsewhere they may be meant, as in a mask, or in
    the best value so far of an optimiser that follows the loss.
    """
    if state.guard and (frozen := int(state.guard["frozen"])):
        return f"batch {frozen - 1} of the run is not finite, and nothing was trained since"
    leaves = [*_leaves(state)]
    for _, leaf, _ in leaves:
        if _is_small(leaf):
            leaf.copy_to_host_async()
    flags = [(name, _is_good(leaf, allows_inf)) for name, leaf, allows_inf in leaves]
    bad = [name for name, flag in flags if not np.asarray(flag)]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"{', '.join(bad[:3])}{more} not finite" if bad else ""


def _leaves(state: TrainState) -> Iterator[tuple[str, Any, bool]]:
    window = {k: x for k, x in state.accumulated.items() if k != "logged"}
    parts = {
        "params": state.params,
        "averaged": state.averaged,
        "model_state": state.model_state,
        "opt_state": state.opt_state,
        "accumulated": window,
    }
    for part, tree in parts.items():
        for name, leaf in named_leaves(tree).items():
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                yield f"{part}/{name}", leaf, part not in ("params", "averaged")


def _is_small(leaf: Array) -> bool:
    return leaf.is_fully_addressable and leaf.nbytes <= _ON_HOST_BYTES


def _is_good(leaf: Array, allows_inf: bool) -> Any:
    # A save takes small ones to the host anyway, and there is nothing to compile for them.
    if not _is_small(leaf):
        return _is_good_on_device(leaf, allows_inf)
    host = np.asarray(leaf)
    return not np.isnan(host).any() if allows_inf else np.isfinite(host).all()


# Leaf by leaf: models have few shapes of large arrays, and so little to compile.
@functools.partial(jax.jit, static_argnums=1)
def _is_good_on_device(leaf: Array, allows_inf: bool) -> Array:
    return ~jnp.any(jnp.isnan(leaf)) if allows_inf else jnp.all(jnp.isfinite(leaf))
