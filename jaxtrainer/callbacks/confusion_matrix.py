"""`ConfusionMatrix`: which class is taken for which, counted inside the compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtrainer.callbacks.classification import ClassificationMetric
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.loaders import of_all_loaders
from jaxtrainer.metrics import series_name
from jaxtrainer.run import Run
from jaxtrainer.types import Array, LogFn, PyTree, Stage


class ConfusionMatrix(ClassificationMetric):
    """Count how often each class is taken for each, and log macro precision, recall and F1.

    Exact over ragged batches and devices: the counts are summed on the device, and read when the
    epoch ends. They are `num_classes**2` numbers of the training state.

    Series, of each stage: `val/precision`, `val/recall` and `val/f1`, the means over the classes
    that occur, as a label or as a prediction; a class that is never predicted has precision 0, one
    that is no label recall 0.

    Args:
        num_classes: Number of logits.
        logits: Key of the logits in the dict that the step returns: `[batch, classes]`, float. The
            largest one is the prediction.
        labels: Key of the labels in the batch, or a function of the batch: `[batch]`, integer.
        name: Put in front of the names, of several such callbacks: `"species"` logs
            `val/species_f1`.
        prog_bar: Show the F1 in the progress bar.

    Attributes:
        matrix: After each epoch the counts `[true, predicted]` of each stage, int64, by the
            beginning of its series: `matrix["val"]`, of a named loader `matrix["val/clean"]`.

    Raises:
        ConfigError: Before compilation, if the step returns no such logits.
        DataError: If labels are not integers, or out of range.

    Example:
        >>> confusion = ConfusionMatrix(10)
    """

    @checks_options
    def __init__(
        self,
        num_classes: int,
        *,
        logits: str = "logits",
        labels: str | Callable[[PyTree], Any] = "label",
        name: str = "",
        prog_bar: bool = False,
    ) -> None:
        super().__init__(logits=logits, labels=labels, name=name)
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
            raise ConfigError(f"num_classes must be an integer of at least 2, got {num_classes!r}.")
        if not isinstance(name, str) or "/" in name or name.startswith("_"):
            raise ConfigError(f"name={name!r}: use a word for the names of its series.")
        self.num_classes = num_classes
        self.prog_bar = prog_bar
        self.matrix: dict[str, np.ndarray] = {}

    @property
    def _counts_name(self) -> str:
        return f"_{self.name}_confusion"

    def setup(self, run: Run) -> None:
        """Forget the counts of an earlier call."""
        self.matrix = {}

    def log_metric(self, logits: Array, labels: Array, in_range: Array, log: LogFn) -> None:
        """Log the counts of the batch (traced)."""
        counts = jnp.zeros((self.num_classes, self.num_classes), jnp.float32)
        # A negative index would count from the end; one beyond it is dropped.
        rows = jnp.where(in_range, labels, self.num_classes)
        counts = counts.at[rows, jnp.argmax(logits, axis=-1)].add(1.0, mode="drop")
        log(self._counts_name, counts, reduce="sum")

    def check_shapes(self, logits: Any) -> None:
        """Raise ConfigError if there are more or fewer logits than classes."""
        if logits.shape[1] != self.num_classes:
            raise ConfigError(
                f"ConfusionMatrix({self.num_classes}) got logits of {logits.shape[1]} classes; "
                f"write `ConfusionMatrix({logits.shape[1]})`."
            )

    def end_epoch(self, run: Run, stage: Stage) -> None:
        """Take the counts of the stage, and log what follows from them."""
        prefix = f"{self.name}_" if self.name else ""
        for series, counts in of_all_loaders(
            run.arrays, series_name(stage, self._counts_name)
        ).items():
            key = series.rpartition("/")[0]
            self.matrix[key] = np.rint(counts).astype(np.int64)
            for name, value in macro_scores(self.matrix[key]).items():
                run.log(f"{key}/{prefix}{name}", value, prog_bar=self.prog_bar and name == "f1")


def class_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Return precision, recall and F1 of each class; 0 where there is nothing to divide by.

    Args:
        matrix: Counts `[true, predicted]`.

    Example:
        >>> class_scores(np.array([[3, 1], [0, 4]]))["recall"].tolist()
        [0.75, 1.0]
    """
    right, true, predicted = np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    ratios = {
        "precision": (right, predicted),
        "recall": (right, true),
        "f1": (2 * right, true + predicted),
    }
    return {name: part / np.maximum(whole, 1) for name, (part, whole) in ratios.items()}


def macro_scores(matrix: np.ndarray) -> dict[str, float]:
    """Return the means of precision, recall and F1 over the classes that occur.

    Args:
        matrix: Counts `[true, predicted]`, of at least one sample.

    References:
        Sokolova, Lapalme, "A systematic analysis of performance measures for classification
        tasks", 2009, table 3: macro-averaging.

    Example:
        >>> macro_scores(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))["recall"]
        0.875
    """
    occurs = matrix.sum(axis=0) + matrix.sum(axis=1) > 0
    return {name: float(values[occurs].mean()) for name, values in class_scores(matrix).items()}
