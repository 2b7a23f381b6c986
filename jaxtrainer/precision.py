"""Which dtypes parameters are kept in, and which the step computes in.

Imports `errors` and `types` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.types import PyTree


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes of stored parameters and of the computation."""

    name: str
    params: Any
    compute: Any

    def cast_to_compute(self, tree: PyTree) -> PyTree:
        """Cast the floating-point arrays of a tree to the compute dtype (traced)."""
        return _cast(tree, self.compute)

    def cast_to_params(self, tree: PyTree) -> PyTree:
        """Cast the floating-point arrays of a tree to the dtype parameters are kept in."""
        return _cast(tree, self.params)


PRECISIONS = {
    "32-true": Precision(name="32-true", params=None, compute=None),
    "bf16-mixed": Precision(name="bf16-mixed", params=None, compute=jnp.bfloat16),
    "bf16-true": Precision(name="bf16-true", params=jnp.bfloat16, compute=jnp.bfloat16),
}


def parse_precision(name: str | int) -> Precision:
    """Return the policy of that name.

    Raises:
        ConfigError: If there is none, naming the close match.
    """
    aliases = {"32": "32-true", "float32": "32-true", "bf16": "bf16-mixed"}
    key = aliases.get(str(name), str(name))
    if key not in PRECISIONS:
        known = ", ".join(map(repr, PRECISIONS))
        hint = did_you_mean(key, PRECISIONS)
        raise ConfigError(f"precision={name!r} is not known; use one of {known}.{hint}")
    return PRECISIONS[key]


def wide(dtype: Any) -> Any:
    """Return the dtype in which to add up values of a dtype: float32 or wider.

    In bfloat16 a sum or an average would round away what each value adds.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    if dtype is None:
        return tree

    def cast(leaf: Any) -> Any:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.astype(dtype)
        return leaf

    return jax.tree.map(cast, tree)
