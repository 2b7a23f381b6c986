"""The training loop: the host side of a run, from the first epoch to the last.

Imports no concrete callback, store or step: the trainer hands them over in a `FitPlan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrainer.feed import Chunk, Feed
from jaxtrainer.hooks import CallbackList
from jaxtrainer.loops.controls import Controls
from jaxtrainer.loops.report import Reporter
from jaxtrainer.loops.views import BatchView
from jaxtrainer.metrics import LoggedOutputs, Totals
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree
from jaxtrainer.validation import Schedule

_CUT_SHORT = ("interrupted", "restore")
"""Reasons to stop that leave an epoch, or a validation, to be run by whoever goes on."""


@dataclass(kw_only=True)
class FitPlan:
    """What the loop drives, assembled once by the trainer.

    Attributes:
        step: The compiled training program.
        totals: Meaning of its metric rows.
        resident: Data on the device, or None.
        feed: Started feed of the training batches.
        controls: Makes the control vector of each dispatch.
        hooks: Overridden hooks.
        reporter: Brings step values to the host.
        validate: Runs validation; None without a validation loader.
        schedule: When validation is due, asked after every dispatch, which end where it says.
        fused: Whether `step` runs several batches at once.
        max_steps: How many at most.
        refuse_stale: Raises if hooks have changed in place what the compiled step had read.
    """

    step: Callable[..., Any]
    totals: Totals
    resident: PyTree
    feed: Feed
    controls: Controls
    hooks: CallbackList
    reporter: Reporter
    validate: Callable[[Run], None] | None
    schedule: Schedule
    fused: bool
    max_steps: int
    refuse_stale: Callable[[], None]


def fit(run: Run, plan: FitPlan) -> None:
    """Train until a limit is reached or somebody asks to stop."""
    hooks = plan.hooks
    run.stage = "train"
    hooks.on_train_start(run)
    plan.schedule.start(run)
    if run.owes_validation:
        _make_up_validation(run, plan)
    chunks = iter(plan.feed)
    run.check_limits()
    while not run.is_done:
        if run.batch_idx == 0:
            hooks.on_train_epoch_start(run)
        is_whole = _train_epoch(run, plan, chunks)
        if is_whole or run.stop_reason not in _CUT_SHORT:
            _end_epoch(run, plan)
        # A hook may have asked to stop: the last values come before the checkpoint, if they can.
        _validate_at_end(run, plan, is_whole)
        if run.total_batches:
            hooks.on_save_point(run)
            run.settle()
        _validate_at_end(run, plan, is_whole)
        if is_whole:
            run.next_epoch()
            run.check_limits()
    plan.reporter.finish(run)
    hooks.on_train_end(run)


def _train_epoch(run: Run, plan: FitPlan, chunks: Iterator[Chunk]) -> bool:
    """Run the rest of the epoch; return whether it was run to its end."""
    hooks, step, feed, controls = plan.hooks, plan.step, plan.feed, plan.controls
    each_batch = hooks.has("on_train_batch_end")
    run.is_epoch_end = False
    while True:
        chunk = _next_chunk(run, chunks)
        if chunk is None:
            # No more epochs; or a signal came while there was nothing to do but wait.
            return run.batch_idx > 0 and run.stop_reason != "interrupted"
        start, run.batch_size = 0, chunk.rows
        while start < chunk.size:
            if _wants_to_skip(run, plan, chunk, start):
                _skip_epoch(chunk, chunks)
                run.is_epoch_end = True
                return True
            count = min(chunk.size - start, _room(run, plan))
            if plan.fused:
                control, steps = controls.several(run, chunk, start, count)
            else:
                control, steps = controls.single(run, chunk, start)
            began = run.clock()
            run.state, rows = step(run.state, plan.resident, chunk.tree, control)
            feed.dispatched(rows)
            run.timings.seconds["dispatch"] += run.clock() - began
            first_row = start if plan.fused else 0
            run.loader_state = chunk.states[start + count - 1]
            run.advance(count, steps[-1] - run.global_step)
            plan.reporter.after(run, rows, first_row, steps)
            start += count
            is_last = chunk.is_last and start == chunk.size
            run.is_epoch_end = is_last
            if each_batch:
                _end_batches(run, plan, chunk, rows, start - count, count, first_row)
            run.check_limits()
            if plan.validate is not None and plan.schedule.is_due(run, is_last):
                _validate(run, plan)
            if not is_last:
                hooks.on_save_point(run)
                run.settle()
            if run.is_done and not is_last:
                return False
        if chunk.is_last:
            # Only now is it known that a loader's last batch was left out.
            run.num_batches = run.batch_idx if feed.ragged_rows else run.num_batches
            return True


def _validate_at_end(run: Run, plan: FitPlan, is_whole: bool) -> None:
    if plan.validate is not None and plan.schedule.is_due_at_end(run, is_whole):
        _validate(run, plan)


def _validate(run: Run, plan: FitPlan) -> None:
    # Until it has run to its end: a resumed run makes up for one that was cut short.
    run.owes_validation = True
    if plan.validate is not None and run.stop_reason not in _CUT_SHORT:
        plan.validate(run)
        run.stage = "train"
        run.settle()


def _make_up_validation(run: Run, plan: FitPlan) -> None:
    # Of a run saved at the end of an epoch the next one has begun: the values are of the last.
    is_of_last_epoch = run.batch_idx == 0
    run.epoch -= is_of_last_epoch
    _validate(run, plan)
    run.epoch += is_of_last_epoch


def _next_chunk(run: Run, chunks: Iterator[Chunk]) -> Chunk | None:
    began = run.clock()
    chunk = next(chunks, None)
    # A feed that was held back by a busy device is not short of data.
    phase = "device" if chunk is not None and chunk.was_throttled else "data"
    run.timings.seconds[phase] += run.clock() - began
    return chunk


def _room(run: Run, plan: FitPlan) -> int:
    """Return how many batches may run before somebody wants control."""
    if not plan.fused or plan.hooks.has("on_train_batch_start"):
        return 1
    room = plan.max_steps
    if plan.validate is not None:
        room = min(room, plan.schedule.room(run))
    for period in plan.hooks.periods:
        room = min(room, run.batches_until((run.global_step // period + 1) * period))
    for step in (*plan.hooks.stops, run.limits.max_steps, run.limits.min_steps):
        if step is not None and step > run.global_step:
            room = min(room, run.batches_until(step))
    return max(room, 1)


def _wants_to_skip(run: Run, plan: FitPlan, chunk: Chunk, start: int) -> bool:
    if not plan.hooks.has("on_train_batch_start"):
        return False
    batch = BatchView(chunk, plan.resident, start)
    return plan.hooks.on_train_batch_start(run, batch.get(), run.batch_idx) == -1


def _skip_epoch(chunk: Chunk, chunks: Iterator[Chunk]) -> None:
    following: Chunk | None = chunk
    while following is not None and not following.is_last:
        following = next(chunks, None)


def _end_batches(
    run: Run, plan: FitPlan, chunk: Chunk, rows: Any, start: int, count: int, first_row: int
) -> None:
    for i in range(count):
        outputs = LoggedOutputs(plan.totals.specs, rows, first_row + i)
        batch = BatchView(chunk, plan.resident, start + i)
        plan.hooks.on_train_batch_end(run, outputs, batch.get(), run.batch_idx - count + i)


def _end_epoch(run: Run, plan: FitPlan) -> None:
    plan.reporter.flush(run)
    # An epoch that was skipped at its start has no means; the totals are still the last one's.
    if run.batch_idx:
        with run.timings.phase("device"):
            totals = np.asarray(run.state.totals)
        run.record_arrays(plan.totals.arrays(totals))
        run.record("epoch", plan.totals.compute(totals))
    plan.hooks.on_train_epoch_end(run)
    run.settle()
    plan.refuse_stale()
