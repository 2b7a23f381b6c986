"""jaxtrainer: the training loop for JAX, Flax NNX and Optax.

Names are imported on first use, so that `import jaxtrainer` costs no more than JAX and Flax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrainer import callbacks, data, distributed, errors, loggers, testing
    from jaxtrainer.callback import Callback
    from jaxtrainer.callbacks.prediction_writer import read_predictions
    from jaxtrainer.datamodule import DataModule
    from jaxtrainer.every import Every
    from jaxtrainer.figure import plot
    from jaxtrainer.module import TrainModule
    from jaxtrainer.optim import Optimizer
    from jaxtrainer.page import report
    from jaxtrainer.parts import build_step
    from jaxtrainer.precision import LossScale, Precision
    from jaxtrainer.pretrained import load_params
    from jaxtrainer.result import FitResult
    from jaxtrainer.run import History, Run
    from jaxtrainer.trainer import Trainer

__all__ = [
    "Callback",
    "DataModule",
    "Every",
    "FitResult",
    "History",
    "LossScale",
    "Optimizer",
    "Precision",
    "Run",
    "TrainModule",
    "Trainer",
    "build_step",
    "callbacks",
    "data",
    "distributed",
    "errors",
    "load_params",
    "loggers",
    "plot",
    "read_predictions",
    "report",
    "testing",
]

_HOMES = {
    "Callback": "callback",
    "DataModule": "datamodule",
    "Every": "every",
    "FitResult": "result",
    "History": "run",
    "LossScale": "precision",
    "Optimizer": "optim",
    "Precision": "precision",
    "Run": "run",
    "TrainModule": "module",
    "Trainer": "trainer",
    "build_step": "parts",
    "load_params": "pretrained",
    "plot": "figure",
    "read_predictions": "callbacks.prediction_writer",
    "report": "page",
}
_MODULES = ("callbacks", "data", "distributed", "errors", "loggers", "testing")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"jaxtrainer.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"jaxtrainer.{name}")
    raise AttributeError(f"module 'jaxtrainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
