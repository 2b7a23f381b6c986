"""The built-in callbacks, one file each."""

from jaxtrainer.callbacks.accuracy import Accuracy
from jaxtrainer.callbacks.checkpoint import Checkpoint
from jaxtrainer.callbacks.device_stats import DeviceStats
from jaxtrainer.callbacks.early_stopping import EarlyStopping
from jaxtrainer.callbacks.lambda_callback import LambdaCallback
from jaxtrainer.callbacks.learning_rate_monitor import LearningRateMonitor
from jaxtrainer.callbacks.model_summary import ModelSummary
from jaxtrainer.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from jaxtrainer.callbacks.progress_bar import ProgressBar
from jaxtrainer.callbacks.terminate_on_nan import TerminateOnNaN
from jaxtrainer.callbacks.throughput import Throughput
from jaxtrainer.callbacks.timer import Timer

__all__ = [
    "Accuracy",
    "Checkpoint",
    "DeviceStats",
    "EarlyStopping",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "TerminateOnNaN",
    "Throughput",
    "Timer",
]
