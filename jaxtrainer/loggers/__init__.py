"""The built-in loggers, one file each."""

from jaxtrainer.loggers.csv_logger import CSVLogger
from jaxtrainer.loggers.json_lines import JSONLinesLogger
from jaxtrainer.loggers.logger import Logger
from jaxtrainer.loggers.mlflow import MLFlowLogger
from jaxtrainer.loggers.tensorboard import TensorBoardLogger
from jaxtrainer.loggers.wandb import WandbLogger

__all__ = [
    "CSVLogger",
    "JSONLinesLogger",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "WandbLogger",
]
