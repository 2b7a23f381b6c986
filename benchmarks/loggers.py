"""What the loggers add to an epoch of the MNIST MLP: all together, each alone, and none.

none          no logger
files         CSV and JSON lines
all           those, and TensorBoard, Weights & Biases (offline) and MLflow (in a file), where the
              group `loggers` is installed; with a picture and a histogram after each epoch
<name>        that one alone (full form only)

Epoch times leave out what comes after the last step: closing takes as long as the logger needs.
Opening is in, over 20 epochs by default; the database of MLflow is there already, as it is for all
runs but the first. A short run of each logger comes before.

    PYTHONPATH=. python benchmarks/loggers.py
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interleave, parse, parser, ratio, rows_of
from benchmarks.report import Report
from benchmarks.trained import trained
from benchmarks.workloads import mnist_mlp
from jaxtrainer import Callback, Run, loggers
from jaxtrainer.errors import MissingExtraError

PICTURES = np.random.default_rng(0).random((64, 28, 28), np.float32)
Makers = Mapping[str, Callable[[], loggers.Logger]]


class Pictures(Callback):
    """Logs what a generative model would after each epoch; part of every run, also of `none`."""

    def on_train_epoch_end(self, run: Run) -> None:
        run.log_image("digits", PICTURES, columns=8)
        run.log_histogram("weights", PICTURES)


def makers(folder: str) -> Makers:
    """The loggers, as users make them."""
    return {
        "CSVLogger": lambda: loggers.CSVLogger(f"{folder}/csv"),
        "JSONLinesLogger": lambda: loggers.JSONLinesLogger(f"{folder}/json"),
        "TensorBoardLogger": lambda: loggers.TensorBoardLogger(f"{folder}/tensorboard"),
        "WandbLogger": lambda: loggers.WandbLogger(offline=True, save_dir=f"{folder}/wandb"),
        "MLFlowLogger": lambda: loggers.MLFlowLogger(
            tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=f"{folder}/artifacts"
        ),
    }


def installed() -> list[str]:
    """Names of those whose packages are there."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in makers(folder).items():
            try:
                make()
            except MissingExtraError:
                continue
            found.append(name)
    return found


def epochs_with(names: Sequence[str], epochs: int, folder: str) -> Any:
    given = [make() for name, make in makers(folder).items() if name in names]
    options = {"enable_progress_bar": False, "steps_per_dispatch": 32, "logger": given}
    return trained(mnist_mlp(256), epochs, only=[Pictures()], **options)


def main(argv: Sequence[str] | None = None) -> Report:
    options = parser(__doc__)
    options.set_defaults(epochs=20)
    args = parse(options, argv, rounds=7)
    report = Report(name="loggers", as_json=args.json)
    every = installed()
    sets = {"none": [], "files": every[:2], "all": every}
    if not args.short:
        sets |= {name: [name] for name in every}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, "wandb").mkdir()
        epochs_with(every, 1, folder)
        runs = {
            name: functools.partial(epochs_with, names, args.epochs, folder)
            for name, names in sets.items()
        }
        results = interleave(runs, args.rounds)
    rows = rows_of(results, mnist_mlp(256).num_batches, ())
    table = [row | {"/ none": ratio(results, row["run"], "none")} for row in rows]
    report.add(f"MNIST MLP, batch 256; all: {', '.join(every)}", table)
    report.finish()
    return report


if __name__ == "__main__":
    main()
