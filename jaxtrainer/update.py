"""From gradients to an update: accumulation, clipping, the optimisers. Runs while tracing.

Below `step`, which is its only caller while training.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxtrainer.optim import clip
from jaxtrainer.state import Nested, TrainState
from jaxtrainer.types import Array, PyTree


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What turns gradients into an update."""

    tx: optax.GradientTransformationExtraArgs
    accumulate: int = 1
    clip_value: float | None = None
    clip_algorithm: str = "norm"


def init_opt_state(options: OptimizerOptions, params: Nested) -> tuple[PyTree, PyTree]:
    """Return optimiser state and the empty accumulation window (traced)."""
    window: PyTree = {}
    if options.accumulate > 1:
        grads = jax.tree.map(jnp.zeros_like, params)
        window = {"grads": grads, "weight": jnp.zeros((), jnp.float32)}
    return {"default": options.tx.init(params)}, window


def optimise(
    options: OptimizerOptions,
    state: TrainState,
    grads: PyTree,
    loss: Array,
    weight: Array,
    apply: Array,
) -> tuple[TrainState, Array]:
    """Take the gradients of one batch into the state: into the window, or as an update.

    Args:
        options: How gradients become updates.
        state: Before this batch's update.
        grads: Like `state.params`.
        loss: Scalar of this batch.
        weight: Scalar weight of this batch in its window.
        apply: Scalar bool: whether this batch ends the window.

    Returns:
        The new state, and the gradients' global norm before clipping (0 where not computed).
    """
    if options.accumulate == 1:
        return _update(options, state, grads, loss)
    window = state.accumulated
    # The mean over the window weighs each batch by its samples, also in a window cut short.
    summed = jax.tree.map(lambda a, g: a + weight * g, window["grads"], grads)
    total = window["weight"] + weight

    def end_window(state: TrainState) -> tuple[TrainState, Array]:
        mean = jax.tree.map(lambda g: (g / total).astype(g.dtype), summed)
        state, norm = _update(options, state, mean, loss)
        empty = {"grads": jax.tree.map(jnp.zeros_like, summed), "weight": jnp.zeros_like(total)}
        return state._replace(accumulated=empty), norm

    def go_on(state: TrainState) -> tuple[TrainState, Array]:
        return state._replace(accumulated={"grads": summed, "weight": total}), jnp.zeros(())

    return lax.cond(apply, end_window, go_on, state)


def _update(
    options: OptimizerOptions, state: TrainState, grads: PyTree, loss: Array
) -> tuple[TrainState, Array]:
    norm = jnp.zeros(())
    if options.clip_value is not None:
        grads, clipped_norm = clip(grads, options.clip_value, options.clip_algorithm)
        norm = norm if clipped_norm is None else clipped_norm
    # Optax multiplies its integer counters with floats, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = options.tx.update(
            grads, state.opt_state["default"], state.params, value=loss
        )
    params = optax.apply_updates(state.params, updates)
    opt_state = like(state.opt_state, {"default": opt_state})
    return state._replace(params=params, opt_state=opt_state), norm


def like(old: PyTree, new: PyTree) -> PyTree:
    """Return new with the strong dtypes of old, so that one program serves every step."""
    return jax.tree.map(lambda o, n: lax.convert_element_type(n, o.dtype), old, new)
