"""The public names: adding or losing one is a decision, not an accident."""

import subprocess
import sys

import jaxtrainer
from jaxtrainer import callbacks, errors, loggers

PUBLIC = [
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
CALLBACKS = [
    "EMA",
    "Accuracy",
    "BackboneFinetuning",
    "BatchSizeFinder",
    "Checkpoint",
    "ConfusionMatrix",
    "DeviceStats",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "GradientMonitor",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelSummary",
    "NonFinite",
    "OnExceptionCheckpoint",
    "PredictionWriter",
    "Profiler",
    "ProgressBar",
    "Report",
    "StochasticWeightAveraging",
    "TerminateOnNaN",
    "Throughput",
    "Timer",
]
LOGGERS = [
    "CSVLogger",
    "JSONLinesLogger",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "WandbLogger",
]
HEAVY = ("orbax", "grain", "tensorboard", "tensorboardX", "wandb", "mlflow", "matplotlib", "fsspec")


def test_package_exports_the_public_names():
    assert jaxtrainer.__all__ == PUBLIC
    assert all(getattr(jaxtrainer, name) is not None for name in PUBLIC)


def test_callbacks_exports_the_built_in_ones():
    assert callbacks.__all__ == CALLBACKS


def test_loggers_exports_the_built_in_ones():
    assert loggers.__all__ == LOGGERS


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(jaxtrainer, "Trainr")


def test_error_classes_are_builtin_errors_too():
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    own = {c for c in classes if issubclass(c, errors.JaxTrainerError)} - {errors.JaxTrainerError}
    general = {Exception, BaseException, object}
    bare = [
        c
        for c in own
        if not [b for b in c.__mro__ if b.__module__ == "builtins" and b not in general]
    ]
    assert len(own) > 10
    assert bare == []


def test_import_of_trainer_and_callbacks_is_light():
    code = "import sys; from jaxtrainer import Trainer, TrainModule, callbacks, data;"
    code += f"print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
