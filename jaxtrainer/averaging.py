"""Averaged weights beside the trained ones: what they hold, how a step updates them.

They are part of the state, so that they live where the weights live, are saved with them, and
need no copy to be evaluated. Traced, but for `evaluated`. May import levels 0 and 1, and `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrainer.precision import wide
from jaxtrainer.state import Nested, TrainState, flat_items, nest
from jaxtrainer.types import Array, PyTree


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Which weights enter the average, and with what weight. Both functions are traced.

    Attributes:
        is_sample: `is_sample(step, epoch, ends_epoch)`: whether the weights after that many
            updates (`[]`, int32) are a sample; called with step 0 for the initial ones.
        weight: `weight(count)`: weight of the next sample when the average has `count` (`[]`,
            int32, at least 1), in `average + weight * (sample - average)`; a float32 scalar.
        use_buffers: Average the floating-point model state too; if not, the latest is used.
        is_dense: Whether, from the first sample on, every update is one.
    """

    is_sample: Callable[[Array, Array, Array], Array]
    weight: Callable[[Array], Array]
    use_buffers: bool = True
    is_dense: bool = False


def init_average(averaging: Averaging | None, params: Nested, model_state: Nested) -> Nested:
    """Return the averages before the first update: copies, in float32 or wider.

    Returns:
        `{"params", "model_state", "step", "count"}`, or `{}` without averaging. `step` counts
        updates and `count` samples (`[]`, int32).
    """
    if averaging is None:
        return {}
    values = _copies(_sources(averaging.use_buffers, params, model_state))
    zero = jnp.int32(0)
    first = averaging.is_sample(zero, zero, jnp.asarray(False))
    return {**values, "step": zero, "count": jnp.asarray(first).astype(jnp.int32)}


def update_average(
    averaging: Averaging | None,
    state: TrainState,
    *,
    updated: Array | bool,
    epoch: Array,
    ends_epoch: Array,
    is_seen: Array | bool,
) -> TrainState:
    """Take the weights after a batch into the averages.

    Until the first sample the averages are the trained weights, so that an evaluation never asks
    whether averaging has begun.

    Args:
        averaging: The rule; None for no averages.
        state: After the batch's update.
        updated: Whether the batch ended an accumulation window; `True` where each one does.
        epoch: Index of the epoch, `[]` int32.
        ends_epoch: Whether the batch is the epoch's last.
        is_seen: Whether this state comes back to the host: until the first sample, the copies
            that nobody sees are left out.
    """
    if averaging is None:
        return state
    before, count = state.averaged, state.averaged["count"]
    new = _sources(averaging.use_buffers, state.params, state.model_state)
    old = {name: before[name] for name in new}
    step = before["step"] + jnp.asarray(updated).astype(jnp.int32)
    sampled = averaging.is_sample(step, epoch, ends_epoch) & updated
    weight = averaging.weight(jnp.maximum(count, 1))

    def move() -> Nested:
        # A lerp of weight one is a copy but for rounding, and the copy has to be exact.
        is_mean = sampled & (count > 0)
        return jax.tree.map(lambda a, x: _moved(a, x, weight, is_mean), old, new)

    if averaging.is_dense and updated is True:
        values = move()
    else:
        values = lax.cond(sampled | ((count == 0) & is_seen), move, lambda: old)
    count = count + sampled.astype(jnp.int32)
    return state._replace(averaged={**values, "step": step, "count": count})


def average_spec(params: PyTree, model_state: PyTree, *, use_buffers: bool) -> Nested:
    """Return the specs of the averages of weights with these specs, placed like them."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    values = jax.tree.map(_wide_spec, _sources(use_buffers, params, model_state))
    return {**values, "step": scalar, "count": scalar}


def evaluated(state: TrainState) -> tuple[Nested, Nested]:
    """Return `(params, model_state)` as evaluations use them: no array is copied or read."""
    return overlaid(state.averaged, state.params, state.model_state)


def overlaid(averaged: Nested, params: Nested, model_state: Nested) -> tuple[Nested, Nested]:
    """Return params and model state with what is averaged in its place; specs work too."""
    if not averaged:
        return params, model_state
    flat = dict(flat_items(model_state)) | dict(flat_items(averaged["model_state"]))
    return averaged["params"], nest(flat)


def narrowed(variables: tuple[Nested, Nested], like: tuple[Nested, Nested]) -> Any:
    """Return averaged variables in the dtypes that the trained ones have."""
    return jax.tree.map(
        lambda x, old: x if x.dtype == old.dtype else x.astype(old.dtype), variables, like
    )


def _sources(use_buffers: bool, params: Nested, model_state: Nested) -> Nested:
    buffers = {k: x for k, x in flat_items(model_state) if jnp.issubdtype(x.dtype, jnp.inexact)}
    return {"params": params, "model_state": nest(buffers) if use_buffers else {}}


def _copies(values: Nested) -> Nested:
    # Copies also where the dtype stays: the step donates the averages and the weights alike.
    return jax.tree.map(lambda x: jnp.array(x, wide(x.dtype)), values)


def _moved(average: Array, value: Array, weight: Array, is_mean: Array) -> Array:
    value = value.astype(average.dtype)
    mean = average + weight.astype(average.dtype) * (value - average)
    return jnp.where(is_mean, mean, value)


def _wide_spec(spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, wide(spec.dtype), sharding=spec.sharding)
