"""The evaluation loop of validation and test. Imports no concrete callback, store or step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxtrainer.feed import Chunk, Feed
from jaxtrainer.hooks import CallbackList
from jaxtrainer.loops.views import BatchView
from jaxtrainer.metrics import LoggedOutputs, MetricSpec, Totals
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree, Stage

HOOK_NAMES: dict[str, str] = {"validate": "validation", "test": "test"}


class EvalStep(Protocol):
    """The compiled evaluation step.

    Attributes:
        capacity: Batches a chunk holds.
        fused: Whether a call runs several.
        specs: What the step logs, by the names it uses.
    """

    capacity: int
    fused: bool

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """See the class."""
        ...

    def for_chunk(self, chunk: Chunk) -> Callable[..., Any]:
        """Return the program for chunks of that shape; it compiles on first use."""
        ...

    def control(self, chunk: Chunk) -> np.ndarray:
        """Return an empty control vector for it."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvalLoader:
    """One loader of an evaluation.

    Attributes:
        name: Its name, where several were given by name.
        step: What runs its batches.
        totals: Meaning of its metrics, by the names of its series.
        resident: Data on the device, or None.
        feed: Opened feed; each pass reads a fresh copy.
    """

    name: str | None
    step: EvalStep
    totals: Totals
    resident: PyTree
    feed: Feed


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """What the loop drives, assembled once by the trainer."""

    stage: Stage
    loaders: Sequence[EvalLoader]
    hooks: CallbackList

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """Return the series of all loaders."""
        return tuple(spec for loader in self.loaders for spec in loader.totals.specs)

    def fuse(self, fused: bool) -> None:
        """Run several batches a dispatch, or one."""
        for loader in self.loaders:
            loader.step.fused = fused and loader.step.capacity > 1


def evaluate(
    run: Run, plan: EvalPlan, params: PyTree, model_state: PyTree, *, limit: int | None = None
) -> dict[str, float]:
    """Run one pass over each loader and return the exact means of what its steps logged.

    A signal that stops the run ends the pass too; it then reports nothing and returns `{}`.

    Args:
        run: The record; its `metrics` get the values too.
        plan: What to run.
        params: Parameters on the device.
        model_state: The model's other variables on the device.
        limit: At most this many batches of each (the sanity check).
    """
    run.stage = "sanity" if limit is not None else plan.stage
    feeds = [loader.feed.again(limit) for loader in plan.loaders]
    run.eval_batch_idx, run.num_eval_batches = 0, num_batches_of(feeds)
    one_pass = _Pass(run, plan, (params, model_state))
    one_pass.hook("start")(run)
    one_pass.hook("epoch_start")(run)
    sums: list[Any] = []
    for loader, feed in zip(plan.loaders, feeds, strict=True):
        run.loader_name = loader.name
        sums.append(one_pass.over(loader, feed))
        run.loader_name = None
        if run.stop_reason == "interrupted":
            # A part of the data has no exact mean: nothing is reported.
            return {}
    metrics: dict[str, float] = {}
    for loader, on_device in zip(plan.loaders, sums, strict=True):
        totals = np.asarray(on_device)
        metrics |= loader.totals.compute(totals)
        run.record_arrays(loader.totals.arrays(totals))
    run.record("epoch", metrics)
    if run.stage == "validate":
        run.note_validated()
    one_pass.hook("epoch_end")(run)
    one_pass.hook("end")(run)
    return metrics


def num_batches_of(feeds: Sequence[Feed]) -> int | None:
    """Return the batches of all feeds together; None if one does not know."""
    known = [feed.num_batches for feed in feeds if feed.num_batches is not None]
    return sum(known) if len(known) == len(feeds) else None


class _Pass:
    """One pass of an evaluation: what all its loaders have in common."""

    def __init__(self, run: Run, plan: EvalPlan, variables: tuple[PyTree, PyTree]) -> None:
        self.run = run
        self.variables = variables
        self.prefix = f"on_{HOOK_NAMES[plan.stage]}"
        self.hooks = plan.hooks
        self.starts = plan.hooks.has(f"{self.prefix}_batch_start")
        self.ends = plan.hooks.has(f"{self.prefix}_batch_end")

    def hook(self, suffix: str) -> Callable[..., Any]:
        return getattr(self.hooks, f"{self.prefix}_{suffix}")

    def over(self, loader: EvalLoader, feed: Feed) -> Any:
        """Return the totals over the loader's batches, still on the device."""
        totals: Any = loader.totals.initial()
        done = 0
        try:
            for chunk in feed.start(loader.step.capacity):
                totals = self._run_chunk(loader, feed, chunk, totals, done)
                done += chunk.size
                self.run.settle()
                if self.run.stop_reason == "interrupted":
                    break
        finally:
            feed.close()
        return totals

    def _run_chunk(
        self, loader: EvalLoader, feed: Feed, chunk: Chunk, totals: Any, batch_idx: int
    ) -> Any:
        run, resident = self.run, loader.resident
        step = loader.step.for_chunk(chunk)
        # What is cut short comes alone.
        fused = loader.step.fused and chunk.capacity > 1
        count = chunk.size if fused and not self.starts else 1
        for start in range(0, chunk.size, count):
            if self.starts:
                batch = BatchView(chunk, resident, start).get()
                self.hook("batch_start")(run, batch, batch_idx + start)
            stop = min(start + count, chunk.size)
            control = loader.step.control(chunk)
            control[:2] = start, stop
            totals, rows = step(*self.variables, totals, resident, chunk.tree, control)
            feed.dispatched(rows)
            run.eval_batch_idx += stop - start
            for i in range(start, stop if self.ends else start):
                outputs = LoggedOutputs(loader.step.specs, rows, i if fused else 0)
                batch = BatchView(chunk, resident, i).get()
                self.hook("batch_end")(run, outputs, batch, batch_idx + i)
        return totals
