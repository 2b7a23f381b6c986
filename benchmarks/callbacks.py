"""What the callbacks add to an epoch of the MNIST MLP: all together, each alone, and none.

none          no callback, no bar
all           every callback but those whose docstrings say that they cost
all, costly   those too: weight averaging, gradient monitor, saving, finite check, profiler's table
<name>        that one alone (full form only)

    PYTHONPATH=. python benchmarks/callbacks.py
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import interleave, parse, parser, ratio, rows_of
from benchmarks.report import Report
from benchmarks.trained import Terminal, trained
from benchmarks.workloads import mnist_mlp
from jaxtrainer import Callback, callbacks

Makers = Mapping[str, Callable[[], Callback]]


def free(console: Console, folder: str) -> Makers:
    """The callbacks that are meant to cost next to nothing, as users make them."""
    return {
        "Accuracy": callbacks.Accuracy,
        "DeviceStats": callbacks.DeviceStats,
        "EarlyStopping": lambda: callbacks.EarlyStopping("train/loss", patience=100),
        "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({0: 1}),
        "LambdaCallback": lambda: callbacks.LambdaCallback(on_train_epoch_end=lambda run: None),
        "LearningRateMonitor": lambda: callbacks.LearningRateMonitor(schedule=lambda step: 1e-3),
        "ModelSummary": lambda: callbacks.ModelSummary(console=console),
        "OnExceptionCheckpoint": lambda: callbacks.OnExceptionCheckpoint(f"{folder}/crash"),
        "PredictionWriter": lambda: callbacks.PredictionWriter(f"{folder}/predictions"),
        "ProgressBar": lambda: callbacks.ProgressBar(console=console),
        "TerminateOnNaN": callbacks.TerminateOnNaN,
        "Throughput": callbacks.Throughput,
        "Timer": lambda: callbacks.Timer(console=console),
    }


def costly(console: Console, folder: str) -> Makers:
    """The callbacks that say that they cost."""
    return {
        "Checkpoint": lambda: callbacks.Checkpoint(f"{folder}/run"),
        "ConfusionMatrix": lambda: callbacks.ConfusionMatrix(10),
        "EMA": callbacks.EMA,
        "GradientMonitor": callbacks.GradientMonitor,
        "NonFinite": callbacks.NonFinite,
        "Profiler": lambda: callbacks.Profiler(console=console),
    }


def epochs_with(names: Sequence[str], epochs: int) -> Any:
    screen = Console(file=Terminal(), force_terminal=True, force_interactive=True, width=100)
    with tempfile.TemporaryDirectory() as folder:
        makers = {**free(screen, folder), **costly(screen, folder)}
        given = [makers[name]() for name in names]
        options = {"enable_progress_bar": False, "steps_per_dispatch": 32}
        return trained(mnist_mlp(256), epochs, only=given, **options)


def main(argv: Sequence[str] | None = None) -> Report:
    args = parse(parser(__doc__), argv, rounds=7)
    report = Report(name="callbacks", as_json=args.json)
    console, folder = Console(file=Terminal()), str(Path("unused"))
    few, many = [*free(console, folder)], [*costly(console, folder)]
    sets = {"none": [], "all": few, "all, costly": [*few, *many]}
    if not args.short:
        sets |= {name: [name] for name in (*few, *many)}
    runs = {
        name: functools.partial(epochs_with, names, args.epochs) for name, names in sets.items()
    }
    results = interleave(runs, args.rounds)
    rows = rows_of(results, mnist_mlp(256).num_batches, ())
    table = [row | {"/ none": ratio(results, row["run"], "none")} for row in rows]
    report.add("MNIST MLP, batch 256", table)
    report.finish()
    return report


if __name__ == "__main__":
    main()
