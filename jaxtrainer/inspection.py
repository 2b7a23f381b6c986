"""What is in a checkpoint, for a reader: nothing of it is imported, and no array is allocated.

May import levels 0 to 3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from jaxtrainer.checkpoint import ITEMS, find_checkpoint, read_record, verify
from jaxtrainer.display.text import format_bytes
from jaxtrainer.manifest import ARRAYS, described, names_in, spec_of

_COUNTERS = ("global_step", "epoch", "samples")


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, as its record says.

    Attributes:
        path: Step directory.
        loop: Step, epoch and other counters.
        metrics: Last values, by name.
        versions: Of the libraries that wrote it.
        arrays: By `item/name` shape, dtype and digest.
        callbacks: Names of the callbacks that have a state in it.
    """

    path: Path
    loop: Mapping[str, Any]
    metrics: Mapping[str, float]
    versions: Mapping[str, str]
    arrays: Mapping[str, Mapping[str, Any]]
    callbacks: tuple[str, ...]

    def bytes_of(self, name: str) -> int:
        """Return the size of an array, in bytes."""
        spec = spec_of(self.arrays[name])
        return math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize


def inspect_checkpoint(path: str | os.PathLike[str]) -> Inspection:
    """Return what a checkpoint's record says; no array is read.

    Args:
        path: A step directory, or a run directory, whose last step is meant.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointCorruptError: If its record is damaged.
    """
    found = find_checkpoint(path)
    record = read_record(found)
    return Inspection(
        path=found,
        loop=record.get("loop", {}),
        metrics=record.get("metrics", {}),
        versions=record.get("versions", {}),
        arrays=record[ARRAYS],
        callbacks=tuple(record.get("callbacks", {})),
    )


def show_checkpoint(path: str | os.PathLike[str], *, verifies: bool = False) -> int:
    """Print a checkpoint; return 0.

    Args:
        path: As in `inspect_checkpoint`.
        verifies: Read every array, and compare it with its digest.

    Raises:
        CheckpointError: As `inspect_checkpoint`; with `verifies` also for damaged arrays.
    """
    found, console = inspect_checkpoint(path), Console()
    places = [f"{name} {found.loop[name]}" for name in _COUNTERS if name in found.loop]
    console.print(f"{found.path}: {', '.join(places)}", soft_wrap=True, highlight=False)
    for title, values in (("metrics", found.metrics), ("versions", found.versions)):
        text = ", ".join(f"{k} {_short(v)}" for k, v in values.items())
        if text:
            console.print(f"{title}: {text}", highlight=False)
    if found.callbacks:
        console.print(f"states of: {', '.join(found.callbacks)}", highlight=False)
    console.print(_table(found))
    if verifies:
        verify(found.path)
    said = "every array has its digest" if verifies else "digests not compared; pass `--verify`"
    console.print(said, highlight=False)
    return 0


def _table(found: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name, side in (("array", "left"), ("dtype and shape", "left"), ("bytes", "right")):
        table.add_column(name, justify=side, overflow="fold")  # pyright: ignore
    for item in ITEMS:
        names = [f"{item}/{name}" for name in names_in(found.arrays, item)]
        for name in names:
            size = format_bytes(found.bytes_of(name))
            table.add_row(name, described(found.arrays[name]), size)
        if names:
            total = format_bytes(sum(map(found.bytes_of, names)))
            table.add_row(f"{item} in all", f"{len(names)} arrays", total, style="bold")
            table.add_section()
    return table


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
