"""`Accuracy`: top-k accuracy, computed inside the compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxtrainer.callbacks.classification import ClassificationMetric
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.types import Array, LogFn, PyTree


class Accuracy(ClassificationMetric):
    """Log the share of samples whose label is among the `top_k` largest logits.

    Exact over ragged batches and devices; nothing is read from the device until the epoch ends.

    Args:
        top_k: Labels among this many largest logits count as right.
        logits: Key of the logits in the dict that the step returns: `[batch, classes]`, float.
        labels: Key of the labels in the batch, or a function of the batch: `[batch]`, integer.
        name: Name it is logged under, e.g. `train/accuracy`.
        prog_bar: Show it in the progress bar.

    Raises:
        ConfigError: Before compilation, if the step returns no such logits.
        DataError: If labels are not integers, or out of range.

    Example:
        >>> callbacks = [Accuracy(), Accuracy(top_k=5, name="top5")]
    """

    may_log = False

    @checks_options
    def __init__(
        self,
        *,
        top_k: int = 1,
        logits: str = "logits",
        labels: str | Callable[[PyTree], Any] = "label",
        name: str = "accuracy",
        prog_bar: bool = True,
    ) -> None:
        super().__init__(logits=logits, labels=labels, name=name)
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ConfigError(f"top_k must be a positive integer, got {top_k!r}.")
        self.top_k = top_k
        self.prog_bar = prog_bar

    def log_metric(self, logits: Array, labels: Array, in_range: Array, log: LogFn) -> None:
        """Log the share of labels whose rank is small enough (traced)."""
        at_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        # The rank counts larger logits, and equal ones at a smaller index, as argmax would.
        earlier = jnp.arange(logits.shape[-1])[None] < labels[:, None]
        rank = jnp.sum((logits > at_label) | ((logits == at_label) & earlier), axis=-1)
        right = (rank < self.top_k) & in_range
        log(self.name, jnp.mean(right.astype(jnp.float32)), prog_bar=self.prog_bar)

    def check_shapes(self, logits: Any) -> None:
        """Raise ConfigError if every label would be among the largest logits."""
        if self.top_k >= logits.shape[1]:
            raise ConfigError(
                f"Accuracy(top_k={self.top_k}) is always right with {logits.shape[1]} classes; "
                "use a smaller `top_k`."
            )
