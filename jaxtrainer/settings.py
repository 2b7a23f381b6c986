"""The configuration of a run as data: options, hyper-parameters and callbacks.

For a reader, a logger or a report; nothing is made from it again. Imports nothing of the package.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

_SECRET = re.compile(r"(?i)(^|_)(api_?key|token|secret|password|passwd|credentials?)(_|$)")
_HIDDEN = "(hidden)"
_MOST = 50
"""Items of a list or a dict that are kept."""


def settings_of(options: Any, module: object, callbacks: Iterable[object]) -> dict[str, Any]:
    """Return `{"trainer": ..., "module": ..., "callbacks": ...}`, strict JSON but for NaN.

    What a name calls a secret (`api_key`, `password`, ...) is hidden.

    Args:
        options: The trainer's, a dataclass.
        module: Its public attributes are the hyper-parameters.
        callbacks: Of each the attributes that its constructor has parameters for.
    """
    return {
        "trainer": {k: v for k, v in plain(options).items() if k != "clock"},
        "module": {"class": type(module).__qualname__, **hyperparameters(module)},
        "callbacks": _by_class(callbacks),
    }


def hyperparameters(module: object) -> dict[str, Any]:
    """Return the public attributes of a module, but for what the trainer puts there."""
    return _items({k: v for k, v in vars(module).items() if k not in ("run", "model")})


def plain(value: Any, depth: int = 4) -> Any:
    """Return JSON data for any value; arrays by dtype and shape, other objects by their name.

    Example:
        >>> plain({"sizes": (1, 2), "path": __import__("pathlib").Path("runs"), "make": dict})
        {'sizes': [1, 2], 'path': 'runs', 'make': 'dict'}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike | timedelta):
        return str(value)
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return _items(value, depth)
    if isinstance(value, list | set | frozenset) or type(value) is tuple:
        return [plain(item, depth - 1) for item in list(value)[:_MOST]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return _items({field.name: getattr(value, field.name) for field in fields}, depth)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dict with dotted names.

    Example:
        >>> flat({"trainer": {"seed": 0, "limits": {}}, "note": "x"})
        {'trainer.seed': 0, 'trainer.limits': '', 'note': 'x'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = "" if isinstance(value, Mapping) else value
    return found


def _items(items: Mapping[Any, Any], depth: int = 4) -> dict[str, Any]:
    public = [(str(name), value) for name, value in items.items() if not str(name).startswith("_")]
    return {
        name: _HIDDEN if _SECRET.search(name) and value is not None else _safe(value, depth - 1)
        for name, value in public[:_MOST]
    }


def _safe(value: Any, depth: int) -> Any:
    try:
        return plain(value, depth)
    except Exception:  # of a user's class; no run ends for a line of its report
        return type(value).__qualname__


def _array(value: Any) -> Any:
    if value.shape == ():
        return plain(value.item()) if hasattr(value, "item") else str(value)
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


def _arguments(callback: object) -> dict[str, Any]:
    names = inspect.signature(type(callback).__init__).parameters
    known = {name: getattr(callback, name) for name in names if hasattr(callback, name)}
    return _items({k: v for k, v in known.items() if k != "console"})


def _by_class(callbacks: Iterable[object]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for callback in callbacks:
        name = type(callback).__qualname__
        count = sum(key.partition(" ")[0] == name for key in found)
        found[f"{name} {count + 1}" if count else name] = _arguments(callback)
    return found
