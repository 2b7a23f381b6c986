"""What all processes of a run must have in common, compared before anything is compiled.

Processes that differ would run different programs, and wait for each other for ever. Each process
compares its values with those of process 0, and only differences travel further. May import
levels 0 to 2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from jaxtrainer import distributed
from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError
from jaxtrainer.module import TrainModule
from jaxtrainer.options import Options
from jaxtrainer.types import PyTree

_OF_ONE_HOST = ("cache_dir", "clock")
"""Options that each process may have of its own."""

_PACKAGES = ("jax", "flax", "optax", "jaxtrainer")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN = 120


def compare(fields: Mapping[str, str], name: str) -> None:
    """Raise on every process if a process has other values than process 0.

    Args:
        fields: Values by name, in the order in which a difference is to be named.
        name: Of the comparison, the same on all processes.

    Raises:
        ConfigError: Naming the processes, and of each the first value that differs.
    """
    if distributed.count() == 1:
        return
    shown = {key: [_digest(value), _cut(value)] for key, value in fields.items()}
    first = distributed.broadcast(shown, f"configuration/{name}")
    told = distributed.gather(_difference(shown, first), f"configuration/{name}/differences")
    lines = [f"  process {i}: {text}" for i, text in enumerate(told) if text]
    if lines:
        raise ConfigError(
            "the processes of this run are not started alike:\n" + "\n".join(lines) + "\n"
            "All have to run the same program, with the same options, packages and data."
        )


def of_call(
    options: Options, module: TrainModule, callbacks: Iterable[Callback], path: object
) -> dict[str, str]:
    """Return what a call of the trainer was asked to do."""
    fields = {package: _version(package) for package in _PACKAGES}
    fields["module"] = f"{type(module).__module__}.{type(module).__qualname__}"
    # The others, `run` and `model`, are what the trainer has made, and private ones may be caches.
    public = {k: v for k, v in vars(module).items() if k[0] != "_" and not hasattr(TrainModule, k)}
    fields |= {f"{type(module).__name__}.{k}": _text(public[k]) for k in sorted(public)}
    for field in dataclasses.fields(options):
        if field.name not in _OF_ONE_HOST:
            fields[f"Trainer's {field.name}"] = _text(getattr(options, field.name))
    # What hooks there are decides where a dispatch ends.
    alike = [callback for callback in callbacks if not callback._of_first_process]
    fields["callbacks"] = ", ".join(type(callback).__name__ for callback in alike)
    fields["checkpoint"] = str(path)
    return fields


def of_step(
    batch: PyTree, capacity: int, num_batches: int | None, fingerprint: str
) -> dict[str, str]:
    """Return what was traced."""
    return {
        "batch": str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", batch)),
        "batches of an epoch": str(num_batches),
        "batches of a chunk": str(capacity),
        "traced step": fingerprint,
    }


def _difference(here: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    for key in [*first, *here]:
        mine, other = here.get(key), first.get(key)
        if mine is None or other is None:
            has, lacks = ("process 0", "this one") if mine is None else ("this one", "process 0")
            return f"{key} is there on {has}, and not on {lacks}"
        if mine[0] != other[0]:
            return f"{key} is {mine[1]}, on process 0 it is {other[1]}"
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _text(value: Any) -> str:
    # Where an object is in memory says nothing.
    return _ADDRESS.sub("", repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({_digest(text)[:8]})"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
