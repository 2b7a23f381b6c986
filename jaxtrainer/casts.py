"""The dtype in which each module of a model computes, where the precision has exceptions.

May import level 0, `precision` and what it wraps calls with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import nnx

from jaxtrainer.precision import Precision, cast, is_floating
from jaxtrainer.scopes import Around


def cast_calls(precision: Precision) -> Around:
    """Return what calls modules with inputs in their own dtype: see `Precision`.

    Results are not cast: a head in float32 gives float32 logits, and what follows a norm in
    float32 casts its own inputs.
    """

    def around(path: str, fn: Any, module: Any, args: Any, kwargs: Any) -> Any:
        override = precision.override_of(path) if path else None
        dtype = override
        if override is None and _has_params(module):
            dtype = precision.compute
        args, kwargs = _cast_inputs((args, kwargs), dtype)
        with _computing_in(module, override):
            return fn(module, *args, **kwargs)

    return around


def _has_params(module: Any) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(module).values())


def _cast_inputs(tree: Any, dtype: Any) -> Any:
    # Modules among the arguments are to be the same ones: a copy would not be trained.
    is_node = lambda x: isinstance(x, nnx.Pytree | nnx.Variable)  # noqa: E731
    return jax.tree.map(
        lambda x: x if is_node(x) or not is_floating(x) else cast(x, dtype), tree, is_leaf=is_node
    )


@contextmanager
def _computing_in(module: Any, dtype: Any) -> Iterator[None]:
    """Set the `dtype` of a Flax layer, which decides over that of its inputs, for one call."""
    before = vars(module).get("dtype")
    if dtype is None or before is None or isinstance(before, nnx.Variable):
        yield
        return
    # Not by `setattr`, which NNX refuses on a module of an outer trace.
    vars(module)["dtype"] = dtype
    try:
        yield
    finally:
        vars(module)["dtype"] = before
