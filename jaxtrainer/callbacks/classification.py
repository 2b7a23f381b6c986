"""What the metrics of a classifier share: where logits and labels are found, and checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, DataError, did_you_mean
from jaxtrainer.loaders import of_all_loaders
from jaxtrainer.metrics import series_name
from jaxtrainer.run import Run
from jaxtrainer.types import Array, LogFn, PyTree, Stage


class ClassificationMetric(Callback, ABC):
    """Finds logits and labels in each stage, and refuses labels that are no class.

    Args:
        logits: Key of the logits in the dict that the step returns: `[batch, classes]`, float.
        labels: Key of the labels in the batch, or a function of the batch: `[batch]`, integer.
        name: What tells its private series from those of another such callback.

    Raises:
        ConfigError: Before compilation, if the step returns no such logits.
        DataError: If labels are not integers, or out of range.
    """

    def __init__(self, *, logits: str, labels: str | Callable[[PyTree], Any], name: str) -> None:
        self.logits = logits
        self.labels = labels
        self.name = name
        self._classes = 0

    @abstractmethod
    def log_metric(self, logits: Array, labels: Array, in_range: Array, log: LogFn) -> None:
        """Log what is to be known of a batch (traced).

        Args:
            logits: `[batch, classes]`.
            labels: `[batch]`, int32.
            in_range: `[batch]`, bool: whether the label is a class.
            log: As `TrainModule.log`.
        """

    def check_shapes(self, logits: Any) -> None:
        """Raise ConfigError if the metric cannot be computed from logits of that shape."""

    def end_epoch(self, run: Run, stage: Stage) -> None:
        """Take the epoch's values; called when its labels are known to be classes."""

    @property
    def _bad_name(self) -> str:
        return f"_{self.name}_labels_out_of_range"

    def traced_step(
        self, stage: Stage, outputs: Mapping[str, Any], batch: PyTree, log: LogFn
    ) -> None:
        """Compare logits and labels (traced)."""
        logits, labels = self._logits(stage, outputs), self._labels(batch)
        self._check(logits, labels)
        # In uint8, as labels often travel, a number of classes above 255 would not fit.
        labels = labels.astype(jnp.int32)
        in_range = (labels >= 0) & (labels < logits.shape[-1])
        self.log_metric(logits, labels, in_range, log)
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
                f"{self._me}: the labels of the first {stage} batch run from {labels.min()} to "
                f"{labels.max()}, but there are {logits.shape[-1]} logits; expected 0 to "
                f"{logits.shape[-1] - 1}."
            )

    def on_train_epoch_end(self, run: Run) -> None:
        """Raise if a label of the epoch was out of range."""
        # An epoch that was skipped at its start has no values.
        if run.batch_idx:
            self._end_epoch(run, "train")

    def on_validation_epoch_end(self, run: Run) -> None:
        """Raise if a label was out of range."""
        if run.stage != "sanity":
            self._end_epoch(run, "validate")

    def on_test_epoch_end(self, run: Run) -> None:
        """Raise if a label was out of range."""
        self._end_epoch(run, "test")

    @property
    def _me(self) -> str:
        return type(self).__name__

    def _end_epoch(self, run: Run, stage: Stage) -> None:
        count = sum(of_all_loaders(run.metrics, series_name(stage, self._bad_name)).values())
        if count:
            raise DataError(
                f"{self._me}: {count:.0f} labels of the {stage} batches in epoch {run.epoch} are "
                f"out of range; there are {self._classes} logits, expected 0 to "
                f"{self._classes - 1}."
            )
        self.end_epoch(run, stage)

    def _logits(self, stage: Stage, outputs: Mapping[str, Any]) -> Any:
        if self.logits in outputs:
            return outputs[self.logits]
        step = {"train": "training", "validate": "validation"}.get(stage, stage)
        found = ", ".join(map(repr, outputs)) or "nothing"
        raise ConfigError(
            f"{self._me} needs the logits that {step}_step returns under {self.logits!r}, but it "
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
            f"{self._me} found no labels under {self.labels!r} in the batch ({found}); pass "
            f"`{self._me}(labels='...')`, or a function: `{self._me}(labels=lambda batch: "
            f"batch[1])`."
            f"{did_you_mean(self.labels, map(str, batch)) if isinstance(batch, Mapping) else ''}"
        )

    def _check(self, logits: Any, labels: Any) -> None:
        for what, given in (("logits", logits), ("labels", labels)):
            if not hasattr(given, "shape"):
                kind = type(given).__name__
                raise DataError(f"{self._me} needs an array of {what}, got a {kind}.")
        if not jnp.issubdtype(labels.dtype, jnp.integer) or len(labels.shape) != 1:
            hint = (
                f"for one-hot labels: `{self._me}(labels=lambda batch: batch['label'].argmax(-1))`"
                if len(labels.shape) > 1
                else "cast them in the loader: `labels.astype(np.int32)`"
            )
            raise DataError(
                f"{self._me} needs integer labels of shape [batch], got "
                f"{labels.dtype}{list(labels.shape)}; {hint}."
            )
        if len(logits.shape) != 2 or logits.shape[0] != labels.shape[0]:
            raise DataError(
                f"{self._me} needs logits [batch, classes] and labels [batch], got "
                f"{list(logits.shape)} and {list(labels.shape)}."
            )
        self.check_shapes(logits)
