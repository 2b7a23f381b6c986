"""What module and trainer were made with, as plain data without secrets.

May import `module`. Reads attributes; calls no constructor and nothing of the user's.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from jaxtrainer.module import TrainModule

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
_LONGEST = 32


def of_module(module: TrainModule) -> dict[str, Any]:
    """Return the hyper-parameters of a module.

    They are the attributes that are named as arguments of its `__init__`, and its other public
    attributes that are numbers, strings or None.
    """
    arguments = {*inspect.signature(type(module).__init__).parameters}
    own = {k: v for k, v in vars(module).items() if k[0] != "_" and k not in _NOT_THEIRS}
    kept = {k: v for k, v in own.items() if k in arguments or _is_scalar(v)}
    return plain(kept)


def plain(value: Any, name: str = "") -> Any:
    """Return JSON data: what is no plain data by its name or type, and no secrets.

    Example:
        >>> plain({"width": 3, "api_key": "abc", "act": len, "sizes": (1, 2)})
        {'width': 3, 'api_key': '(hidden)', 'act': 'len', 'sizes': [1, 2]}
    """
    if _SECRET_NAME.search(name) and isinstance(value, str | bytes) and value:
        return HIDDEN
    if isinstance(value, str):
        return HIDDEN if _SECRET_VALUE.search(value) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, os.PathLike):
        return plain(os.fspath(value), name)
    if isinstance(value, Mapping):
        return {str(k): plain(v, str(k)) for k, v in value.items()}
    is_named = hasattr(value, "_fields")  # an Optax transformation is a tuple of functions
    if isinstance(value, list | tuple | set) and len(value) <= _LONGEST and not is_named:
        return [plain(v, name) for v in value]
    return _described(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Return nested data by names with `/`, for those who know no nesting.

    Example:
        >>> flat({"module": {"width": 3, "sizes": [1, 2]}})
        {'module/width': 3, 'module/sizes': '[1, 2]'}
    """
    found: dict[str, int | float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}/"))
        else:
            is_known = isinstance(value, int | float | str)
            found[f"{prefix}{name}"] = value if is_known else str(value)
    return found


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _described(value: Any) -> str:
    if shape := getattr(value, "shape", None):
        return f"{getattr(value, 'dtype', type(value).__name__)}{[*shape]}"
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else type(value).__name__
