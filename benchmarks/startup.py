"""Imports, and the time from `fit()` to the end of the first step, each in a process of its own.

fit         trainer: from the call of `fit` to the end of its first dispatch, which may hold
            several steps; by hand: an nnx model made eagerly, `nnx.split`, `tx.init`, and the
            first call of the jitted step. Both include starting the backend, neither the imports
            at the top of a file; the trainer's own late imports (Orbax) are included.
process     from the start of the interpreter to the same moment, so everything is included.

no cache    the persistent compilation cache is off
empty       it is on, and empty: what a first run has by default
warm        the run after that one

    PYTHONPATH=. python benchmarks/startup.py
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.common import child, interleave, parse, parser, python
from benchmarks.report import Report

IMPORTS = {
    "import jaxtrainer": "import jaxtrainer",
    "Trainer, TrainModule, callbacks": (
        "from jaxtrainer import Trainer, TrainModule, callbacks; "
        "callbacks.Accuracy, callbacks.Checkpoint, callbacks.Timer"
    ),
    "import jax, flax.nnx, optax": "import jax, flax.nnx, optax",
}
TASKS = ("trainer", "trainer, no ckpt", "by hand")
Starts = dict[str, list[dict[str, dict[str, float]]]]
BEGAN, CACHE = "BENCHMARK_BEGAN", "BENCHMARK_CACHE"


def time_import(statement: str) -> float:
    timed = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(python(["-c", timed]))


def start(task: str) -> dict[str, dict[str, float]]:
    """Run a task without a cache, with an empty one, and with the one that this filled."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"no cache": "", "empty": folder, "warm": folder}
        return {
            name: child(__file__, task, **{CACHE: cache, BEGAN: repr(time.time())})
            for name, cache in caches.items()
        }


def start_rows(results: Starts, key: str) -> list[dict[str, Any]]:
    rows = []
    for task, runs in results.items():
        row: dict[str, Any] = {"run": task}
        row |= {cache: median(r[cache][key] for r in runs) for cache in runs[0]}
        pairs = list(zip(runs, results["by hand"], strict=True))
        for cache in ("no cache", "warm"):
            ratios = [mine[cache][key] / hand[cache][key] for mine, hand in pairs]
            row[f"/ by hand, {cache}"] = median(ratios)
        row["warm / no cache"] = median(r["warm"][key] / r["no cache"][key] for r in runs)
        rows.append(row)
    return rows


def import_rows(results: dict[str, list[float]]) -> list[dict[str, Any]]:
    *_, reference = results.values()
    pairs = {name: zip(times, reference, strict=True) for name, times in results.items()}
    return [
        {"import": name, "s": median(times), "/ by hand": median(a / b for a, b in pairs[name])}
        for name, times in results.items()
    ]


def run_child(task: str) -> None:
    from benchmarks import startup_child

    jobs: dict[str, Callable[[str], tuple[float, float]]] = {
        "trainer": functools.partial(startup_child.fit, checkpoint=True),
        "trainer, no ckpt": functools.partial(startup_child.fit, checkpoint=False),
        "by hand": startup_child.by_hand,
    }
    seconds, end = jobs[task](os.environ[CACHE])
    print(json.dumps({"fit_s": seconds, "process_s": end - float(os.environ[BEGAN])}))


def main(argv: Sequence[str] | None = None) -> Report | None:
    args = parse(parser(__doc__), argv, rounds=7, short=1)
    if args.child:
        return run_child(args.child)
    report = Report(name="startup", as_json=args.json)
    imports = {name: functools.partial(time_import, code) for name, code in IMPORTS.items()}
    interleave(imports, 1)  # writes the byte code
    report.add("imports", import_rows(interleave(imports, args.rounds)))
    starts = {task: functools.partial(start, task) for task in TASKS}
    results = interleave(starts, args.rounds)
    report.add("MNIST MLP, batch 256: s from `fit` to a step done", start_rows(results, "fit_s"))
    report.add("the same from the interpreter's start", start_rows(results, "process_s"))
    report.finish()
    return report


if __name__ == "__main__":
    main()
