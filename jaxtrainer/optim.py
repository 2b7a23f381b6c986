"""What `configure_optimizers` returned, as one pair of init and update over the params.

Runs while tracing. May import what is at or below level 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrainer.errors import ConfigError
from jaxtrainer.types import Array, PyTree


def parse_optimizer(returned: Any, owner: str) -> optax.GradientTransformationExtraArgs:
    """Return the Optax transformation that `configure_optimizers` returned.

    Raises:
        ConfigError: For anything else, with the corrected code.
    """
    if isinstance(returned, optax.GradientTransformation):
        return optax.with_extra_args_support(returned)
    kind = "None" if returned is None else f"an object of type {type(returned).__name__}"
    raise ConfigError(
        f"{owner}.configure_optimizers returned {kind}, expected an "
        f"`optax.GradientTransformation`; {_instead(returned)}."
    )


def _instead(returned: Any) -> str:
    if isinstance(returned, tuple | list | Mapping):
        values = returned.values() if isinstance(returned, Mapping) else returned
        if sum(isinstance(x, optax.GradientTransformation) for x in values) > 1:
            return "for several, each with its own parameters, return an `optax.partition(...)`"
        return (
            "a schedule is part of its optimizer: return e.g. "
            "`optax.adam(optax.cosine_decay_schedule(1e-3, steps))`"
        )
    if type(returned).__name__ == "Optimizer":
        return "the trainer keeps its state itself: return the transformation alone, without params"
    if callable(returned):
        return "call it: return e.g. `optax.adam(1e-3)`, or `optax.adam(schedule)`"
    return "return e.g. `optax.adam(1e-3)`"


def clip(grads: PyTree, limit: float, algorithm: str) -> tuple[PyTree, Array | None]:
    """Clip gradients, and return them with their global norm before (None if not computed).

    Args:
        grads: Pytree of gradients.
        limit: Largest norm of all gradients together (`"norm"`), or of each number (`"value"`).
        algorithm: `"norm"` or `"value"`.

    References:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013.
    """
    if algorithm == "value":
        return jax.tree.map(lambda g: jnp.clip(g, -limit, limit), grads), None
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-16))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), norm
