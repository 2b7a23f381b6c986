"""`Accuracy`: top-k accuracy, computed inside the compiled step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, DataError, checks_options, did_you_mean
from jaxtrainer.metrics import series_name
from jaxtrainer.run import Run
from jaxtrainer.types import LogFn, PyTree, Stage


class Accuracy(Callback):
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
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ConfigError(f"top_k must be a positive integer, got {top_k!r}.")
        self.top_k = top_k
        self.logits = logits
        self.labels = labels
        self.name = name
        self.prog_bar = prog_bar
        self._classes = 0

    @property
    def _bad_name(self) -> str:
        return f"_{self.name}_labels_out_of_range"

    def traced_step(
        self, stage: Stage, outputs: Mapping[str, Any], batch: PyTree, log: LogFn
    ) -> None:
        """Compare logits and labels (traced)."""
        logits, labels = self._logits(stage, outputs), self._labels(batch)
        self._check(logits, labels)
        classes = logits.shape[-1]
        # In uint8, as labels often travel, a number of classes above 255 would not fit.
        labels = labels.astype(jnp.int32)
        at_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        # The rank counts larger logits, and equal ones at a smaller index, as argmax would.
        earlier = jnp.arange(classes)[None] < labels[:, None]
        rank = jnp.sum((logits > at_label) | ((logits == at_label) & earlier), axis=-1)
        in_range = (labels >= 0) & (labels < classes)
        right = (rank < self.top_k) & in_range
        log(self.name, jnp.mean(right.astype(jnp.float32)), prog_bar=self.prog_bar)
        bad = jnp.sum(~in_range).astype(jnp.float32)
        log(self._bad_name, bad, reduce="sum", on_step=False)

    def check_batch(self, stage: Stage, batch: PyTree, outputs: Mapping[str, Any]) -> None:
        """Look for labels out of range in the first batch."""
        logits = self._logits(stage, outputs)
        labels = np.asarray(self._labels(batch))
        self._check(logits, labels)
        self._classes = logits.shape[-1]
        if labels.size and (labels.min() < 0 or labels.max() >= logits.shape[-1]):
            raise DataError(
                f"Accuracy: the labels of the first {stage} batch run from {labels.min()} to "
                f"{labels.max()}, but there are {logits.shape[-1]} logits; expected 0 to "
                f"{logits.shape[-1] - 1}."
            )

    def on_train_epoch_end(self, run: Run) -> None:
        """Raise if a label of the epoch was out of range."""
        self._refuse_bad(run, "train")

    def on_validation_epoch_end(self, run: Run) -> None:
        """Raise if a label was out of range."""
        self._refuse_bad(run, "validate")

    def on_test_epoch_end(self, run: Run) -> None:
        """Raise if a label was out of range."""
        self._refuse_bad(run, "test")

    def _refuse_bad(self, run: Run, stage: Stage) -> None:
        count = run.metrics.get(series_name(stage, self._bad_name), 0.0)
        if count:
            raise DataError(
                f"Accuracy: {count:.0f} labels of the {stage} batches in epoch {run.epoch} are out "
                f"of range; there are {self._classes} logits, expected 0 to {self._classes - 1}."
            )

    def _logits(self, stage: Stage, outputs: Mapping[str, Any]) -> Any:
        if self.logits in outputs:
            return outputs[self.logits]
        step = {"train": "training", "validate": "validation"}.get(stage, stage)
        found = ", ".join(map(repr, outputs)) or "nothing"
        raise ConfigError(
            f"Accuracy needs the logits that {step}_step returns under {self.logits!r}, but it "
            f"returned {found}; return `{{'loss': loss, {self.logits!r}: logits}}`."
            f"{did_you_mean(self.logits, [str(key) for key in outputs if key != 'loss'])}"
        )

    def _labels(self, batch: PyTree) -> Any:
        if callable(self.labels):
            return self.labels(batch)
        if isinstance(batch, Mapping) and self.labels in batch:
            return batch[self.labels]
        found = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(
            f"Accuracy found no labels under {self.labels!r} in the batch ({found}); pass "
            "`Accuracy(labels='...')`, or a function: `Accuracy(labels=lambda batch: batch[1])`."
            f"{did_you_mean(self.labels, map(str, batch)) if isinstance(batch, Mapping) else ''}"
        )

    def _check(self, logits: Any, labels: Any) -> None:
        for what, given in (("logits", logits), ("labels", labels)):
            if not hasattr(given, "shape"):
                raise DataError(f"Accuracy needs an array of {what}, got a {type(given).__name__}.")
        if not jnp.issubdtype(labels.dtype, jnp.integer) or len(labels.shape) != 1:
            hint = (
                "for one-hot labels: `Accuracy(labels=lambda batch: batch['label'].argmax(-1))`"
                if len(labels.shape) > 1
                else "cast them in the loader: `labels.astype(np.int32)`"
            )
            raise DataError(
                "Accuracy needs integer labels of shape [batch], got "
                f"{labels.dtype}{list(labels.shape)}; {hint}."
            )
        if len(logits.shape) != 2 or logits.shape[0] != labels.shape[0]:
            raise DataError(
                f"Accuracy needs logits [batch, classes] and labels [batch], got "
                f"{list(logits.shape)} and {list(labels.shape)}."
            )
        if self.top_k >= logits.shape[1]:
            raise ConfigError(
                f"Accuracy(top_k={self.top_k}) is always right with {logits.shape[1]} classes; "
                "use a smaller `top_k`."
            )
