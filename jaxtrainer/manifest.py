"""What a checkpoint says of its own content: a digest of every array, and one of the record.

Both are against damage, not against forgery: who can write the arrays can write the digests.
May import levels 0 and 1, and `state`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrainer.errors import CheckpointCorruptError, CheckpointError

ARRAYS, DIGEST = "arrays", "digest"
"""Entries of a record: of each array its shape, dtype and digest; the digest of all the rest."""

MAX_RECORD_BYTES = 1 << 30
_DTYPE = re.compile(r"bool|bfloat16|u?int\d+|(float|complex)\d+\w*")
THREADS = min(8, os.cpu_count() or 1)
"""For digests that somebody waits for: hashing holds no lock of Python's."""


def manifest_of(items: Mapping[str, Any], threads: int = 1) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and digest of every array of some items, by `item/name`.

    Args:
        items: By item the arrays by name, allocated.
        threads: More than one is worth it where somebody waits.
    """
    flat = [(f"{item}/{k}", x) for item, arrays in items.items() for k, x in arrays.items()]
    # In the order of the names, because gathering from other processes is a collective.
    values = ((name, on_host(x)) for name, x in flat)
    if threads == 1:
        return {name: _entry(value) for name, value in values}
    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(lambda pair: (pair[0], _entry(pair[1])), values))


def damaged(items: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the arrays that are not what the manifest says."""
    found = manifest_of(items, THREADS)
    return [name for name, entry in found.items() if manifest.get(name) != entry]


def on_host(array: Any) -> np.ndarray:
    """Return the whole of an array; all processes call it where each has a part only."""
    if is_here(array):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def is_here(array: Any) -> bool:
    """Return whether this process has the whole of an array."""
    is_jax = isinstance(array, jax.Array)
    return not is_jax or array.is_fully_addressable or array.is_fully_replicated


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with its digest."""
    return {**record, DIGEST: _digest(_canonical(record))}


def unseal(path: Path) -> Any:
    """Return the JSON data of a record's file; its digest is not looked at.

    Raises:
        CheckpointCorruptError: If it is missing, or no JSON.
    """
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        record = json.loads(path.read_bytes().decode(), parse_constant=_refuse)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"reading {path} failed: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointCorruptError(f"{path} holds no record, but a {type(record).__name__}")
    return record


def check_seal(record: dict[str, Any]) -> None:
    """Raise CheckpointCorruptError if the record is not the one that was written."""
    content = {name: value for name, value in record.items() if name != DIGEST}
    if record.get(DIGEST) != _digest(_canonical(content)):
        raise CheckpointCorruptError("its digest is not that of its content")


def spec_of(entry: Mapping[str, Any]) -> np.ndarray:
    """Return a stand-in of the shape and dtype of a manifest's entry; it takes no memory."""
    if not _DTYPE.fullmatch(entry["dtype"]):
        raise CheckpointCorruptError(f"there are no arrays of dtype {entry['dtype']!r}")
    return np.broadcast_to(np.zeros((), jax.numpy.dtype(entry["dtype"])), tuple(entry["shape"]))


def described(entry: Mapping[str, Any]) -> str:
    """Return e.g. `float32[4, 3]`.

    Example:
        >>> described({"dtype": "float32", "shape": [4, 3]})
        'float32[4, 3]'
    """
    return f"{entry['dtype']}[{', '.join(map(str, entry['shape']))}]"


def names_in(manifest: Iterable[str], item: str) -> list[str]:
    """Return the names of an item's arrays, without the item.

    Example:
        >>> names_in(["params/kernel", "opt_state/mu/kernel"], "params")
        ['kernel']
    """
    prefix = f"{item}/"
    return [name.removeprefix(prefix) for name in manifest if name.startswith(prefix)]


def _entry(value: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return {"dtype": str(value.dtype), "shape": list(value.shape), "blake2b": _digest(data)}


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
