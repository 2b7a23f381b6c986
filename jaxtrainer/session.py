"""`Session`: one call of the trainer, from checked options to what a loop drives.

Traces, compiles, restores and places everything once; guards the call against signals and
exceptions. May import everything below the trainer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np

from jaxtrainer.callback import Callback, CallbackList
from jaxtrainer.checkpoint import (
    Snapshot,
    base_record,
    read_record,
    restore_items,
    restore_state,
)
from jaxtrainer.data import device_transform_of, open_source
from jaxtrainer.dispatch import Dispatch, choose_dispatch, chunk_capacity
from jaxtrainer.errors import CheckpointMismatchError, ConfigError, did_you_mean
from jaxtrainer.feed import Feed, FeedOptions
from jaxtrainer.interrupts import Interrupts
from jaxtrainer.loops.evaluate import EvalPlan, evaluate
from jaxtrainer.loops.fit import FitPlan
from jaxtrainer.loops.predict import PredictPlan
from jaxtrainer.loops.report import Reporter
from jaxtrainer.module import TrainModule, thaw
from jaxtrainer.optim import parse_optimizer
from jaxtrainer.options import Options, batch_limit, validation_period, when_to_validate
from jaxtrainer.programs import (
    Initializer,
    batch_spec,
    chunk_spec,
    control_spec,
    on_mesh,
    use_compilation_cache,
)
from jaxtrainer.run import Run
from jaxtrainer.sharding import build_mesh, check_batch_size, place, replicated
from jaxtrainer.state import TrainState
from jaxtrainer.step import (
    OptimizerOptions,
    Program,
    StepOptions,
    build_eval_step,
    build_predict_step,
    build_train_step,
)
from jaxtrainer.types import PyTree, Stage

RESIDENT_BYTES = 1 << 30
"""Arrays in memory up to this size are put on the device whole."""


class Session:
    """One call of `fit`, `validate`, `test` or `predict`, as a context manager.

    Attributes:
        run: The host's record.
        hooks: The overridden hooks of callbacks and module.
        variables: `(params, model_state)` on the device, for evaluation.
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
        self._eval: EvalPlan | None = None
        if self.record is not None and stage == "fit":
            self._resume(self.record)
        if options.cache_dir is not None:
            use_compilation_cache(options.cache_dir)

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
        try:
            if error is not None and not isinstance(error, GeneratorExit):
                error.add_note(f"in {run.stage}, epoch {run.epoch}, step {run.global_step}")
                self.hooks.on_exception(run, error)
        finally:
            self._keep_model()
            self.hooks.teardown(run)
            self.interrupts.__exit__(kind, error, trace)

    def fit_plan(self, train_loader: Any, val_loader: Any) -> FitPlan:
        """Return what the training loop drives: checked, traced, compiled, placed, started."""
        run, options = self.run, self.options
        feed = self._train_feed(train_loader)
        self._trace_model()
        tx = parse_optimizer(self.module.configure_optimizers(), type(self.module).__name__)
        optimizer = OptimizerOptions(
            tx=tx,
            accumulate=options.accumulate,
            clip_value=options.clip_value,
            clip_algorithm=options.clip_algorithm,
        )
        make_state, arguments = self._initializer.state_fn(optimizer)
        target = on_mesh(jax.eval_shape(make_state, *arguments), self.mesh)
        capacity = chunk_capacity(options.steps_per_dispatch, feed.spec.fed, run.num_batches)
        step_options = self._step_options(train_loader, feed, capacity)

        batch = batch_spec(feed.spec, self.mesh, feed.rows)
        program = build_train_step(step_options, optimizer, target, batch)
        self._check_first_batch("train", feed, program)
        run.prog_bar |= {spec.name for spec in program.specs if spec.prog_bar}
        series = {spec.name for spec in program.specs}
        if val_loader is not None:
            self._eval = self.eval_plan("validate", val_loader)
            series |= {spec.name for spec in self._eval.totals.specs}
        self._check_monitors(series)
        target = target._replace(totals=self._totals_spec(program))
        dispatch = self._compile_step(program, target, feed, capacity)
        run.state = self._initial_state(make_state, arguments, target, dispatch)
        if self._eval is not None:
            self._eval.fused = dispatch.fused and self._eval.capacity > 1
        self._load_callbacks()
        run.capture = lambda: self._capture(dispatch)
        self.hooks.on_fit_start(run)
        period = validation_period(options.val_check_interval, run.num_batches)
        return FitPlan(
            step=dispatch.step,
            totals=program.totals,
            resident=feed.spec.resident,
            feed=feed.start(dispatch.capacity),
            hooks=self.hooks,
            reporter=Reporter(program.totals, options.log_every_n_steps, self.hooks),
            validate=None if self._eval is None else self._validate,
            should_validate=when_to_validate(period, options.check_val_every_n_epoch),
            val_every_n_batches=None if self._eval is None else period,
            fused=dispatch.fused,
        )

    def sanity_check(self, plan: FitPlan) -> None:
        """Run a few validation batches, so that an error there does not wait for an epoch's end."""
        count = self.options.num_sanity_val_steps
        if self._eval is None or count == 0 or self.record is not None:
            return
        run = self.run
        self.hooks.on_sanity_check_start(run)
        evaluate(run, self._eval, run.state.params, run.state.model_state, limit=count)
        self.hooks.on_sanity_check_end(run)

    def eval_plan(self, stage: Stage, loader: Any) -> EvalPlan:
        """Return what the evaluation loop drives; programs compile on first use."""
        feed, limit = self._feed(loader, stage)
        self._trace_model()
        init = self._initializer
        variables = on_mesh((init.params, init.model_state), self.mesh)
        capacity = chunk_capacity(self.options.steps_per_dispatch, feed.spec.fed, limit)
        step_options = self._step_options(loader, feed, capacity)

        def build(rows: int) -> Program:
            mine = step_options if rows == feed.rows else replace(step_options, capacity=1)
            batch = batch_spec(feed.spec, self.mesh, rows)
            return build_eval_step(mine, stage, *variables, batch)

        whole = build(feed.rows)
        self._check_first_batch(stage, feed, whole)
        self.run.prog_bar |= {spec.name for spec in whole.specs if spec.prog_bar}
        compiled: dict[int, Callable[..., Any]] = {}

        def step_for(rows: int) -> Callable[..., Any]:
            if rows not in compiled:
                is_whole = rows == feed.rows
                program = whole if is_whole else build(rows)
                batches = capacity if is_whole else 1
                arguments = (
                    *variables,
                    self._totals_spec(program),
                    _specs(feed.spec.resident),
                    chunk_spec(feed.spec, self.mesh, rows, batches),
                    control_spec(batches),
                )
                fn = program.fused if plan.fused and is_whole else program.single
                name = f"{stage} step" if is_whole else f"{stage} step for the last {rows} rows"
                out = replicated(self.mesh)
                jitted = jax.jit(fn, donate_argnums=2, out_shardings=out)
                compiled[rows] = self._compile(name, lambda: jitted.lower(*arguments).compile())
            return compiled[rows]

        # On its own an evaluation runs step by step; in `fit` as was measured for training.
        plan = EvalPlan(
            stage=stage,
            step_for=step_for,
            totals=whole.totals,
            resident=feed.spec.resident,
            feed=feed,
            hooks=self.hooks,
            num_batches=limit,
            fused=False,
            capacity=capacity,
        )
        return plan

    def predict_plan(self, loader: Any) -> PredictPlan:
        """Return what the prediction loop drives."""
        feed, limit = self._feed(loader, "predict")
        self.run.num_eval_batches = limit
        self._trace_model()
        capacity = chunk_capacity("auto", feed.spec.fed, limit)
        fn = build_predict_step(self._step_options(loader, feed, capacity))
        programs: dict[int, Callable[..., Any]] = {}
        variables = [on_mesh(x, self.mesh) for x in self.variables]

        def step_for(rows: int) -> Callable[..., Any]:
            if rows not in programs:
                count = capacity if rows == feed.rows else 1
                chunk = chunk_spec(feed.spec, self.mesh, rows, count)
                arguments = (*variables, _specs(feed.spec.resident), chunk, np.int32(0))
                programs[rows] = self._compile(
                    "predict step", lambda: jax.jit(fn).lower(*arguments).compile()
                )
            return programs[rows]

        return PredictPlan(
            step_for=step_for,
            resident=feed.spec.resident,
            feed=feed,
            hooks=self.hooks,
            capacity=capacity,
        )

    @property
    def variables(self) -> tuple[PyTree, PyTree]:
        """Return `(params, model_state)` for an evaluation, on the device."""
        init = self._initializer
        target = tuple(on_mesh(x, self.mesh) for x in (init.params, init.model_state))
        if self.path is not None:
            wanted = {"params": target[0], "model_state": target[1]}
            items = restore_items(self.path, wanted)
            return items["params"], items.get("model_state", {})
        if init.given is None:
            self.run.notice("the module was not trained, and no ckpt_path is given: fresh weights")
            init.given = jax.jit(init._model)(init.seed)
        return place(init.given[0], replicated(self.mesh)), place(
            init.given[1], replicated(self.mesh)
        )

    @property
    def _initializer(self) -> Initializer:
        assert self._init is not None
        return self._init

    def _trace_model(self) -> None:
        if self._init is None:
            self._init = Initializer(self.module, self.options.seed)

    def _feed(self, loader: Any, stage: Stage) -> tuple[Feed, int | None]:
        source = open_source(loader, stage)
        limit = batch_limit(
            f"limit_{_OPTION[stage]}_batches", self.options.batch_limits[stage], source.num_batches
        )
        options = FeedOptions(
            stage=stage,
            mesh=self.mesh,
            limit=limit,
            keep_ragged=True,
            resident_bytes=RESIDENT_BYTES,
        )
        feed = Feed(source, options)
        self._feeds.append(feed)
        known = [n for n in (limit, source.num_batches) if n is not None]
        return feed, min(known, default=None)

    def _train_feed(self, loader: Any) -> Feed:
        run = self.run
        source = open_source(loader, "train")
        limit = batch_limit(
            "limit_train_batches", self.options.batch_limits["train"], source.num_batches
        )
        last = run.limits.max_epochs
        epochs: Iterable[int] = itertools.count(run.epoch)
        if last is not None:
            epochs = range(run.epoch, max(last, run.epoch + 1))
        feed = Feed(
            source,
            FeedOptions(
                stage="train", mesh=self.mesh, limit=limit, resident_bytes=RESIDENT_BYTES
            ),
            epochs=epochs,
            start=run.batch_idx,
            state=run.loader_state,
        )
        self._feeds.append(feed)
        check_batch_size(self.mesh, feed.rows)
        run.batch_size = feed.rows
        known = [n for n in (limit, feed.num_whole_batches) if n is not None]
        run.num_batches = min(known, default=None)
        self._check_data(feed)
        return feed

    def _check_data(self, feed: Feed) -> None:
        if feed.ragged_rows:
            self.run.notice(
                f"the last {feed.ragged_rows} samples of each epoch make no whole batch and are "
                "left out of training (a shuffled loader leaves out others each time)"
            )
        saved = (self.record or {}).get("data", {})
        for name, here in self._data_record(feed).items():
            if name in saved and saved[name] != here:
                raise CheckpointMismatchError(
                    f"{self.path} was saved with a training loader of {name}={saved[name]!r}, "
                    f"now it is {here!r}: the position in the data would mean other samples. "
                    "Use the same loader, or start a new run from the checkpoint's weights."
                )

    def _data_record(self, feed: Feed) -> dict[str, Any]:
        loader = getattr(feed.source, "loader", None)
        return {
            "batch_size": feed.rows,
            "seed": getattr(loader, "seed", None),
            "num_samples": getattr(loader, "num_samples", None),
        }

    def _step_options(self, loader: Any, feed: Feed, capacity: int) -> StepOptions:
        return StepOptions(
            module=self.module,
            adapter=self._initializer.adapter,
            precision=self.options.precision,
            traced=self.hooks.traced,
            transform=device_transform_of(loader),
            resident=feed.spec.resident is not None,
            capacity=capacity,
        )

    def _check_first_batch(self, stage: Stage, feed: Feed, program: Program) -> None:
        for check in self.hooks.checks:
            check(stage, feed.first, program.outputs)

    def _check_monitors(self, series: set[str]) -> None:
        for callback in self.hooks.callbacks:
            name = getattr(callback, "monitor", None)
            if name is None or name in series:
                continue
            # A hook may log it later, so that only what looks like a slip is refused here.
            if hint := did_you_mean(name, series):
                raise ConfigError(
                    f"{type(callback).__name__} monitors {name!r}, which no step logs.{hint}"
                )

    def _totals_spec(self, program: Program) -> jax.ShapeDtypeStruct:
        sharding = replicated(self.mesh)
        return jax.ShapeDtypeStruct(program.totals.shape, np.float32, sharding=sharding)

    def _compile(self, name: str, job: Callable[[], Any]) -> Any:
        began = self.run.clock()
        self.hooks.on_compile_start(self.run, name)
        with self.run.timings.phase("compile"):
            compiled = job()
        self.hooks.on_compile_end(self.run, name, self.run.clock() - began)
        return compiled

    def _compile_step(
        self, program: Program, target: TrainState, feed: Feed, capacity: int
    ) -> Dispatch:
        arguments = (
            target,
            _specs(feed.spec.resident),
            chunk_spec(feed.spec, self.mesh, feed.rows, capacity),
            control_spec(capacity),
        )
        out = (jax.tree.map(lambda x: x.sharding, target), replicated(self.mesh))

        def lower(fn: Callable[..., Any]) -> Any:
            return jax.jit(fn, donate_argnums=0, out_shardings=out).lower(*arguments)

        saved = (self.record or {}).get("program")
        return self._compile(
            "train step",
            lambda: choose_dispatch(
                self.options.steps_per_dispatch, program, lower, arguments, saved
            ),
        )

    def _initial_state(
        self, make: Callable[..., TrainState], arguments: tuple, target: TrainState, dispatch: Any
    ) -> TrainState:
        if self.path is not None:
            return restore_state(self.path, target)
        out = jax.tree.map(lambda x: x.sharding, target._replace(totals=None))
        lowered = jax.jit(make, out_shardings=out).lower(*arguments)
        compiled = self._compile(
            "initialisation", lambda: lowered.compile(self._initializer.compile_options())
        )
        totals = np.zeros(target.totals.shape, np.float32)
        return compiled(*arguments)._replace(totals=place(totals, replicated(self.mesh)))

    def _validate(self, run: Run) -> None:
        assert self._eval is not None
        with run.timings.phase("validate"):
            evaluate(run, self._eval, run.state.params, run.state.model_state)

    def _resume(self, record: dict[str, Any]) -> None:
        run, loop = self.run, record["loop"]
        for name in _COUNTERS:
            setattr(run, name, loop[name])
        run.loader_state = record["data"]["loader_state"]
        run.elapsed_before_s = loop["elapsed_s"]
        run.metrics.update(record["metrics"])
        run.resumed_step = run.global_step

    def _load_callbacks(self) -> None:
        if self.record is not None:
            self.hooks.load_state_dict(self.record["callbacks"])
            self.hooks.on_load_checkpoint(self.run, self.record["user"])

    def _capture(self, dispatch: Dispatch) -> Snapshot:
        run = self.run
        loop = {name: getattr(run, name) for name in _COUNTERS}
        state = run.loader_state
        if run.is_epoch_end:
            loop.update(epoch=run.epoch + 1, batch_idx=0)
            state = None
        user: dict[str, Any] = {}
        self.hooks.on_save_checkpoint(run, user)
        record = {
            **base_record(),
            "loop": {**loop, "elapsed_s": run.elapsed_s},
            "data": {**self._data_record(self._feeds[0]), "loader_state": state},
            "program": {"fused": dispatch.fused, "capacity": dispatch.capacity},
            "metrics": run.metrics,
            "callbacks": self.hooks.state_dict(),
            "user": user,
        }
        return Snapshot(state=run.state, record=record)

    def _keep_model(self) -> None:
        state = self.run.state
        if state is None or self._init is None:
            return
        params, model_state = state.params, state.model_state
        self.module.model = self._init.adapter.merge(params, model_state, training=False)
        self.run.state = None


_COUNTERS = ("epoch", "batch_idx", "global_step", "total_batches", "samples")
_OPTION = {"train": "train", "validate": "val", "test": "test", "predict": "predict"}


def _specs(resident: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), resident
    )
