"""`Run`: the host's record of a run: counters, limits, metrics, history, timings.

Integers, floats and a clock; reads no device. Callbacks and loggers receive it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtrainer.agreement import Agreement
from jaxtrainer.emitter import Emitter
from jaxtrainer.metrics import host_scalar, is_private
from jaxtrainer.records import Record
from jaxtrainer.types import Clock

_HARD_REASONS = ("max_steps", "max_epochs", "max_time", "interrupted", "restore")
"""Reasons to stop that the minimum limits do not hold back."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When training ends. `None` is no limit; `max_time_s` is in seconds.

    Attributes:
        is_endless: Whether it was asked for that there be none (`max_epochs=-1`).
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    max_time_s: float | None = None
    min_epochs: int = 0
    min_steps: int = 0
    is_endless: bool = False


@dataclass(kw_only=True)
class Series:
    """One logged series: the value at each optimiser step and epoch it was reported at."""

    steps: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def append(self, step: int, epoch: int, value: float) -> None:
        """Add one point."""
        self.steps.append(step)
        self.epochs.append(epoch)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.values)


@dataclass(kw_only=True)
class History:
    """Every reported value: `step` has values at single steps, `epoch` the exact epoch means.

    Example:
        >>> history = History()
        >>> history.add("epoch", {"val/loss": 0.5}, step=10, epoch=0)
        >>> history["val/loss"].values
        [0.5]
    """

    step: dict[str, Series] = field(default_factory=dict)
    epoch: dict[str, Series] = field(default_factory=dict)

    def add(self, kind: str, metrics: Mapping[str, float], *, step: int, epoch: int) -> None:
        """Append one point to each series of the kind, `"step"` or `"epoch"`."""
        table = self.step if kind == "step" else self.epoch
        for name, value in metrics.items():
            table.setdefault(name, Series()).append(step, epoch, value)

    def until(self, step: int) -> History:
        """Return what was reported of steps up to that one."""
        before = History()
        for kind, table in (("step", self.step), ("epoch", self.epoch)):
            for name, series in table.items():
                for point in zip(series.steps, series.epochs, series.values, strict=True):
                    if point[0] <= step:
                        before.add(kind, {name: point[2]}, step=point[0], epoch=point[1])
        return before

    def __getitem__(self, name: str) -> Series:
        """Return the epoch series of that name, or else its step series."""
        for table in (self.epoch, self.step):
            if name in table:
                return table[name]
        known = ", ".join(self) or "none"
        raise KeyError(f"no series {name!r}; logged: {known}")

    def __iter__(self) -> Iterator[str]:
        return iter({**self.step, **self.epoch})

    def __len__(self) -> int:
        return len({**self.step, **self.epoch})


class Timings:
    """Seconds by phase: `data`, `device`, `dispatch`, `compile`, `validate`, `checkpoint`, ...

    `data` is time the loop waited for the loader, `device` time it waited because the device
    was still busy, which is what a well-fed run shows.

    Attributes:
        seconds: By phase.
        started: When the run was made, on the clock.
        current: Name of the phase that runs, if one does.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.started = clock()
        self.current = ""
        self._inner_s = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase, less that of the phases inside it."""
        start, outer_inner_s, self._inner_s = self.clock(), self._inner_s, 0.0
        outer, self.current = self.current, name
        try:
            yield
        finally:
            self.current = outer
            spent = self.clock() - start
            self.seconds[name] += spent - self._inner_s
            self._inner_s = outer_inner_s + spent

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run was made."""
        return self.clock() - self.started


@dataclass(kw_only=True)
class Run(Emitter):
    """What has happened so far, as callbacks and module hooks see it.

    Attributes:
        stage: `"fit"`, `"sanity"`, `"train"`, `"validate"`, `"test"` or `"predict"`.
        epoch: Index of the current epoch.
        batch_idx: Batches of this epoch that have been dispatched.
        global_step: Optimiser steps so far; the updates of several optimisers, or several updates
            that a training step makes itself, are one.
        total_batches: Batches trained on so far, over all epochs.
        samples: Samples trained on so far.
        accumulate: Batches to an optimiser update in this epoch.
        accumulation: The same from each epoch on, `{0: 1, 4: 2}`.
        num_batches: Training batches an epoch, after limits; None if the loader has no length.
        loader_name: Name of the loader whose batches run, where several were given by name.
        eval_batch_idx: Batches of the running evaluation that are done, over all its loaders.
        num_eval_batches: How many there are, if known.
        validated_batches: `total_batches` at the end of the last whole validation.
        validated_at_s: `elapsed_s` there.
        owes_validation: Whether a validation was due and has not run to its end.
        metrics: Latest value on the host of every series.
        prog_bar: The series that the bar shows.
        config: Options, hyper-parameters and callbacks of a `fit`, as plain data.
        cache_hits: Programs that were found compiled in the persistent cache.
        cache_misses: Programs that were not, and were compiled.
        state: The `TrainState` on the device; the arrays live until the next dispatch.
        arrays: Latest epoch value of every private series that is an array, see `Recorder.log`.
        precision: Name of the trainer's precision.
        matmul_precision: The trainer's option; None where JAX's own holds.
        state_bytes: Bytes that a checkpoint holds; 0 before the training step is traced.
        make_plan: Makes `plan`; set when the training step is compiled.
        left_out: Indices in the run of the batches that are to change nothing.
        processes: What a batch costs each process, over the last report interval; on process 0,
            and only where there are several.
        restores: How often this call went back to a checkpoint.
        forked: Series that have values of steps and exact means.
        emit: Hands a record to the loggers; None where there are none.
        examine: Runs a batch that is not finite once more, see `replay.examine`; set where there
            is a guard in the step.
        agreement: How several processes decide together; None where there is one.
        signal: Number of the signal that has stopped the run, on whichever process; 0 for none.
    """

    limits: Limits = field(default_factory=Limits)
    clock: Clock = time.monotonic
    stage: str = "fit"
    epoch: int = 0
    batch_idx: int = 0
    global_step: int = 0
    total_batches: int = 0
    samples: int = 0
    batch_size: int = 0
    num_batches: int | None = None
    num_eval_batches: int | None = None
    eval_batch_idx: int = 0
    loader_name: str | None = None
    validated_batches: int = 0
    validated_at_s: float = 0.0
    owes_validation: bool = False
    accumulate: int = 1
    accumulation: Mapping[int, int] = field(default_factory=lambda: {0: 1})
    should_stop: bool = False
    stop_reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    prog_bar: set[str] = field(default_factory=set)
    history: History = field(default_factory=History)
    config: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    state: Any = None
    loader_state: Any = None
    is_epoch_end: bool = False
    resumed_step: int | None = None
    capture: Callable[[], Any] | None = None
    best_checkpoint: str | None = None
    last_checkpoint: str | None = None
    elapsed_before_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    precision: str = "32-true"
    matmul_precision: str | None = None
    state_bytes: int = 0
    make_plan: Callable[[], Any] | None = None
    left_out: set[int] = field(default_factory=set)
    restores: int = 0
    processes: tuple[Any, ...] = ()
    examine: Callable[..., Any] | None = None
    agreement: Agreement | None = None
    signal: int = 0
    forked: set[str] = field(default_factory=set)
    emit: Callable[[Record], None] | None = None

    def __post_init__(self) -> None:
        self.timings = Timings(self.clock)
        self._seen: dict[int, int] = {}
        self._plan: Any = None

    @property
    def plan(self) -> Any:
        """The `Plan` of the compiled training step, made when first asked for.

        From `on_fit_start` on; None before, and outside `fit`.
        """
        if self._plan is None and self.make_plan is not None:
            self._plan = self.make_plan()
        return self._plan

    @property
    def elapsed_s(self) -> float:
        """Seconds of this run, those before a resume included."""
        return self.elapsed_before_s + self.timings.elapsed_s

    @property
    def estimated_steps(self) -> int | None:
        """Optimiser steps that the limits allow; None if neither limit nor length tells."""
        by_epoch = None
        if self.num_batches is not None and self.limits.max_epochs is not None:
            by_epoch = self._steps_in(self.limits.max_epochs, self.num_batches)
        known = [n for n in (by_epoch, self.limits.max_steps) if n is not None]
        return min(known) if known else None

    def _steps_in(self, epochs: int, num_batches: int) -> int:
        starts = sorted(self.accumulation)
        ends = [*starts[1:], epochs]
        return sum(
            -(-num_batches // self.accumulation[start]) * max(0, min(end, epochs) - start)
            for start, end in zip(starts, ends, strict=True)
        )

    def follow(self, accumulation: Mapping[int, int]) -> None:
        """Take the schedule of accumulation: `{0: 1, 4: 2}`, 2 batches from epoch 4 on."""
        self.accumulation = accumulation
        self._begin_epoch()

    def take_over(self, earlier: Run | None) -> None:
        """Go on in place of a run that went back to the checkpoint from which this one starts."""
        if earlier is None:
            return
        self.history = earlier.history.until(self.global_step)
        self.notices[:0] = earlier.notices
        self.left_out |= earlier.left_out
        self.restores = earlier.restores
        # What was lost took its time all the same.
        self.elapsed_before_s = earlier.elapsed_s

    def _begin_epoch(self) -> None:
        last = max(epoch for epoch in self.accumulation if epoch <= self.epoch)
        self.accumulate = self.accumulation[last]

    def batches_until(self, step: int) -> int:
        """Return how many batches there are up to that optimiser step, within an epoch."""
        return (step - self.global_step) * self.accumulate - self.batch_idx % self.accumulate

    def note_validated(self) -> None:
        """Keep when the last validation was; called when it has run to its end."""
        self.validated_batches = self.total_batches
        self.validated_at_s = self.elapsed_s
        self.owes_validation = False

    def advance(self, batches: int, steps: int) -> None:
        """Count batches dispatched and the optimiser updates in them."""
        self.batch_idx += batches
        self.total_batches += batches
        self.global_step += steps
        self.samples += batches * self.batch_size

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch += 1
        self.batch_idx = 0
        self._begin_epoch()
        self.loader_state = None
        self.is_epoch_end = False

    def stop(self, reason: str) -> None:
        """Ask the loop to end at the next boundary.

        The first reason stands, but a limit or a signal takes the place of a callback's wish that
        `min_steps` or `min_epochs` holds back. Of several processes any may ask, and all stop after
        the same step: where all ask at the same point there, and otherwise a few steps later.
        """
        if self.agreement is None:
            self._stop(reason)
        else:
            self.agreement.ask("stop", reason)

    def interrupt(self, number: int) -> None:
        """Ask the loop to end because of a signal."""
        if self.agreement is None:
            self.signal = number
            self._stop("interrupted")
        else:
            self.agreement.ask("stop", "interrupted", number)

    def settle(self) -> None:
        """Do what the processes have agreed on for this point; nothing where there is one."""
        if self.agreement is not None:
            for wish in self.agreement.tick():
                self.signal = wish.signal or self.signal
                self._stop(wish.text)

    def agree(self, name: str, wanted: bool) -> bool:
        """Return whether all processes are to do something now that depends on a host's clock.

        Args:
            name: Of what is to be done. All processes ask for it at the same points, and do it at
                one of the next of these after process 0 wanted it.
            wanted: Whether it is due; in one process that is the answer.
        """
        return wanted if self.agreement is None else self.agreement.is_agreed(name, wanted)

    def _stop(self, reason: str) -> None:
        if not self.stop_reason or (reason in _HARD_REASONS and not self.is_done):
            self.stop_reason = reason
        self.should_stop = True

    def log(self, name: str, value: Any, *, prog_bar: bool = False) -> None:
        """Record a host value as an epoch point, e.g. from a hook."""
        self.record("epoch", {name: host_scalar(name, value)})
        if prog_bar and name in self.metrics:
            self.prog_bar.add(name)

    def record(
        self,
        kind: str,
        metrics: Mapping[str, float],
        step: int | None = None,
        samples: int | None = None,
    ) -> None:
        """Take reported values into `metrics` and `history`; names with `_` first are private.

        Nothing is kept of a sanity check. `samples` are those trained on at the step.
        """
        if self.stage == "sanity":
            return
        self.metrics.update(metrics)
        public = {k: v for k, v in metrics.items() if not is_private(k)}
        at = self.global_step if step is None else step
        self.history.add(kind, public, step=at, epoch=self.epoch)
        self.hand_scalars(kind, public, at, samples)

    def record_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the epoch's values of private series that are arrays into `arrays`."""
        if self.stage != "sanity":
            self.arrays.update(arrays)

    def notice(self, text: str) -> None:
        """Keep a line for the user, once."""
        if text not in self.notices:
            self.notices.append(text)

    def check_limits(self) -> None:
        """Stop if a limit is reached; called after every dispatch and epoch."""
        limits = self.limits
        if self.agreement is not None:
            self.settle()
        if limits.max_steps is not None and self.global_step >= limits.max_steps:
            self._stop("max_steps")
        elif limits.max_epochs is not None and self.epoch >= limits.max_epochs:
            self._stop("max_epochs")
        elif limits.max_time_s is not None and self.agree(
            "max_time", self.elapsed_s >= limits.max_time_s
        ):
            self._stop("max_time")

    @property
    def is_done(self) -> bool:
        """Whether to stop now: asked for, and not held back by the minimum limits."""
        if not self.should_stop:
            return False
        if self.stop_reason in _HARD_REASONS:
            return True
        return self.epoch >= self.limits.min_epochs and self.global_step >= self.limits.min_steps
