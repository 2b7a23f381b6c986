"""The built-in callbacks, one file each."""

from jaxtrainer.callbacks.accuracy import Accuracy
from jaxtrainer.callbacks.backbone_finetuning import BackboneFinetuning
from jaxtrainer.callbacks.batch_size_finder import BatchSizeFinder
from jaxtrainer.callbacks.checkpoint import Checkpoint
from jaxtrainer.callbacks.confusion_matrix import ConfusionMatrix
from jaxtrainer.callbacks.device_stats import DeviceStats
from jaxtrainer.callbacks.early_stopping import EarlyStopping
from jaxtrainer.callbacks.ema import EMA
from jaxtrainer.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from jaxtrainer.callbacks.gradient_monitor import GradientMonitor
from jaxtrainer.callbacks.lambda_callback import LambdaCallback
from jaxtrainer.callbacks.learning_rate_finder import LearningRateFinder
from jaxtrainer.callbacks.learning_rate_monitor import LearningRateMonitor
from jaxtrainer.callbacks.model_summary import ModelSummary
from jaxtrainer.callbacks.non_finite import NonFinite
from jaxtrainer.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from jaxtrainer.callbacks.prediction_writer import PredictionWriter
from jaxtrainer.callbacks.profiler import Profiler
from jaxtrainer.callbacks.progress_bar import ProgressBar
from jaxtrainer.callbacks.report import Report
from jaxtrainer.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from jaxtrainer.callbacks.terminate_on_nan import TerminateOnNaN
from jaxtrainer.callbacks.throughput import Throughput
from jaxtrainer.callbacks.timer import Timer

__all__ = [
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
