"""What a training step computes again in its backward pass instead of keeping it, by module.

May import level 0, `patterns` and what it wraps calls with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.patterns import covers, parents
from jaxtrainer.scopes import Around

Remat = Mapping[str, Callable[..., Any]]
"""A policy of `jax.checkpoint_policies` by pattern of module paths."""

_WITH_ARGUMENTS = ("save_", "offload_")


def parse_remat(given: Any) -> Remat:
    """Return policies by pattern, from a pattern, several, or a dict of names or policies.

    Raises:
        ConfigError: For anything else, with the close match of a misspelt policy.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        given = {given: "nothing_saveable"}
    if isinstance(given, Iterable) and not isinstance(given, Mapping):
        given = dict.fromkeys(given, "nothing_saveable")
    if not isinstance(given, Mapping) or not all(isinstance(k, str) and k for k in given):
        raise ConfigError(
            f"remat={given!r}: pass patterns of module paths, `remat='blocks/*'`, or policies by "
            "pattern, `remat={'blocks/*': 'dots_saveable'}`."
        )
    return {pattern: _policy(pattern, value) for pattern, value in given.items()}


def remat_calls(remat: Remat, modules: Collection[str]) -> Around:
    """Return what calls the outermost modules that each pattern covers, so that they keep less.

    Args:
        remat: Policies by pattern; the first that covers a module is its policy.
        modules: Paths of the modules.
    """
    policies: dict[str, Any] = {}
    for pattern, policy in remat.items():
        for path in outermost(pattern, modules):
            policies.setdefault(path, policy)
    # A method may call the one that it overrides, on the same module.
    running: list[str] = []

    def around(path: str, fn: Any, module: Any, args: Any, kwargs: Any) -> Any:
        if path not in policies or path in running or fn.__name__ != "__call__":
            return fn(module, *args, **kwargs)
        running.append(path)
        try:
            return _rematerialised(fn, policies[path], module, args, kwargs)
        finally:
            running.remove(path)

    return around


def outermost(pattern: str, modules: Collection[str]) -> list[str]:
    """Return the modules that a pattern covers, but for those inside of one another.

    Example:
        >>> outermost("blocks/*", ["blocks/0", "blocks/0/norm", "blocks/1", "head"])
        ['blocks/0', 'blocks/1']
    """
    found = {path for path in modules if path and covers(pattern, path)}
    return sorted(path for path in found if found.isdisjoint(parents(path)[:-1]))


def _rematerialised(fn: Any, policy: Any, module: Any, args: Any, kwargs: Any) -> Any:
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_graph_node)
    traced = [x for x in leaves if _is_traced(x)]

    # What is no array (a flag, a mode) stays what it is: traced, it could not be branched on.
    def run(module: Any, *traced: Any) -> Any:
        left = iter(traced)
        whole = [next(left) if _is_traced(x) else x for x in leaves]
        args, kwargs = jax.tree.unflatten(treedef, whole)
        return fn(module, *args, **kwargs)

    return nnx.remat(run, policy=policy)(module, *traced)


def _is_graph_node(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _is_traced(leaf: Any) -> bool:
    return (hasattr(leaf, "dtype") and hasattr(leaf, "shape")) or _is_graph_node(leaf)


def _policy(pattern: str, value: Any) -> Callable[..., Any]:
    if value is None:
        return jax.checkpoint_policies.nothing_saveable
    if callable(value):
        return value
    names = [n for n in dir(jax.checkpoint_policies) if not n.startswith("_")]
    plain = [n for n in names if not n.startswith(_WITH_ARGUMENTS)]
    if value in plain:
        return getattr(jax.checkpoint_policies, value)
    what = f"remat={{{pattern!r}: {value!r}}}"
    if value in names:
        raise ConfigError(
            f"{what}: this policy takes arguments; pass the policy itself, e.g. "
            "`jax.checkpoint_policies.save_only_these_names('attention')`."
        )
    raise ConfigError(
        f"{what} is not known; use one of {', '.join(plain)}, or a policy of "
        f"`jax.checkpoint_policies`.{did_you_mean(str(value), plain)}"
    )
