"""A batch that was not finite, run once more: which samples, which line, and a bundle of it.

Runs when training has come to a stand; the guard has kept the state as it was before the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from jaxtrainer import distributed
from jaxtrainer.bundle import write_bundle
from jaxtrainer.data import IndexedSource, as_host_batch, num_rows
from jaxtrainer.errors import DistributedError
from jaxtrainer.feed import Feed
from jaxtrainer.forensics import Finding, first_non_finite, names_of
from jaxtrainer.guard import num_trained
from jaxtrainer.loss_scale import loss_scale
from jaxtrainer.manifest import on_host
from jaxtrainer.module import thaw
from jaxtrainer.programs import named_step
from jaxtrainer.rows import held_rows, place_chunk
from jaxtrainer.session import Session
from jaxtrainer.sharding import batch_sharding, place
from jaxtrainer.update import OptimizerOptions
from jaxtrainer.users_step import StepOptions

_ARGUMENTS = ("params", "model_state", "batch", "rng", "batch_count", "opt_state", "epoch", "scale")
_OUTPUTS = ("gradients", "loss", "model_state", "row", "weights", "weight")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a batch that was not finite.

    Attributes:
        samples: Which samples of the data it has, in words.
        finding: Where its numbers stopped being finite, or None.
        directory: Where the bundle is, or None.
        problem: Why something of it is missing, or an empty string.
    """

    samples: str
    finding: Finding | None = None
    directory: Path | None = None
    problem: str = ""


@dataclass(frozen=True)
class Replay:
    """Runs a batch of a fit once more.

    Attributes:
        session: Of the fit; its state is frozen.
        feed: Of the training loader.
        options: What the step was traced from.
        optimizer: How gradients become updates.
        counts_epochs: Whether the step reads the epoch's index.
    """

    session: Session
    feed: Feed
    options: StepOptions
    optimizer: OptimizerOptions
    counts_epochs: bool

    def examine(self, epoch: int, batch_idx: int, directory: Path | None) -> Evidence:
        """Return the evidence on a batch, and write the bundle; raises nothing.

        Args:
            epoch: Of the batch.
            batch_idx: Its index in the epoch.
            directory: Where to write the bundle; None for none.
        """
        evidence, problem, batch = Evidence(samples=self._samples(epoch, batch_idx)), "", None
        try:
            batch = self._batch(epoch, batch_idx)
        except Exception as error:
            problem = _problem(error)
        # The processes run it together, or not at all.
        problem = next(filter(None, distributed.gather(problem, "replay")), "")
        if problem:
            return replace(evidence, problem=problem)
        try:
            return self._run(evidence, epoch, self._placed(batch), directory)
        except Exception as error:
            # The batch was not finite: that is the error to be seen.
            return replace(evidence, problem=_problem(error))

    def _samples(self, epoch: int, batch_idx: int) -> str:
        if self.feed.shapes is not None:
            return f"batch {batch_idx} of the epoch, as the loader gave it"
        first = batch_idx * self.feed.rows
        if isinstance(self.feed.source, IndexedSource):
            order = self.feed.source.loader.batch_indices(self._epoch_read(epoch))
            rows = np.asarray(order[first : first + self.feed.rows]).tolist()
            return f"samples {', '.join(map(str, rows))} of the arrays"
        last = first + self.feed.rows - 1
        return f"samples {first} to {last} of the epoch, in the order in which the loader gave them"

    def _batch(self, epoch: int, batch_idx: int) -> Any:
        source, epoch = self.feed.source, self._epoch_read(epoch)
        if isinstance(source, IndexedSource):
            first = batch_idx * self.feed.rows
            rows = source.loader.batch_indices(epoch)[first : first + self.feed.rows]
            return as_host_batch(source.gather(rows))
        return as_host_batch(next(source.open(epoch, batch_idx))[0])

    def _placed(self, batch: Any) -> Any:
        mesh, source, rows = self.session.mesh, self.feed.source, num_rows(batch, "the batch")
        if distributed.count() == 1:
            return place(batch, batch_sharding(mesh, rows, stacked=False))
        is_part = getattr(source, "is_partial", False)
        rows = self.feed.rows if is_part else rows
        held = held_rows(mesh, rows)
        parts = jax.tree.map(lambda x: (held.padded(x) if is_part else held.of(x))[None], batch)
        return jax.tree.map(lambda x: x[0], place_chunk(parts, mesh, rows))

    def _epoch_read(self, epoch: int) -> int:
        # With few batches to overfit each epoch reads the first.
        return 0 if self.session.options.overfit is not None else epoch

    def _run(self, evidence: Evidence, epoch: int, batch: Any, directory: Path | None) -> Evidence:
        state = self.session.run.state
        # Frozen at this batch, its count is of batches after it; the key is of this one.
        frozen = int(state.guard["frozen"]) - 1
        state = state._replace(batch_count=np.int32(frozen))
        count = np.int32(num_trained(state))
        index = np.int32(epoch if self.counts_epochs else 0)
        arguments = (
            *(state.params, state.model_state, batch, state.rng, count, state.opt_state),
            *(index, loss_scale(state)),
        )
        closed, shapes = self._traced(arguments)
        inputs = [
            n for a, name in zip(arguments, _ARGUMENTS, strict=True) for n in names_of(a, name)
        ]
        outputs = [n for x, name in zip(shapes, _OUTPUTS, strict=True) for n in names_of(x, name)]
        leaves = jax.tree.leaves(arguments)
        finding = self._find(closed, leaves, inputs, outputs)
        problem = (
            ""
            if finding
            else (
                "run once more, the batch was finite: the loader gives another one there, or "
                "the compiled step rounds otherwise than its operations one by one"
            )
        )
        evidence = replace(evidence, finding=finding, problem=problem)
        if directory is None:
            return evidence
        readme = f"# A batch that was not finite\n\n{evidence.samples}.\n\n{finding or problem}."
        named = [(name, on_host(x)) for name, x in zip(inputs, leaves, strict=True)]
        what = jaxpr_as_fun(closed), named, outputs, readme, str(closed)
        return replace(evidence, directory=_written(directory, what))

    def _traced(self, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        try:
            return named_step(self.options, self.optimizer, arguments)
        finally:
            thaw(self.session.module)

    def _find(
        self, closed: Any, leaves: list[Any], inputs: list[str], outputs: list[str]
    ) -> Finding | None:
        asked = [n if n.split("/")[0] in ("loss", "gradients") else "" for n in outputs]
        order = sorted(range(len(asked)), key=lambda i: asked[i] != "loss")
        jaxpr = closed.jaxpr.replace(outvars=[closed.jaxpr.outvars[i] for i in order])
        names = [asked[i] for i in order]
        return first_non_finite(closed.replace(jaxpr=jaxpr), leaves, inputs, names)


def _problem(error: Exception) -> str:
    return f"the batch could not be run once more: {type(error).__name__}: {error}"


def _written(directory: Path, what: tuple[Any, ...]) -> Path:
    """Write the bundle, process 0 for all; return where it is."""
    told, failed = ["", ""], None
    if distributed.is_first():
        try:
            directory = _unused(directory)
            write_bundle(directory, *what)
            told = [str(directory), ""]
        except Exception as error:
            told, failed = ["", f"{type(error).__name__}: {error}"], error
    path, problem = distributed.broadcast(told, "replay")
    if problem:
        raise failed or DistributedError(f"process 0: {problem}")
    return Path(path)


def _unused(directory: Path) -> Path:
    number, free = 1, directory
    while free.exists():
        number += 1
        free = directory.with_name(f"{directory.name}-{number}")
    return free
