"""The dynamic scale of the loss for float16, in the compiled step. All of it is traced.

Which batches overflow, and what comes of them, is for the `guard` to say, whose state the scale
is part of. May import levels 0 and 1, and `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrainer.precision import LossScale
from jaxtrainer.state import Nested, TrainState
from jaxtrainer.types import Array

_MAX_SCALE = 2.0**60
"""Where gradients are all zero nothing overflows; up to here squares of the scale are finite."""


def init_scale(options: LossScale | None) -> Nested:
    """Return the scale (`[]`, float32) and the batches since it last changed (`[]`, int32)."""
    if options is None:
        return {}
    return {"scale": jnp.float32(options.init_scale), "since_change": jnp.int32(0)}


def loss_scale(state: TrainState) -> Array | None:
    """Return the scale for the next batch, or None where the loss is not scaled."""
    return state.guard.get("scale")


def scaled_grad(
    fn: Callable[[Any], tuple[Array, Any]], scale: Array | None
) -> Callable[[Any], tuple[tuple[Array, Any], Any]]:
    """Return `jax.value_and_grad(fn, has_aux=True)`, with the derivative taken of a scaled loss.

    Args:
        fn: Returns the loss (`[]`, float32) and whatever else.
        scale: `[]`, float32; None for no scale.
    """
    if scale is None:
        return jax.value_and_grad(fn, has_aux=True)

    def scaled(x: Any) -> tuple[Array, tuple[Array, Any]]:
        loss, aux = fn(x)
        return loss * scale, (loss, aux)

    def value_and_grad(x: Any) -> tuple[tuple[Array, Any], Any]:
        (_, out), grads = jax.value_and_grad(scaled, has_aux=True)(x)
        # Parameters are float32, and so are these: of a power of two the quotient is exact.
        return out, jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)

    return value_and_grad


def rescale(options: LossScale, before: Nested, overflows: Array, counts: Array) -> Nested:
    """Return the scale after a batch.

    Args:
        options: The rule.
        before: What `init_scale` returns, or this function.
        overflows: Whether the batch did, and the scale falls: `[]`, bool.
        counts: Whether it was one of the good ones, after which the scale rises: `[]`, bool.
    """
    scale, good = before["scale"], before["since_change"] + counts.astype(jnp.int32)
    rises = counts & (good >= options.growth_interval)
    lower = jnp.maximum(scale * options.backoff_factor, options.min_scale)
    higher = jnp.minimum(scale * options.growth_factor, _MAX_SCALE)
    scale = jnp.where(overflows, lower, jnp.where(rises, higher, scale))
    return {"scale": scale, "since_change": jnp.where(overflows | rises, 0, good)}
