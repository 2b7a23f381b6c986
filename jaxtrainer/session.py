"""`Session`: one call of the trainer: its record, hooks, feeds, checkpoint and clean end.

What the loops drive is put together by `assemble.py`, from a session.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np

from jaxtrainer.cache import COUNTS, use_compilation_cache
from jaxtrainer.callback import Callback, CallbackList
from jaxtrainer.checkpoint import Snapshot, read_record, restore_items
from jaxtrainer.chunks import ReadOptions
from jaxtrainer.data import MapSource, open_source
from jaxtrainer.dispatch import Dispatch
from jaxtrainer.errors import CheckpointMismatchError
from jaxtrainer.feed import Feed
from jaxtrainer.interrupts import Interrupts
from jaxtrainer.module import TrainModule, thaw
from jaxtrainer.options import Options, batch_limit
from jaxtrainer.programs import Initializer
from jaxtrainer.record import base_record
from jaxtrainer.run import Run
from jaxtrainer.sharding import build_mesh, check_batch_size, on_mesh, place, replicated
from jaxtrainer.types import PyTree, Stage

_COUNTERS = ("epoch", "batch_idx", "global_step", "total_batches", "samples")
_OPTION = {"train": "train", "validate": "val", "test": "test", "predict": "predict"}


class Session:
    """One call of `fit`, `validate`, `test` or `predict`, as a context manager.

    Args:
        options: The trainer's.
        callbacks: The trainer's.
        module: The user's.
        stage: Which call it is.
        path: Step directory of the checkpoint to restore, if any.

    Attributes:
        run: The host's record.
        hooks: The overridden hooks of callbacks and module.
        mesh: The devices.
        record: The JSON record of the checkpoint, if any.
    """

    def __init__(
        self,
        options: Options,
        callbacks: Sequence[Callback],
        module: TrainModule,
        stage: Literal["fit", "validate", "test", "predict"],
        path: Path | None,
    ) -> None:
        self.options = options
        self.module = module
        self.path = path
        self.run = Run(limits=options.limits, clock=options.clock, stage=stage)
        self.run.accumulate = options.accumulate
        self.hooks = CallbackList(callbacks, module)
        self.mesh = build_mesh(options.mesh)
        self.record = read_record(path) if path is not None else None
        self.interrupts = Interrupts(self.run)
        self._feeds: list[Feed] = []
        self._init: Initializer | None = None
        if self.record is not None and stage == "fit":
            self._resume(self.record)
        if options.cache_dir is not None and not use_compilation_cache(options.cache_dir):
            self.run.notice(f"no cache of compiled programs: {options.cache_dir} is not writable")

    def __enter__(self) -> Session:
        self.interrupts.__enter__()
        thaw(self.module)
        self.module.run = self.run
        try:
            self.hooks.setup(self.run)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run = self.run
        for feed in self._feeds:
            feed.close()
        thaw(self.module)
        # Last in, first out; each runs also when the one before it fails.
        with ExitStack() as cleanup:
            cleanup.callback(self.interrupts.__exit__, kind, error, trace)
            cleanup.callback(self.hooks.teardown, run)
            cleanup.callback(self._keep_model)
            if error is not None and not isinstance(error, GeneratorExit):
                error.add_note(f"in {run.stage}, epoch {run.epoch}, step {run.global_step}")
                self.hooks.on_exception(run, error)

    @property
    def initializer(self) -> Initializer:
        """Return the traced model; the first use traces it."""
        if self._init is None:
            self._init = Initializer(self.module, self.options.seed, self.options.precision)
        return self._init

    @property
    def variables(self) -> tuple[PyTree, PyTree]:
        """Return `(params, model_state)` for an evaluation, on the device."""
        init, whole = self.initializer, replicated(self.mesh)
        if self.path is not None:
            specs = {"params": init.params, "model_state": init.model_state}
            items = restore_items(self.path, on_mesh(specs, self.mesh))
            return items["params"], items.get("model_state", {})
        given = init.given
        if given is None:
            self.run.notice("the module was not trained, and no ckpt_path is given: fresh weights")
            given = init.given = jax.jit(init.make_model)(init.seed)
        params, model_state = given
        return place(params, whole), place(model_state, whole)

    def feed(self, loader: Any, stage: Stage) -> Feed:
        """Open a loader for evaluation or prediction."""
        return self._open(loader, stage, keep_ragged=True)

    def train_feed(self, loader: Any) -> Feed:
        """Open the training loader where the run is, and take its sizes into the run."""
        run = self.run
        last = run.limits.max_epochs
        epochs: Iterable[int] = itertools.count(run.epoch)
        if last is not None:
            epochs = range(run.epoch, max(last, run.epoch + 1))
        position = {"epochs": epochs, "start": run.batch_idx, "state": run.loader_state}
        feed = self._open(loader, "train", keep_ragged=False, **position)
        check_batch_size(self.mesh, feed.rows)
        run.batch_size = feed.rows
        run.num_batches = feed.num_batches
        self._check_data(feed)
        return feed

    def compile(self, name: str, job: Callable[[], Any]) -> Any:
        """Run a compilation between its hooks, and count its time and the cache's hits."""
        run = self.run
        began, hits, misses = run.clock(), COUNTS.hits, COUNTS.misses
        self.hooks.on_compile_start(run, name)
        with run.timings.phase("compile"):
            compiled = job()
        run.cache_hits += COUNTS.hits - hits
        run.cache_misses += COUNTS.misses - misses
        self.hooks.on_compile_end(run, name, run.clock() - began)
        return compiled

    def load_callbacks(self) -> None:
        """Give the callbacks their state from the checkpoint, if there is one."""
        if self.record is not None:
            self.hooks.load_state_dict(self.record["callbacks"])
            self.hooks.on_load_checkpoint(self.run, self.record["user"])

    def capture(self, dispatch: Dispatch) -> Snapshot:
        """Return everything that decides the next number."""
        run = self.run
        loop = {name: getattr(run, name) for name in _COUNTERS}
        loader_state = run.loader_state
        if run.is_epoch_end:
            loop.update(epoch=run.epoch + 1, batch_idx=0)
            loader_state = None
        user: dict[str, Any] = {}
        self.hooks.on_save_checkpoint(run, user)
        record = {
            **base_record(),
            "loop": {**loop, "elapsed_s": run.elapsed_s},
            "data": {**_data_record(self._feeds[0]), "loader_state": loader_state},
            "program": {
                "fused": dispatch.fused,
                "capacity": dispatch.capacity,
                "steps": dispatch.steps,
            },
            "metrics": run.metrics,
            "callbacks": self.hooks.state_dict(),
            "user": user,
        }
        return Snapshot(state=run.state, record=record)

    def _open(self, loader: Any, stage: Stage, *, keep_ragged: bool, **position: Any) -> Feed:
        source = open_source(loader, stage)
        limit = batch_limit(
            f"limit_{_OPTION[stage]}_batches", self.options.batch_limits[stage], source.num_batches
        )
        if isinstance(source, MapSource) and source.num_batches is None:
            # Of an endless dataset each epoch takes the batches that follow those of the last.
            source.num_batches = limit
        options = ReadOptions(stage=stage, limit=limit, keep_ragged=keep_ragged)
        feed = Feed(source, options, self.mesh, **position)
        self._feeds.append(feed)
        return feed

    def _check_data(self, feed: Feed) -> None:
        if feed.ragged_rows:
            self.run.notice(
                f"the last {feed.ragged_rows} samples of each epoch make no whole batch and are "
                "left out of training (a shuffled loader leaves out others each time)"
            )
        saved = (self.record or {}).get("data", {})
        for name, here in _data_record(feed).items():
            if name in saved and saved[name] != here:
                raise CheckpointMismatchError(
                    f"{self.path} was saved with a training loader of {name}={saved[name]!r}, "
                    f"now it is {here!r}: the position in the data would mean other samples. "
                    "Use the same loader, or start a new run from the checkpoint's weights."
                )

    def _resume(self, record: dict[str, Any]) -> None:
        run, loop = self.run, record["loop"]
        for name in _COUNTERS:
            setattr(run, name, loop[name])
        run.loader_state = record["data"]["loader_state"]
        run.elapsed_before_s = loop["elapsed_s"]
        run.metrics.update(record["metrics"])
        run.resumed_step = run.global_step

    def _keep_model(self) -> None:
        state = self.run.state
        if state is None or self._init is None:
            return
        params, model_state = state.params, state.model_state
        self.module.model = self._init.adapter.merge(params, model_state, training=False)
        self.run.state = None


def _data_record(feed: Feed) -> dict[str, Any]:
    loader = getattr(feed.source, "loader", None)
    names = {"seed": "order_seed", "num_samples": "num_samples"}
    known = {name: getattr(loader, attribute, None) for name, attribute in names.items()}
    # Of a user's loader these may be anything: only numbers say which samples there are.
    numbers = {k: int(v) if isinstance(v, int | np.integer) else None for k, v in known.items()}
    return {"batch_size": feed.rows, **numbers}
