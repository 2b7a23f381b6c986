"""The prediction loop: a generator, so that predictions need not be kept.

Imports no concrete callback, store or step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtrainer.feed import Chunk, Feed
from jaxtrainer.hooks import CallbackList
from jaxtrainer.loops.evaluate import num_batches_of
from jaxtrainer.loops.views import BatchView
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree

_AHEAD = 2
"""Batches dispatched before the oldest is fetched, so that the device is never idle."""


@dataclass(frozen=True, kw_only=True)
class PredictLoader:
    """One loader of a prediction; `step_for(chunk)` is the compiled program for such chunks.

    Attributes:
        name: Its name, where several were given by name.
    """

    name: str | None
    step_for: Callable[[Chunk], Callable[..., Any]]
    resident: PyTree
    feed: Feed
    capacity: int


@dataclass(frozen=True, kw_only=True)
class PredictPlan:
    """What the loop drives, assembled once by the trainer."""

    loaders: Sequence[PredictLoader]
    hooks: CallbackList


def predict(
    run: Run, plan: PredictPlan, params: PyTree, model_state: PyTree
) -> Iterator[tuple[str | None, PyTree]]:
    """Yield the predictions of each batch, in order, as NumPy arrays, with the loader's name."""
    hooks = plan.hooks
    run.stage, run.eval_batch_idx = "predict", 0
    run.num_eval_batches = num_batches_of([loader.feed for loader in plan.loaders])
    hooks.on_predict_start(run)
    hooks.on_predict_epoch_start(run)
    for loader in plan.loaders:
        run.loader_name = loader.name
        for predictions in _predict_loader(run, hooks, loader, (params, model_state)):
            yield loader.name, predictions
    run.loader_name = None
    hooks.on_predict_epoch_end(run)
    hooks.on_predict_end(run)


def _predict_loader(
    run: Run, hooks: CallbackList, loader: PredictLoader, variables: tuple[PyTree, PyTree]
) -> Iterator[PyTree]:
    feed = loader.feed.again().start(loader.capacity)
    waiting: deque[tuple[PyTree, BatchView, int]] = deque()
    dispatched = 0
    try:
        for chunk in feed:
            step = loader.step_for(chunk)
            for i in range(chunk.size):
                batch = BatchView(chunk, loader.resident, i)
                if hooks.has("on_predict_batch_start"):
                    hooks.on_predict_batch_start(run, batch.get(), dispatched)
                out = step(*variables, loader.resident, chunk.tree, np.int32(i))
                waiting.append((out, batch, dispatched))
                dispatched += 1
                if len(waiting) > _AHEAD:
                    yield _fetch(run, hooks, *waiting.popleft())
            feed.dispatched(jax.tree.leaves(waiting[-1][0])[0])
        while waiting:
            yield _fetch(run, hooks, *waiting.popleft())
    finally:
        feed.close()


def _fetch(
    run: Run, hooks: CallbackList, outputs: PyTree, batch: BatchView, batch_idx: int
) -> PyTree:
    values = jax.tree.map(np.asarray, outputs)
    run.eval_batch_idx += 1
    if hooks.has("on_predict_batch_end"):
        hooks.on_predict_batch_end(run, values, batch.get(), batch_idx)
    return values
