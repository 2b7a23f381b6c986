"""What an object holds, to be compared later: attributes that must not change, tracers kept.

Used on the attributes of a module while its steps are traced. Imports nothing of the package.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.core import Tracer


def contents_of(attributes: Mapping[str, Any]) -> dict[str, tuple[Any, list[Any]]]:
    """Return what the lists, dicts and sets among the attributes hold now, nested ones too."""
    found = {name: _contents(value) for name, value in attributes.items()}
    return {name: contents for name, contents in found.items() if contents is not None}


def changed_names(
    attributes: Mapping[str, Any], before: Mapping[str, tuple[Any, list[Any]]]
) -> Iterator[str]:
    """Yield the names whose contents are not those of `before`."""
    for name, (structure, leaves) in before.items():
        now = _contents(attributes.get(name))
        if now is None or now[0] != structure or not _all_same(now[1], leaves):
            yield name


def kept_tracers(attributes: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of attributes that hold a traced array, directly or one object deeper."""
    for name, value in attributes.items():
        held = _leaves(value)
        deeper = [x for leaf in held if hasattr(leaf, "__dict__") for x in vars(leaf).values()]
        if any(isinstance(x, Tracer) for x in (*held, *deeper)):
            yield name


def is_same(a: Any, b: Any) -> bool:
    """Return whether two values are one object, or of one type and equal."""
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:
        return False


def _all_same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(is_same, now, before))


def _contents(value: Any) -> tuple[Any, list[Any]] | None:
    if not isinstance(value, list | dict | set | deque):
        return None
    leaves = _leaves(value)
    try:
        return jax.tree.structure(value), leaves
    except (TypeError, ValueError):
        return len(leaves), leaves


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, set | frozenset | deque):
        return list(value)
    try:
        return jax.tree.leaves(value)
    except (TypeError, ValueError):
        # A dict whose keys have no order is no pytree.
        return list(value.values()) if isinstance(value, dict) else [value]
