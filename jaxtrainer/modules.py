"""The modules that a model is made of, by path: for summaries, never for a step.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx


def module_types(model: Any) -> dict[str, str]:
    """Return the class name of each module of a model by its path, in the order of definition.

    Of an NNX model these are its modules, of another pytree its nodes that are no plain container,
    so that Linen's dicts have none. A module that is reached by several paths has the first.

    Args:
        model: Its arrays may be abstract or traced.

    Example:
        >>> module_types(nnx.Dict(head=nnx.Linear(2, 1, rngs=nnx.Rngs(0))))
        {'head': 'Linear'}
    """
    if not isinstance(model, nnx.Module):
        return dict(_node_types(model, ""))
    modules = dict(nnx.iter_modules(model))
    # NNX walks attributes by their names; a model is read in the order in which it was written.
    order = {path: {n: i for i, n in enumerate(vars(module))} for path, module in modules.items()}

    def place(path: tuple[Any, ...]) -> list[int]:
        return [order.get(path[:i], {}).get(str(key), 1 << 30) for i, key in enumerate(path)]

    paths = sorted((path for path in modules if path), key=place)
    return {"/".join(map(str, path)): type(modules[path]).__name__ for path in paths}


def _node_types(node: Any, above: str) -> Iterator[tuple[str, str]]:
    # One level at a time, because JAX gives paths for leaves only.
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    for path, child in children:
        if child is node or jax.tree_util.all_leaves([child]):
            continue
        keys = (jax.tree_util.keystr((key,), simple=True).replace("/", "_") for key in path)
        name = above + "/".join(keys)
        if not isinstance(child, dict | list | tuple):
            yield name, type(child).__name__
        yield from _node_types(child, f"{name}/")
