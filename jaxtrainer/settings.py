"""The configuration of a run as data: options, hyper-parameters and callbacks, without secrets.

For a reader, a logger, a report or a file. Reads attributes; calls no constructor. Imports nothing
of the package.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

HIDDEN = "(hidden)"
_SECRET_NAME = re.compile(
    r"token(?!s|iz)|secret|passw(or)?d|passphrase|api_?key|access_?key|private_?key|credential"
    r"|^auth$|bearer",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"(hf|sk|pk|rk|ghp|gho|ghs|glpat|xox[abp]|pypi)[-_][A-Za-z0-9_-]{16,}"
    r"|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\w+://[^/\s:@]*:[^/\s@]+@"
)
_NOT_THEIRS = ("model", "run", "automatic_optimization")
_MOST, _DEEPEST = 50, 6
"""Items of a list or a dict, and levels of them, that are kept."""


def settings_of(options: Any, module: object, callbacks: Iterable[object]) -> dict[str, Any]:
    """Return `{"trainer": ..., "module": ..., "callbacks": ...}`, strict JSON.

    Args:
        options: The trainer's, a dataclass.
        module: The user's.
        callbacks: Of each the attributes that its constructor has parameters for.
    """
    return {
        "trainer": {k: v for k, v in plain(options).items() if k != "clock"},
        "module": {"class": type(module).__qualname__, **of_module(module)},
        "callbacks": _by_class(callbacks),
    }


def of_module(module: object) -> dict[str, Any]:
    """Return the hyper-parameters of a module.

    They are the attributes that are named as arguments of its `__init__`, and its other public
    attributes that are numbers, strings or None.
    """
    arguments = _parameters(type(module))
    own = {k: v for k, v in vars(module).items() if k not in _NOT_THEIRS}
    return plain({k: v for k, v in own.items() if k in arguments or _is_scalar(v)})


def plain(value: Any, name: str = "", depth: int = _DEEPEST) -> Any:
    """Return JSON data for any value; what is none by its name, shape or type, and no secrets.

    Example:
        >>> plain({"width": 3, "api_key": "abc", "act": len, "sizes": (1, 2)})
        {'width': 3, 'api_key': '(hidden)', 'act': 'len', 'sizes': [1, 2]}
    """
    if is_secret(name, value):
        return HIDDEN
    if _is_scalar(value):
        is_number = not isinstance(value, float) or math.isfinite(value)
        return value if is_number else repr(value)
    if isinstance(value, os.PathLike):
        return plain(os.fspath(value), name)
    if isinstance(value, timedelta):
        return str(value)
    if depth == 0:
        return type(value).__qualname__
    try:
        return _plain_object(value, name, depth - 1)
    except Exception:  # of a user's class; no run ends for a line of its report
        return type(value).__qualname__


def hide(value: Any, name: str = "") -> Any:
    """Return JSON data whole, but for its secrets."""
    if isinstance(value, Mapping):
        return {k: hide(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [hide(v, name) for v in value]
    return HIDDEN if is_secret(name, value) else value


def is_secret(name: str, value: Any) -> bool:
    """Return whether a text is a secret, by its name or by what it looks like."""
    if not isinstance(value, str | bytes) or not value:
        return False
    looks_like_one = isinstance(value, str) and _SECRET_VALUE.search(value)
    return bool(_SECRET_NAME.search(name) or looks_like_one)


def flat(settings: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dict.

    Example:
        >>> flat({"trainer": {"seed": 0, "limits": {}}, "note": "x"}, "/")
        {'trainer/seed': 0, 'trainer/limits': '', 'note': 'x'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, separator, f"{prefix}{name}{separator}"))
        else:
            found[f"{prefix}{name}"] = "" if isinstance(value, Mapping) else value
    return found


def _plain_object(value: Any, name: str, depth: int) -> Any:
    if isinstance(value, Mapping):
        return _items(value, depth)
    is_named = hasattr(value, "_fields")  # an Optax transformation is a tuple of functions
    if isinstance(value, list | tuple | set | frozenset) and not is_named:
        return [plain(item, name, depth) for item in list(value)[:_MOST]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return _items({field.name: getattr(value, field.name) for field in fields}, depth)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array(value)
    qualified = getattr(value, "__qualname__", None)
    return qualified if isinstance(qualified, str) else type(value).__qualname__


def _items(items: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    public = [(str(name), value) for name, value in items.items() if not str(name).startswith("_")]
    return {name: plain(value, name, depth) for name, value in public[:_MOST]}


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _array(value: Any) -> Any:
    if value.shape == () and hasattr(value, "item"):
        return plain(value.item())
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


def _arguments(callback: object) -> dict[str, Any]:
    names = _parameters(type(callback))
    known = {name: getattr(callback, name) for name in names if hasattr(callback, name)}
    return plain({k: v for k, v in known.items() if k != "console"})


def _parameters(cls: type) -> list[str]:
    # The signature of a builtin is a text, which `inspect` would compile.
    is_builtin = cls.__init__ is object.__init__
    return [] if is_builtin else [*inspect.signature(cls.__init__).parameters]


def _by_class(callbacks: Iterable[object]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for callback in callbacks:
        name = type(callback).__qualname__
        count = sum(key.partition(" ")[0] == name for key in found)
        found[f"{name} {count + 1}" if count else name] = _arguments(callback)
    return found
