"""What every script shares: interleaved rounds, medians, tables, subprocesses.

Imports JAX on first use only: a parent that holds the accelerator would starve its children.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One stretch of training: seconds an epoch, seconds until the first epoch was over."""

    epoch_s: float
    first_s: float
    loss: float


Blocks = Mapping[str, Sequence[Block]]


def interleave(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Run A B C A B C ..., so that whatever else the machine does falls on all alike."""
    results: dict[str, list[Any]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            gc.collect()
            results[name].append(run())
    return results


def ratio(results: Blocks, name: str, reference: str) -> float:
    """The median over the rounds of one epoch time over another of the same round."""
    pairs = zip(results[name], results[reference], strict=True)
    return median(a.epoch_s / b.epoch_s for a, b in pairs)


def added_us(results: Blocks, name: str, reference: str, steps: int) -> float:
    """The median over the rounds of the microseconds that a step of one takes longer."""
    pairs = zip(results[name], results[reference], strict=True)
    return median((a.epoch_s - b.epoch_s) / steps * 1e6 for a, b in pairs)


def rows_of(results: Blocks, steps: int, references: Sequence[str]) -> list[dict[str, Any]]:
    """One row of a table for each run, after a check that all of them learn the same.

    Raises:
        RuntimeError: If the last losses differ by more than a fifth: then other maths was timed.
    """
    losses = {name: median(b.loss for b in blocks) for name, blocks in results.items()}
    low, high = min(losses.values()), max(losses.values())
    # Seeds differ, so the losses do a little; `not` catches NaN as well.
    if not high <= 1.2 * low:
        raise RuntimeError(f"the runs compute different things, their losses are {losses}")
    return [
        {
            "run": name,
            "ms/epoch": 1e3 * (epoch_s := median(b.epoch_s for b in blocks)),
            "us/step": 1e6 * epoch_s / steps,
            **{f"/ {ref}": ratio(results, name, ref) for ref in references},
            "first epoch s": blocks[0].first_s,
            "loss": losses[name],
        }
        for name, blocks in results.items()
    ]


@dataclass(kw_only=True)
class Report:
    """Prints tables as they come, or one JSON object at the end."""

    name: str
    as_json: bool = False
    tables: list[dict[str, Any]] = field(default_factory=list)

    def add(self, title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
        self.tables.append({"title": title, "rows": list(rows), "note": note})
        if self.as_json or not rows:
            return
        table = Table(title=title, caption=note or None, title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        Console(width=120).print(table)

    def finish(self) -> None:
        facts = machine()
        if self.as_json:
            print(json.dumps({"script": self.name, "machine": facts, "tables": self.tables}))
        else:
            Console(width=120).print("  ".join(f"{k} {v}" for k, v in facts.items()), style="dim")


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> dict[str, str]:
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = {name: metadata.version(name) for name in names}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = {"devices": devices, "cores": str(cores), "system": platform.platform(terse=True)}
    return {"python": platform.python_version(), **versions, **where}


def parser(doc: str | None) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    options.add_argument("--short", action="store_true", help="fewer settings, as in `make bench`")
    options.add_argument("--json", action="store_true", help="print one JSON object, no tables")
    options.add_argument("--rounds", type=int, help="how often A B C A B C ... is repeated")
    options.add_argument("--epochs", type=int, help="timed epochs of a block")
    options.add_argument("--child", help=argparse.SUPPRESS)
    return options


def parse(
    options: argparse.ArgumentParser, argv: Sequence[str] | None, *, rounds: int, short: int = 3
) -> argparse.Namespace:
    """Parse, with that many rounds by default, in full and in short form."""
    args = options.parse_args(argv)
    args.rounds = args.rounds or (short if args.short else rounds)
    args.epochs = args.epochs or (2 if args.short else 4)
    return args


def child(script: str, task: str, **environment: str) -> dict[str, Any]:
    """Run a script anew with `--child task`; its last line of output is its JSON answer."""
    return json.loads(python([script, "--child", task], **environment).splitlines()[-1])


def python(arguments: Sequence[str], **environment: str) -> str:
    """Return what a fresh interpreter prints, which finds the package as this one does."""
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, check=True, text=True
    ).stdout


def peak_rss_mb() -> float:
    """The most memory this process ever had, in MB (the kernel counts in KiB, on macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
