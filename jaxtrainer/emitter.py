"""What a run hands to its loggers: the part of `Run` that makes records. May import `records`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtrainer import records

_KEPT = 8


class Emitter:
    """Makes records of a run, and hands them over; without a logger they are checked only.

    Attributes:
        emit: Hands a record to the loggers; None where there are none.
        forked: Series that have values of steps and exact means.
    """

    global_step: int
    epoch: int
    samples: int
    stage: str
    forked: set[str]
    emit: Callable[[records.Record], None] | None
    _seen: dict[int, int]

    @property
    def elapsed_s(self) -> float:
        """Seconds of the run."""
        raise NotImplementedError

    def log_image(self, name: str, image: Any, *, columns: int | None = None) -> None:
        """Hand a picture to the loggers, from a hook; with `columns` several, as one grid.

        Args:
            name: Its series.
            image: `[height, width]` or `[height, width, channels]`, with 1, 3 or 4 channels; with
                `columns` several, `[n, height, width]` or `[n, height, width, channels]`. uint8,
                or floats from 0 to 1.
            columns: Pictures in a row of the grid.

        Raises:
            LogError: For another shape, dtype or range.
        """
        self._hand(records.image(self.axes(), name, image, columns))

    def log_histogram(
        self, name: str, values: Any, *, edges: Any = None, step: int | None = None
    ) -> None:
        """Hand a histogram to the loggers, from a hook.

        Args:
            name: Its series.
            values: Numbers to count, of any shape; what is not finite is left out. With `edges`
                counts, `[bins]`.
            edges: `[bins + 1]`, rising.
            step: Optimiser step that it is of, if not the newest.

        Raises:
            LogError: For no numbers, or edges that do not fit.
        """
        self._hand(records.histogram(self.axes(step), name, values, edges))

    def log_text(self, name: str, text: str) -> None:
        """Hand a text to the loggers, from a hook; LogError for what is no string."""
        self._hand(records.text(self.axes(), name, text))

    def axes(self, step: int | None = None, samples: int | None = None) -> records.Axes:
        """Return where a record of that step belongs; of the newest step, if none is given."""
        at = self.global_step if step is None else step
        if samples is not None:
            # What else is said of a step comes with its report, or with one of the next.
            self._seen = dict([*self._seen.items(), (at, samples)][-_KEPT:])
        known = self._seen.get(at, self.samples)
        return records.Axes(step=at, epoch=self.epoch, samples=known, elapsed_s=self.elapsed_s)

    def hand_scalars(
        self, kind: str, values: Mapping[str, float], step: int, samples: int | None
    ) -> None:
        """Hand over values of one step."""
        if self.emit is not None and values:
            axes = self.axes(step, samples)
            self.emit(records.scalars(axes, kind, values, self.forked))

    def _hand(self, record: records.Record) -> None:
        if self.emit is not None and self.stage != "sanity":
            self.emit(record)
