"""The evaluation loop of validation and test. Imports no concrete callback, store or step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrainer.callback import CallbackList
from jaxtrainer.feed import Chunk, Feed
from jaxtrainer.loops.views import BatchView
from jaxtrainer.metrics import LoggedOutputs, Totals
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree, Stage

HOOK_NAMES: dict[str, str] = {"validate": "validation", "test": "test"}


@dataclass(kw_only=True)
class EvalPlan:
    """What the loop drives, assembled once by the trainer.

    Attributes:
        step_for: Compiled program for batches of that many rows; compiles on first use.
        totals: Meaning of the metrics.
        feed: Opened feed; each pass reads a fresh copy.
    """

    stage: Stage
    step_for: Callable[[int], Callable[..., Any]]
    totals: Totals
    resident: PyTree
    feed: Feed
    hooks: CallbackList
    fused: bool
    capacity: int


def evaluate(
    run: Run, plan: EvalPlan, params: PyTree, model_state: PyTree, *, limit: int | None = None
) -> dict[str, float]:
    """Run one pass over the loader and return the exact means of what its steps logged.

    A signal that stops the run ends the pass too; it then reports nothing and returns `{}`.

    Args:
        run: The record; its `metrics` get the values too.
        plan: What to run.
        params: Parameters on the device.
        model_state: The model's other variables on the device.
        limit: At most this many batches (the sanity check).
    """
    hook = _hooks(plan.hooks, HOOK_NAMES[plan.stage])
    run.stage = "sanity" if limit is not None else plan.stage
    run.eval_batch_idx = 0
    feed = plan.feed.again(limit)
    run.num_eval_batches = feed.num_batches
    hook("start")(run)
    hook("epoch_start")(run)
    totals: Any = plan.totals.initial()
    try:
        for chunk in feed.start(plan.capacity):
            totals = _run_chunk(run, plan, feed, chunk, totals, params, model_state)
            if run.stop_reason == "interrupted":
                # A part of the data has no exact mean: nothing is reported.
                return {}
    finally:
        feed.close()
    metrics = plan.totals.compute(np.asarray(totals))
    if limit is None:
        run.record("epoch", metrics)
    hook("epoch_end")(run)
    hook("end")(run)
    return metrics


def _run_chunk(
    run: Run, plan: EvalPlan, feed: Feed, chunk: Chunk, totals: Any, params: PyTree, state: PyTree
) -> Any:
    step = plan.step_for(chunk.rows)
    is_ragged = chunk.rows != feed.rows
    capacity = 1 if is_ragged else plan.capacity
    hook = _hooks(plan.hooks, HOOK_NAMES[plan.stage])
    starts, ends = (
        plan.hooks.has(_name(plan, "batch_start")),
        plan.hooks.has(_name(plan, "batch_end")),
    )
    count = 1 if starts or not plan.fused or is_ragged else chunk.size
    for start in range(0, chunk.size, count):
        if starts:
            batch = BatchView(chunk.tree, plan.resident, start).get()
            hook("batch_start")(run, batch, run.eval_batch_idx)
        control = np.zeros(3 + capacity, np.int32)
        control[:2] = start, min(start + count, chunk.size)
        totals, rows = step(params, state, totals, plan.resident, chunk.tree, control)
        feed.dispatched(rows)
        done = int(control[1]) - start
        run.eval_batch_idx += done
        for i in range(done if ends else 0):
            row = start + i if plan.fused and not is_ragged else 0
            outputs = LoggedOutputs(plan.totals.specs, rows, row)
            batch = BatchView(chunk.tree, plan.resident, start + i).get()
            hook("batch_end")(run, outputs, batch, run.eval_batch_idx - done + i)
    return totals


def _name(plan: EvalPlan, suffix: str) -> str:
    return f"on_{HOOK_NAMES[plan.stage]}_{suffix}"


def _hooks(hooks: CallbackList, prefix: str) -> Callable[[str], Callable[..., Any]]:
    return lambda suffix: getattr(hooks, f"on_{prefix}_{suffix}")
