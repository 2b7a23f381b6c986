"""What every script shares: interleaved rounds, medians, options, subprocesses.

Imports JAX on first use only: a parent that holds the accelerator would starve its children.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One stretch of training.

    Attributes:
        epoch_s: Seconds an epoch, the first left out.
        first_s: Seconds until the first was over; in a process's first block it compiles.
        loss: Mean over the last epoch.
        steps_per_dispatch: As chosen; empty where nothing was to choose.
    """

    epoch_s: float
    first_s: float
    loss: float
    steps_per_dispatch: str = ""


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
    # Seeds differ, so the losses do a little. NaN is not below anything, and so refused.
    if not all(loss <= 1.2 * min(losses.values()) for loss in losses.values()):
        raise RuntimeError(f"the runs compute different things, their losses are {losses}")
    return [
        {
            "run": name,
            "ms/epoch": 1e3 * (epoch_s := median(b.epoch_s for b in blocks)),
            "us/step": 1e6 * epoch_s / steps,
            **{f"/ {ref}": ratio(results, name, ref) for ref in references},
            "K": "/".join(sorted({b.steps_per_dispatch for b in blocks})),
            "first epoch s": blocks[0].first_s,
            "loss": losses[name],
        }
        for name, blocks in results.items()
    ]


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
    """The most memory this process ever had, in MB; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
