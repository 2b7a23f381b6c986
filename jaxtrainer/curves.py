"""Which series of a run are drawn together, and where its epochs end. Imports `run` only.

Both the figures and the HTML report draw these panels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtrainer.run import History

_STAGES = ("train", "val", "test")
_MANY_DECADES = 1000.0
"""A panel whose values span this factor has a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a panel.

    Attributes:
        name: Full name of the series, `"train/loss"`.
        kind: `"step"` for values of single steps, `"epoch"` for means of whole epochs.
        steps: Optimiser steps.
        epochs: Epoch of each point, from 0.
        values: Its values; may hold NaN and infinity.
        is_faint: Whether another line has the means of this one.
    """

    name: str
    kind: Literal["step", "epoch"]
    steps: Sequence[int]
    epochs: Sequence[int]
    values: Sequence[float]
    is_faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The lines that share a pair of axes."""

    title: str
    lines: Sequence[Line]

    @property
    def names(self) -> list[str]:
        """The names of its series, each once, in order."""
        return list(dict.fromkeys(line.name for line in self.lines))

    @property
    def finite(self) -> list[float]:
        """All values that can be drawn."""
        return [v for line in self.lines for v in line.values if math.isfinite(v)]

    @property
    def is_log(self) -> bool:
        """Whether its values, all positive, span so much that only a logarithm shows them."""
        low, high = min(self.finite, default=0.0), max(self.finite, default=0.0)
        return low > 0.0 and high >= _MANY_DECADES * low


def family(name: str) -> str:
    """Return the title of the panel that a series belongs in.

    Example:
        >>> [family(n) for n in ("train/loss", "val/clean/loss", "grads_norm/encoder", "score")]
        ['loss', 'loss', 'grads_norm', 'score']
    """
    first, _, rest = name.partition("/")
    if not rest:
        return name
    if first in _STAGES:
        return rest.rpartition("/")[2]
    if first == "device":
        return f"device/{rest.rpartition('/')[2]}"
    return first if first.endswith("_norm") or first == "learning_rate" else name


def panels_of(history: History) -> list[Panel]:
    """Return what to draw of a history: the losses first, then what belongs to a stage.

    Of a series with both kinds of values, those of single steps are the faint ones.
    """
    groups: dict[str, list[Line]] = {}
    for name in history:
        step, epoch = history.step.get(name), history.epoch.get(name)
        lines = groups.setdefault(family(name), [])
        for kind, series in (("step", step), ("epoch", epoch)):
            if series is not None and len(series):
                lines.append(
                    Line(
                        name=name,
                        kind="step" if kind == "step" else "epoch",
                        steps=series.steps,
                        epochs=series.epochs,
                        values=series.values,
                        is_faint=kind == "step" and epoch is not None,
                    )
                )
    panels = [Panel(title=title, lines=lines) for title, lines in groups.items() if lines]
    return sorted(panels, key=_rank)


def epoch_ends(history: History, num_epochs: int | None = None) -> dict[int, int]:
    """Return the optimiser step at which each epoch ended, by the epoch's number from 1.

    Args:
        history: Of the run.
        num_epochs: Epochs that were completed; None if not known, then the last may be cut short.
    """
    ends: dict[int, int] = {}
    for series in history.epoch.values():
        for step, epoch in zip(series.steps, series.epochs, strict=True):
            if num_epochs is None or epoch < num_epochs:
                ends[epoch + 1] = max(step, ends.get(epoch + 1, 0))
    return dict(sorted(ends.items()))


def some_epochs(ends: dict[int, int], at_most: int) -> dict[int, int]:
    """Return so many of the epochs at most, at even distances: multiples of 1, 2, 5, 10, ..."""
    if not ends:
        return {}
    sizes = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    for size in sizes:
        kept = {epoch: step for epoch, step in ends.items() if epoch % size == 0}
        if len(kept) <= at_most:
            return kept
    return {}


def _rank(panel: Panel) -> tuple[int, str]:
    of_stage = any(name.partition("/")[0] in _STAGES for name in panel.names)
    order = 0 if panel.title == "loss" else 1 if of_stage else 2
    return order, panel.title
