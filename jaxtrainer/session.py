"""`Session`: one call of the trainer: its record, hooks, feeds, checkpoint and clean end.

What the loops drive is put together by `assemble.py`, from a session.
"""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax

from jaxtrainer import distributed
from jaxtrainer.agreement import Agreement
from jaxtrainer.alike import check_alike
from jaxtrainer.averaging import average_spec, narrowed, overlaid
from jaxtrainer.cache import COUNTS, use_compilation_cache
from jaxtrainer.callback import HOOKS, Callback
from jaxtrainer.checkpoint import read_record
from jaxtrainer.chunks import ReadOptions
from jaxtrainer.data import IndexedSource, MapSource, Source, first_batches, open_source
from jaxtrainer.datamodule import DataHooks, DataModule, Loaders
from jaxtrainer.dispatch import Dispatch
from jaxtrainer.feed import Feed
from jaxtrainer.hooks import CallbackList
from jaxtrainer.interrupts import Interrupts
from jaxtrainer.layout import Layout
from jaxtrainer.loaders import refuse_several
from jaxtrainer.memory import is_out_of_memory
from jaxtrainer.module import TrainModule, thaw
from jaxtrainer.options import Options, accumulation_of, batch_limit
from jaxtrainer.peers import peers_of
from jaxtrainer.position import check_data, record_of, resume
from jaxtrainer.programs import Initializer, layout_of, shardings
from jaxtrainer.rows import of_this_process
from jaxtrainer.run import Run
from jaxtrainer.sharding import build_mesh, check_batch_size
from jaxtrainer.store import Snapshot
from jaxtrainer.types import PyTree, Stage
from jaxtrainer.waiting import Patience
from jaxtrainer.weights import restore_variables

_OPTION = {"train": "train", "validate": "val", "test": "test", "predict": "predict"}


class Session:
    """One call of `fit`, `validate`, `test` or `predict`, as a context manager.

    Args:
        options: The trainer's.
        callbacks: The trainer's.
        module: The user's.
        stage: Which call it is.
        path: Step directory of the checkpoint to restore, if any.
        loaders: Where its loaders come from; None for a plan, which reads no data.

    Attributes:
        run: The host's record.
        hooks: The overridden hooks of callbacks and module.
        mesh: The devices.
        record: The JSON record of the checkpoint, if any.
        advise: Says what would take less memory, once the training step is traced.
    """

    def __init__(
        self,
        options: Options,
        callbacks: Sequence[Callback],
        module: TrainModule,
        stage: Literal["fit", "tune", "validate", "test", "predict"],
        path: Path | None,
        loaders: Loaders | None = None,
    ) -> None:
        self.options = options
        self.module = module
        self.path = path
        self.loaders = loaders
        datamodule = None if loaders is None else loaders.datamodule
        # What tunes does so on the data of a fit.
        data_stage = "fit" if stage == "tune" else stage
        self.data = None if datamodule is None else DataHooks(datamodule, data_stage)
        self.run = Run(limits=options.limits, clock=options.clock, stage=stage)
        self.run.precision = options.precision.name
        self.run.matmul_precision = options.matmul_precision
        data = () if self.data is None else (self.data,)
        self.hooks = CallbackList((*data, *callbacks), module)
        self.mesh = build_mesh(options.mesh)
        self.record = read_record(path) if path is not None else None
        self.interrupts = Interrupts(self.run)
        teardown = functools.partial(self.hooks.teardown, self.run)
        self.peers = peers_of(self.run, teardown, options.peer_timeout_s, options.log_every_n_steps)
        self._patience = Patience(
            options.data_timeout_s, lambda: self.run.stop_reason == "interrupted"
        )
        self._feeds: list[Feed] = []
        self._is_fit = stage in ("fit", "tune")
        self._few: tuple[Source | IndexedSource, int | None] | None = None
        self._init: Initializer | None = None
        self.advise: Callable[[], Sequence[str]] | None = None
        if self.record is not None and stage == "fit":
            resume(self.run, self.record)
        self.run.follow(accumulation_of(options.accumulate, self.hooks.accumulations))
        if options.cache_dir is not None and not use_compilation_cache(options.cache_dir):
            self.run.notice(f"no cache of compiled programs: {options.cache_dir} is not writable")

    def __enter__(self) -> Session:
        try:
            self.interrupts.__enter__()
            self.peers.start()
            if self.run.stage == "fit" and distributed.is_initialized():
                self.run.agreement = Agreement()
            thaw(self.module)
            self.module.run = self.run
            if self.loaders is not None:
                self.loaders.prepare()
            self.hooks.setup(self.run)
            self._load_user_data()
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
        failure = None if isinstance(error, GeneratorExit) else error
        try:
            self.peers.fail(failure)
            # Last in, first out; each runs also when the one before it fails.
            with ExitStack() as cleanup:
                cleanup.callback(self.peers.close, failure)
                cleanup.callback(self.interrupts.__exit__, kind, error, trace)
                if self.run.agreement is not None:
                    cleanup.callback(self.run.agreement.close, is_clean=failure is None)
                cleanup.callback(self.peers.teardown)
                cleanup.callback(self._keep_model)
                if failure is not None:
                    cleanup.callback(self._tell, failure)
                cleanup.callback(thaw, self.module)
                cleanup.callback(self._leave_loaders)
                for feed in self._feeds:
                    cleanup.callback(feed.close)
        except BaseException as other:
            if failure is None:
                raise
            # What ended the run is the one to be seen.
            failure.add_note(f"and then {type(other).__name__} while ending the run: {other}")

    @property
    def initializer(self) -> Initializer:
        """Return the traced model; the first use traces it."""
        if self._init is None:
            self._init = Initializer(self.module, self.options.seed, self.options.precision)
        return self._init

    @functools.cached_property
    def layout(self) -> Layout:
        """Return where parameters, and what follows them, live."""
        return layout_of(self.initializer, self.options, self.mesh)

    @property
    def variables(self) -> tuple[PyTree, PyTree]:
        """Return `(params, model_state)` for an evaluation, on the device."""
        init = self.initializer
        specs = self.layout.of_variables(init.params, init.model_state)
        if self.path is not None:
            return restore_variables(self.path, self.layout, specs)
        given = init.given
        if given is None:
            self.run.notice("the module was not trained, and no ckpt_path is given: fresh weights")
            make = jax.jit(init.make_model, out_shardings=shardings(specs))
            given = init.given = make(init.seed)
        return self.layout.place(given)

    @property
    def variable_specs(self) -> tuple[PyTree, PyTree]:
        """Return the specs of `(params, model_state)` as evaluations get them."""
        init = self.initializer
        params, model_state = self.layout.of_variables(init.params, init.model_state)
        averaging = self.hooks.averaging(self.run) if self.run.stage == "fit" else None
        if averaging is None:
            return params, model_state
        averaged = average_spec(params, model_state, use_buffers=averaging.use_buffers)
        return overlaid(averaged, params, model_state)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Return what XLA is told for the steps."""
        return self.options.compiler_options | self.layout.compiler_options()

    def feed(self, loader: Any, stage: Stage, name: str | None = None) -> Feed:
        """Open a loader for evaluation or prediction; `name` is its name, if it has one."""
        # What is left out of training is no part of the batches to overfit either.
        return self._open(loader, stage, keep_ragged=not self.is_overfitting(stage), name=name)

    def is_overfitting(self, stage: Stage) -> bool:
        """Return whether the stage reads the few batches that are trained on, in `fit`."""
        return self.options.overfit is not None and self._is_fit and stage in ("train", "validate")

    def train_feed(self, loader: Any, *, endless: bool = False) -> Feed:
        """Open the training loader where the run is, and take its sizes into the run.

        Args:
            loader: The loader.
            endless: Begin again after the last epoch, too.
        """
        refuse_several(loader)
        run = self.run
        last = run.limits.max_epochs
        epochs: Iterable[int] = itertools.count(run.epoch)
        if last is not None and not endless:
            epochs = range(run.epoch, max(last, run.epoch + 1))
        if self.options.overfit is not None:
            # Each epoch reads the order of the first.
            epochs = (0 for _ in epochs)
        position = {"epochs": epochs, "start": run.batch_idx, "state": run.loader_state}
        feed = self._open(loader, "train", keep_ragged=False, **position)
        check_batch_size(self.mesh, feed.rows)
        run.batch_size = feed.rows
        run.num_batches = feed.num_batches
        self._check_data(feed)
        return feed

    def close(self, feed: Feed) -> None:
        """Close a feed before the end of the call, as if it had not been opened."""
        feed.close()
        self._feeds.remove(feed)

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

    def loader(self, stage: Stage) -> Any:
        """Return the loader for a stage, or None; a hook is asked for it."""
        return None if self.loaders is None else self.loaders.get(stage)

    def load_callbacks(self) -> None:
        """Give the callbacks their state from the checkpoint, if there is one."""
        if self.record is not None:
            self.hooks.load_state_dict(self.record["callbacks"])

    def capture(self, dispatch: Dispatch) -> Snapshot:
        """Return everything that decides the next number."""
        record = record_of(self.run, self.hooks, self._feeds[0], dispatch)
        return Snapshot(state=self.run.state, record=record)

    def _open(self, loader: Any, stage: Stage, *, name: str | None = None, **how: Any) -> Feed:
        label = stage if name is None else f"{stage} {name!r}"
        make = functools.partial(self._feed_of, loader, stage, label, **how)
        self._feeds.append(check_alike(label, make, self._patience.limit_s))
        return self._feeds[-1]

    def _feed_of(
        self, loader: Any, stage: Stage, label: str, *, keep_ragged: bool, **at: Any
    ) -> Feed:
        source, limit = self._overfitted(loader) if self.is_overfitting(stage) else (None, None)
        if source is None:
            source = open_source(loader, label)
            option = f"limit_{_OPTION[stage]}_batches"
            limit = batch_limit(option, self.options.batch_limits[stage], source.num_batches)
        if isinstance(source, MapSource) and source.num_batches is None:
            # Of an endless dataset each epoch takes the batches that follow those of the last.
            source.num_batches = limit
        most = self.options.max_recompiles
        options = ReadOptions(
            stage=label, limit=limit, keep_ragged=keep_ragged, max_recompiles=most
        )
        if stage == "train":
            saved = (self.record or {}).get("data", {}).get("shapes", ())
            check_rows = functools.partial(check_batch_size, self.mesh)
            options = replace(options, shapes=saved, check_rows=check_rows)
        return Feed(source, options, self.mesh, patience=self._patience, tell=self.run.notice, **at)

    def _overfitted(self, loader: Any) -> tuple[Source | IndexedSource, int | None]:
        """Return the training batches of `overfit_batches`, the same for every reader of them."""
        if self._few is None:
            source = open_source(loader, "train")
            limit = batch_limit("overfit_batches", self.options.overfit, source.num_batches)
            self._few = first_batches(source, limit), limit
        return self._few

    def _check_data(self, feed: Feed) -> None:
        if feed.ragged_rows:
            self.run.notice(
                f"the last {feed.ragged_rows} samples of each epoch make no whole batch and are "
                "left out of training (a shuffled loader leaves out others each time)"
            )
        if self.record is not None:
            check_data(self.record, feed, self.path)

    def _load_user_data(self) -> None:
        """Hand out what hooks have saved, before any of it is needed or read by a trace."""
        if self.record is not None:
            if self.data is not None:
                self.data.restore(self.record["callbacks"])
            self.hooks.on_load_checkpoint(self.run, self.record["user"])

    def _tell(self, error: BaseException) -> None:
        run, hook = self.run, _hook_of(error)
        at = f"{hook}, " if hook else ""
        error.add_note(f"in {at}{run.stage}, epoch {run.epoch}, step {run.global_step}")
        if self.advise is not None and is_out_of_memory(error):
            for note in self.advise():
                error.add_note(note)
        try:
            self.hooks.on_exception(run, error)
        finally:
            if self.data is not None:
                self.data.datamodule.on_exception(error)

    def _leave_loaders(self) -> None:
        if any(feed.is_stuck for feed in self._feeds):
            self._patience.abandon()

    def _keep_model(self) -> None:
        # It holds the traced step and its program.
        self.run.make_plan = self.run.examine = None
        state = self.run.state
        if state is None or self._init is None:
            return
        trained = state.params, state.model_state
        variables = narrowed(overlaid(state.averaged, *trained), trained)
        # What is whole here can be used here, without the other processes.
        variables = jax.tree.map(of_this_process, variables)
        self.module.model = self._init.adapter.merge(*variables, training=False)
        self.run.state = None


def _hook_of(error: BaseException) -> str:
    """Return which hook of the user's an exception came from, or an empty string."""
    found, names = "", {*HOOKS, *vars(DataModule)}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner, name = frame.f_locals.get("self"), frame.f_code.co_name
        if name in names and isinstance(owner, Callback | TrainModule | DataModule):
            found = f"{type(owner).__name__}.{name}"
    return found
