"""`WandbLogger`: Weights & Biases."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrainer.errors import ConfigError
from jaxtrainer.loggers.logger import Call, Logger, directory_of, missing
from jaxtrainer.records import (
    Axes,
    End,
    Histogram,
    HyperParameters,
    Image,
    Record,
    Scalars,
    Text,
)

_MAX_BINS = 512


class WandbLogger(Logger):
    """Log scalars, images, histograms, texts and hyper-parameters to Weights & Biases.

    Every row has `step`, `epoch`, `samples` and `elapsed_s` (of the run, in seconds), and `step`
    is the axis of the others; of a series with values of steps and exact means the latter have
    `_epoch` behind. A call of `test` after `fit` goes on in the same run; so does one that resumes
    in a new process, if it is told the run's `id`. Rows that a resumed run writes again stay
    there twice.

    Args:
        project: Name of the project; wandb's default if None.
        name: Name of the run; wandb makes one if None.
        save_dir: Directory for its local files.
        offline: Write them there only; `wandb sync` uploads them.
        id: Id of the run, to go on with it.
        **options: Passed to `wandb.init`: `entity`, `group`, `tags`, `notes`, ...

    Raises:
        MissingExtraError: Without wandb: `pip install 'jaxtrainer[wandb]'`.

    Example:
        >>> logger = WandbLogger(project="digits", offline=True)  # doctest: +SKIP
    """

    flush_timeout_s = 60.0

    def __init__(
        self,
        *,
        project: str | None = None,
        name: str | None = None,
        save_dir: str | os.PathLike[str] = ".",
        offline: bool = False,
        id: str | None = None,
        **options: Any,
    ) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise missing("wandb", "WandbLogger", "wandb") from error
        self._wandb: Any = wandb
        if not isinstance(offline, bool):
            raise ConfigError(f"WandbLogger(offline={offline!r}): pass True or False.")
        self.directory = directory_of("WandbLogger", save_dir)
        self.id = id
        self._is_given = id is not None
        self._options = {"project": project, "name": name, **options}
        if offline:
            self._options["mode"] = "offline"
        self._run: Any = None

    def open(self, root: Path, call: Call) -> None:
        """Begin a run, or go on with it."""
        if call.is_new and not self._is_given:
            self.id = None
        settings = self._wandb.Settings(console="off")
        defaults = {"settings": settings, "reinit": "create_new", "resume": "allow"}
        place = {"dir": str(root / str(self.directory)), "id": self.id}
        self._run = self._wandb.init(**{**defaults, **self._options, **place})
        self.id = self._run.id
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Log it."""
        wandb, run = self._wandb, self._run
        match record:
            case Scalars():
                run.log({**_row(record.axes), **record.tagged})
            case Image():
                run.log({**_row(record.axes), record.name: wandb.Image(_squeezed(record.pixels))})
            case Histogram():
                edges = np.where(np.isinf(record.edges), 2 * record.edges[-2], record.edges)
                counted = record.counts[:_MAX_BINS].tolist(), edges[: _MAX_BINS + 1].tolist()
                run.log({**_row(record.axes), record.name: wandb.Histogram(np_histogram=counted)})
            case Text():
                run.log({**_row(record.axes), record.name: wandb.Html(_html(record.text))})
            case HyperParameters():
                run.config.update(dict(record.values), allow_val_change=True)
            case End():
                run.summary.update({"status": record.status, "stop_reason": record.reason})

    def close(self) -> None:
        """End the run."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()


def _row(axes: Axes) -> dict[str, float]:
    return {
        "step": axes.step,
        "epoch": axes.epoch,
        "samples": axes.samples,
        "elapsed_s": axes.elapsed_s,
    }


def _squeezed(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _html(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
