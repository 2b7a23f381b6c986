"""A few steps trained twice, and every array of the two states compared.

Behind `Trainer.verify_resume` and `Trainer.verify_determinism`. Runs on copies of module and
callbacks, and saves in a temporary directory. May import everything but the trainer.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrainer.assemble import fit_plan
from jaxtrainer.callback import Callback
from jaxtrainer.callbacks.checkpoint import Checkpoint
from jaxtrainer.callbacks.model_summary import ModelSummary
from jaxtrainer.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from jaxtrainer.callbacks.prediction_writer import PredictionWriter
from jaxtrainer.callbacks.profiler import Profiler
from jaxtrainer.callbacks.progress_bar import ProgressBar
from jaxtrainer.callbacks.report import Report
from jaxtrainer.callbacks.timer import Timer
from jaxtrainer.checkpoint import find_checkpoint
from jaxtrainer.datamodule import DataModule, Loaders
from jaxtrainer.errors import ConfigError, DataError
from jaxtrainer.hooks import tunes
from jaxtrainer.lineup import Lineup
from jaxtrainer.loops.fit import fit
from jaxtrainer.module import TrainModule
from jaxtrainer.options import Options, check_count
from jaxtrainer.run import Run
from jaxtrainer.session import Session
from jaxtrainer.types import PyTree

_LEFT_OUT = (
    *(Checkpoint, OnExceptionCheckpoint, PredictionWriter, Profiler),
    *(ModelSummary, ProgressBar, Report, Timer),
)
"""Callbacks that write or show something, or end a run by the clock."""

_SHOWN = 8
_NONE = np.zeros(0, np.bool_)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An array that differs between the two runs.

    Attributes:
        name: Its path in the state.
        count: Values that differ, bit by bit; all where the shapes differ.
        size: Values in it.
        largest: Largest absolute difference; NaN where there is none to take.
    """

    name: str
    count: int
    size: int
    largest: float

    def __str__(self) -> str:
        return f"{self.name}: {self.count} of {self.size} values, by at most {self.largest:.3g}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the comparison of two runs of the same program found.

    Attributes:
        steps: Optimiser updates that each of them made.
        at: After how many the second one was interrupted and resumed; empty if it was not.
        num_arrays: Arrays that were compared.
        differences: Those that differ.
        digest: Digest of all arrays at the end of the first run.
    """

    steps: int
    at: tuple[int, ...]
    num_arrays: int
    differences: tuple[Difference, ...]
    digest: str

    @property
    def is_equal(self) -> bool:
        """Whether every array has the same bytes."""
        return not self.differences

    def __str__(self) -> str:
        how = f"resumed after {', '.join(map(str, self.at))}" if self.at else "run twice"
        head = f"{self.steps} steps, {how}: "
        if self.is_equal:
            return f"{head}all {self.num_arrays} arrays are equal, digest {self.digest[:16]}"
        shown = [f"  {d}" for d in self.differences[:_SHOWN]]
        if rest := len(self.differences) - _SHOWN:
            shown += [f"  and {rest} more"] if rest > 0 else []
        hint = (
            "Often it is a loader that gives other batches when it is read again, a callback that "
            "keeps its state in no `state_dict`, or a number drawn outside `rngs` and `make_rng`."
        )
        count = f"{len(self.differences)} of {self.num_arrays} arrays differ"
        return "\n".join([head + count, *shown, hint])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What one run is made of. Fields as the trainer has them."""

    options: Options
    lineup: Lineup
    module: TrainModule
    loaders: Loaders


def copies_of(
    options: Options,
    lineup: Lineup,
    module: TrainModule,
    datamodule: DataModule | None,
    loaders: Mapping[str, Any],
) -> Callable[[], Subject]:
    """Return what makes the subject of one run after the other, from copies each time."""

    def make() -> Subject:
        # What `fit` replaces, and does not write into.
        shared: dict[int, Any] = {id(kept): kept for kept in (module.model, module.run)}
        own = _copied(module, shared)
        callbacks = copy.copy(lineup)
        callbacks.callbacks = [_copied(c, shared) for c in lineup.callbacks]
        data = copy.copy(datamodule)
        sources = Loaders("fit", own, data, **loaders)
        return Subject(options=options, lineup=callbacks, module=own, loaders=sources)

    return make


def compare_runs(
    make: Callable[[], Subject], *, steps: int, at: int | Sequence[int] | None
) -> Verification:
    """Train without and with interruptions, and compare.

    Args:
        make: Gives what a run is made of; called for each run.
        steps: Optimiser updates at most.
        at: After how many to interrupt; none: train twice. None: after a third.

    Raises:
        ConfigError: If a run has fewer steps than that.
        DataError: If the loader can be read only once.
    """
    check_count("steps", steps)
    whole = _train(make(), _Stop(steps))
    stops = _checked_stops(at, whole.steps)
    # Two measurements may choose two programs, which differ in the last bits.
    pinned: dict[str, Any] = {"steps_per_dispatch": whole.steps_per_dispatch}
    with tempfile.TemporaryDirectory(prefix="jaxtrainer-verify-") as name:
        folder, path = Path(name), None
        for stop in stops:
            _train(make(), _StopWithin(stop), path, saves=folder, **pinned)
            path = find_checkpoint(folder)
        second = _train(make(), _Stop(steps), path, **pinned)
    return Verification(
        steps=whole.steps,
        at=stops,
        num_arrays=len(whole.arrays),
        differences=tuple(_differences(whole.arrays, second.arrays)),
        digest=digest(whole.arrays),
    )


def host_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """Return a host copy of every array by its path; of keys, their words."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): _host(leaf) for p, leaf in flat}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return one SHA-256 over names, dtypes, shapes and bytes, in hexadecimal."""
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _End:
    """The end of a run: its state, its steps, and how its program was dispatched."""

    arrays: dict[str, np.ndarray]
    steps: int
    steps_per_dispatch: int


class _Stop(Callback):
    """Ends the run after some updates, as Ctrl-C would."""

    may_log = False

    def __init__(self, step: int) -> None:
        self.step = step
        self.at_train_steps = (step,)

    def on_train_start(self, run: Run) -> None:
        # The batch that follows a window may end the epoch, and so make the last update.
        if run.global_step >= self.step:
            run.stop("interrupted")

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.global_step >= self.step:
            run.stop("interrupted")


class _StopWithin(_Stop):
    """The same, and where batches are accumulated one batch into the window that follows."""

    def on_train_batch_start(self, run: Run, batch: Any, batch_idx: int) -> None:
        """Ask for control between any two batches."""

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.accumulate == 1 or run.batch_idx % run.accumulate:
            super().on_train_batch_end(run, outputs, batch, batch_idx)


def _train(
    subject: Subject,
    stop: _Stop,
    path: Path | None = None,
    saves: Path | None = None,
    **pinned: Any,
) -> _End:
    """Train until `stop` ends it: from a checkpoint, if any, and saving one, if asked to."""
    callbacks = subject.lineup.for_module(subject.module)
    kept = [c for c in callbacks if not (isinstance(c, _LEFT_OUT) or tunes(c))]
    if saves is not None:
        # Where it is interrupted, and nowhere else.
        kept.append(Checkpoint(saves, every_n_train_steps=sys.maxsize))
    limits = replace(subject.options.limits, max_time_s=None, min_epochs=0, min_steps=0)
    options = replace(subject.options, limits=limits, **pinned)
    session = Session(options, [*kept, stop], subject.module, "fit", path, subject.loaders)
    with session:
        plan = fit_plan(session, *_loaders(session))
        fit(session.run, plan)
        session.hooks.on_fit_end(session.run)
        arrays = host_arrays(session.run.state)
    if session.interrupts.received is not None:
        raise KeyboardInterrupt
    steps_per_dispatch = plan.feed.capacity if plan.fused else 1
    return _End(arrays=arrays, steps=session.run.global_step, steps_per_dispatch=steps_per_dispatch)


def _loaders(session: Session) -> tuple[Any, Any]:
    validates = session.options.batch_limits["validate"] != 0
    loaders = session.loader("train"), session.loader("validate") if validates else None
    for loader in loaders:
        if isinstance(loader, Iterator):
            raise DataError(
                f"the loader is a {type(loader).__name__}, which can be read once only, and each "
                "run reads it anew. Pass something that makes a new iterator each time: a list, a "
                "Grain dataset, or an object with `__iter__`."
            )
    return loaders


def _checked_stops(at: int | Sequence[int] | None, reached: int) -> tuple[int, ...]:
    stops = (max(1, reached // 3),) if at is None else (at,) if isinstance(at, int) else tuple(at)
    if not all(0 < a < b for a, b in itertools.pairwise([*stops, reached])):
        raise ConfigError(
            f"at={at!r}: expected rising numbers of steps, from 1 to below {reached}, where the "
            "run ends; pass e.g. `steps=20, at=6`, and limits of the trainer that allow as many."
        )
    return stops


def _host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not leaf.is_fully_addressable:
        # Of an array over several processes, the part that this one has.
        return np.stack([np.array(shard.data) for shard in leaf.addressable_shards])
    return np.array(leaf)


def _differences(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> Iterator[Difference]:
    for name in {**first, **second}:
        a, b = first.get(name, _NONE), second.get(name, _NONE)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            size = max(a.size, b.size)
            yield Difference(name=name, count=size, size=size, largest=math.nan)
        elif count := _count_differing(a, b):
            # Infinities and NaN of both have no difference.
            with np.errstate(invalid="ignore"):
                gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
            largest = float(np.nanmax(gap)) if not np.isnan(gap).all() else math.nan
            yield Difference(name=name, count=count, size=a.size, largest=largest)


def _count_differing(a: np.ndarray, b: np.ndarray) -> int:
    """Count the values with other bytes, so that -0.0 is not 0.0 and a NaN is itself."""
    rows = (np.frombuffer(x.tobytes(), np.uint8).reshape(-1, x.itemsize) for x in (a, b))
    first, second = rows
    return int((first != second).any(axis=1).sum())


def _copied(thing: Any, shared: dict[int, Any]) -> Any:
    """Return a copy with attributes of its own, as far as they can be copied.

    Arrays are shared: nobody writes into those of a module.
    """
    if thing is None or id(thing) in shared:
        return shared.get(id(thing))
    copied = shared[id(thing)] = copy.copy(thing)
    for name, value in vars(thing).items():
        copied.__dict__[name] = _deep_copied(value, shared)
    return copied


def _deep_copied(value: Any, shared: dict[int, Any]) -> Any:
    if isinstance(value, np.ndarray | jax.Array):
        return value
    try:
        return copy.deepcopy(value, shared)
    except Exception:
        # An open file, a lock, a console: what cannot be copied can be shared.
        return value
