"""What would take less memory, with figures: for the error of a step that did not fit.

The compiler says what a step needs; it is asked for a few sizes of the batch, and a line through
them tells the rest. Nothing is allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from jaxtrainer.display.text import format_bytes
from jaxtrainer.feed import FeedSpec
from jaxtrainer.memory import is_out_of_memory, total_bytes
from jaxtrainer.module import thaw
from jaxtrainer.plan import peak_bytes_of
from jaxtrainer.precision import Precision
from jaxtrainer.session import Session
from jaxtrainer.sharding import num_data_shards
from jaxtrainer.state import size_of

MARGIN = 0.05
"""Part of the memory that the advice leaves free."""


class Need(NamedTuple):
    """What a step needs of a device, in bytes.

    Attributes:
        peak: Altogether.
        temporary: Activations, gradients and whatever else lives within the step.
    """

    peak: int
    temporary: int


class Line(NamedTuple):
    """Bytes of a device by samples of a batch: `fixed + each * samples`."""

    fixed: float
    each: float

    def at(self, samples: float) -> float:
        """Return the bytes for that many samples."""
        return self.fixed + self.each * samples


@dataclass(frozen=True)
class Shortage:
    """Advice for a training step that did not fit.

    Attributes:
        session: Of the call.
        spec: What the feed hands to the step.
        accumulate: Batches to an update.
        build: Traces the step: `build(session, spec)` is a `TracedStep`.
    """

    session: Session
    spec: FeedSpec
    accumulate: int
    build: Callable[[Session, FeedSpec], Any]

    def notes(self) -> Sequence[str]:
        """Return the advice, line by line; raises nothing."""
        try:
            return list(self._advice())
        except Exception as error:
            # That memory ran out is the error to be seen.
            return [f"no advice on memory: {type(error).__name__}: {error}"]

    def _advice(self) -> Iterator[str]:
        limit, rows = total_bytes(self.session.mesh.local_devices), self.spec.rows
        whole, line = self._measure(rows), self._line(rows)
        usable = limit * (1 - MARGIN)
        if whole is None and line is None:
            yield f"the compiler finds no room for a step even of few samples in {_size(limit)}"
            return
        peak = line.at(rows) if whole is None and line is not None else getattr(whole, "peak", 0)
        yield (
            f"a step on {rows} samples needs {_size(peak)} of a device, by the compiler's account; "
            f"it has {_size(limit)}"
        )
        if peak <= usable:
            yield "that fits: other programs, or arrays that you keep, take the rest"
        if line is not None:
            yield from self._smaller(line, usable)
            yield from self._spread(line, usable)
        if whole is not None:
            yield from self._within(whole)

    def _smaller(self, line: Line, usable: float) -> Iterator[str]:
        """Advise a smaller batch, and accumulation to make up for it."""
        rows, unit = self.spec.rows, num_data_shards(self.session.mesh)
        fits = rows // 2 if line.each <= 0 else int((usable - line.fixed) / line.each)
        # What does fit has run out all the same: half of it then.
        fits = (min(fits, rows - 1) if fits < rows else rows // 2) // unit * unit
        need = self._measure(fits) if fits >= unit else None
        if need is None:
            yield (
                f"batch size: not even {unit} samples fit beside the {_size(line.fixed)} that do "
                "not depend on it"
            )
            return
        yield f"batch size: {fits} samples need {_size(need.peak)}: `batch_size={fits}`"
        times = -(-rows // fits) * self.accumulate
        extra = "" if self.accumulate > 1 else f", and {_size(self._grad_bytes)} for their sums"
        yield (
            f"accumulation: `accumulate_grad_batches={times}` with batches of {fits} makes updates "
            f"of {fits * times} samples{extra}"
        )

    def _within(self, whole: Need) -> Iterator[str]:
        """Advise what makes the same batch smaller."""
        saved = max(0, whole.temporary - self._grad_bytes)
        yield (
            f"rematerialisation: {_size(whole.temporary)} are temporaries of the step; `remat=` "
            f"with a pattern of the model's blocks computes them anew: up to {_size(saved)} less"
        )
        if self.session.options.precision.name == "32-true":
            half = self._measure(self.spec.rows, precision="bf16-mixed")
            if half is not None:
                yield f"precision: `precision='bf16-mixed'` needs {_size(half.peak)}"

    def _spread(self, line: Line, usable: float) -> Iterator[str]:
        """Advise more devices."""
        rows, used, there = self.spec.rows, self.session.mesh.size, jax.device_count()
        shards = num_data_shards(self.session.mesh)
        there = max((n for n in range(1, there + 1) if rows % n == 0), default=1)
        if there > used and shards == used:
            need = line.at(rows * used / there)
            mesh = f"`mesh={{'data': {there}}}`"
            yield f"sharding: over {there} devices, {mesh}, each needs {_size(need)}"
        elif usable > line.fixed and line.each > 0:
            count = -(-line.each * rows * used // (usable - line.fixed))
            yield f"sharding: {int(count)} such devices would hold {rows} samples of a step"
        else:
            is_whole = self.session.layout.is_whole
            yield (
                f"sharding: {_size(line.fixed)} are on each device whatever the batch; more "
                "devices that divide the batch alone do not help"
                + (": divide the parameters too, `sharding='fsdp'`" if is_whole else "")
            )

    @property
    def _grad_bytes(self) -> int:
        return size_of(self.session.initializer.params)[0] * 4

    def _line(self, rows: int) -> Line | None:
        """Return the line through what the compiler says of half and a quarter of the samples."""
        unit = num_data_shards(self.session.mesh)
        sizes = sorted({max(unit, rows // n // unit * unit) for n in (2, 4)})
        needs = [self._measure(size) for size in sizes]
        if len(sizes) < 2 or any(need is None for need in needs):
            return None
        first, second = (need.peak for need in needs if need is not None)
        each = (second - first) / (sizes[1] - sizes[0])
        return Line(first - each * sizes[0], each)

    def _measure(self, rows: int, precision: str | None = None) -> Need | None:
        """Return what a step needs; None if the compiler finds that it does not fit."""
        session = self.session
        if precision is not None:
            session = copy.copy(session)
            session.options = replace(session.options, precision=Precision(precision))
            session._init = None
        try:
            step = self.build(session, self._spec_for(rows))
            compiled = step.lower(step.program.single).compile()
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise
        finally:
            thaw(self.session.module)
        return Need(peak_bytes_of(compiled), compiled.memory_analysis().temp_size_in_bytes)

    def _spec_for(self, rows: int) -> FeedSpec:
        def cut(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)

        batch, fed = jax.tree.map(cut, (self.spec.batch, self.spec.fed))
        return FeedSpec(batch=batch, fed=fed, rows=rows, resident=self.spec.resident)


def _size(value: float) -> str:
    return format_bytes(max(value, 0))
