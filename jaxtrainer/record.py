"""The JSON record of a checkpoint: strict data in, the same data out.

Imports `errors` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from jaxtrainer.errors import CheckpointError

FORMAT_VERSION = 1
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def base_record() -> dict[str, Any]:
    """Return the start of a record: format and library versions."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return {"format_version": FORMAT_VERSION, "versions": versions}


def check_record(record: Any, where: str) -> dict[str, Any]:
    """Return the record, or raise CheckpointError if its format is unknown."""
    version = record.get("format_version") if isinstance(record, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has checkpoint format {version!r}; this version of jaxtrainer reads up to "
            f"{FORMAT_VERSION}. Upgrade it to go on from there."
        )
    return record


def encode(value: Any) -> Any:
    """Return JSON data; numbers that JSON lacks become `{"float": "nan"}`.

    Raises:
        CheckpointError: For a value that is no JSON data, naming it.

    Example:
        >>> encode({"best": float("inf"), "steps": (1, 2)})
        {'best': {'float': 'inf'}, 'steps': [1, 2]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise CheckpointError(
        f"a checkpoint record holds JSON data; got {type(value).__name__}: {value!r}. "
        "Return numbers, strings, lists and dicts from `state_dict`."
    )


def decode(value: Any) -> Any:
    """Undo `encode`."""
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        if set(value) == {"bytes"}:
            return bytes.fromhex(value["bytes"])
        return {k: decode(v) for k, v in value.items()}
    return [decode(v) for v in value] if isinstance(value, list) else value
