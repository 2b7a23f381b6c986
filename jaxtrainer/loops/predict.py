"""The prediction loop: a generator, so that predictions need not be kept.

Imports no concrete callback, store or step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtrainer.callback import CallbackList
from jaxtrainer.feed import Feed
from jaxtrainer.loops.views import BatchView
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree

_AHEAD = 2
"""Batches dispatched before the oldest is fetched, so that the device is never idle."""


@dataclass(kw_only=True)
class PredictPlan:
    """What the loop drives; `step_for(rows)` is the compiled program for such batches."""

    step_for: Callable[[int], Callable[..., Any]]
    resident: PyTree
    feed: Feed
    hooks: CallbackList
    capacity: int


def predict(run: Run, plan: PredictPlan, params: PyTree, model_state: PyTree) -> Iterator[PyTree]:
    """Yield the predictions of each batch, in order, as NumPy arrays."""
    hooks = plan.hooks
    run.stage, run.eval_batch_idx = "predict", 0
    run.num_eval_batches = plan.feed.num_batches
    hooks.on_predict_start(run)
    hooks.on_predict_epoch_start(run)
    feed = plan.feed.again().start(plan.capacity)
    waiting: deque[tuple[PyTree, BatchView]] = deque()
    try:
        for chunk in feed:
            step = plan.step_for(chunk.rows)
            for i in range(chunk.size):
                batch = BatchView(chunk.tree, plan.resident, i)
                if hooks.has("on_predict_batch_start"):
                    dispatched = run.eval_batch_idx + len(waiting)
                    hooks.on_predict_batch_start(run, batch.get(), dispatched)
                out = step(params, model_state, plan.resident, chunk.tree, np.int32(i))
                waiting.append((out, batch))
                if len(waiting) > _AHEAD:
                    yield _fetch(run, plan, *waiting.popleft())
            feed.dispatched(jax.tree.leaves(waiting[-1][0])[0])
        while waiting:
            yield _fetch(run, plan, *waiting.popleft())
    finally:
        feed.close()
    hooks.on_predict_epoch_end(run)
    hooks.on_predict_end(run)


def _fetch(run: Run, plan: PredictPlan, outputs: PyTree, batch: BatchView) -> PyTree:
    values = jax.tree.map(np.asarray, outputs)
    run.eval_batch_idx += 1
    if plan.hooks.has("on_predict_batch_end"):
        plan.hooks.on_predict_batch_end(run, values, batch.get(), run.eval_batch_idx - 1)
    return values
