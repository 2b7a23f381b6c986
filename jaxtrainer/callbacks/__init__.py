"""The built-in callbacks, one file each."""

from jaxtrainer.callbacks.accuracy import Accuracy
from jaxtrainer.callbacks.checkpoint import Checkpoint
from jaxtrainer.callbacks.progress_bar import ProgressBar
from jaxtrainer.callbacks.timer import Timer

__all__ = ["Accuracy", "Checkpoint", "ProgressBar", "Timer"]
