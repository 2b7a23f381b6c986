"""From a session and loaders to what each loop drives: traced, compiled, restored, placed.

Everything here happens once a call, before its loop starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxtrainer.checkpoint import check_state, restore_state
from jaxtrainer.data import as_host_batch, device_transform_of, num_rows, spec_of
from jaxtrainer.dispatch import Dispatch, DispatchChoice, chunk_capacity
from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.feed import Feed, FeedSpec
from jaxtrainer.loops.control import Controls
from jaxtrainer.loops.evaluate import EvalPlan, evaluate
from jaxtrainer.loops.fit import FitPlan
from jaxtrainer.loops.predict import PredictPlan
from jaxtrainer.loops.report import Reporter
from jaxtrainer.module import refuse_stale, thaw
from jaxtrainer.optim import parse_optimizer
from jaxtrainer.options import validation_period, when_to_validate
from jaxtrainer.plan import Plan, plan_of
from jaxtrainer.programs import (
    batch_spec,
    chunk_spec,
    control_spec,
    shardings,
    trim_memory,
)
from jaxtrainer.run import Run
from jaxtrainer.session import Session
from jaxtrainer.sharding import on_mesh, place, replicated
from jaxtrainer.state import TrainState
from jaxtrainer.step import (
    Program,
    StepOptions,
    build_eval_step,
    build_predict_step,
    build_train_step,
)
from jaxtrainer.types import PyTree, Stage
from jaxtrainer.update import OptimizerOptions

_EVAL_STEPS = 32
"""Batches of a dispatch of an evaluation, whose duration nothing measures."""


class TracedStep:
    """The training step, traced once, and the specs of all it works on.

    Attributes:
        program: Its fused and single form.
        target: Specs of the state, with shardings.
        init: Jitted function that makes the first state, without metric totals.
        arguments: Specs of the program's arguments.
    """

    def __init__(self, session: Session, spec: FeedSpec, transform: Any, capacity: int) -> None:
        options, init = session.options, session.initializer
        returned = session.module.configure_optimizers()
        optimizer = OptimizerOptions(
            tx=parse_optimizer(returned, type(session.module).__name__),
            accumulate=options.accumulate,
            clip_value=options.clip_value,
            clip_algorithm=options.clip_algorithm,
        )
        make_state, self.init_arguments = init.state_fn(optimizer)
        shapes = jax.eval_shape(make_state, *self.init_arguments)
        without_totals = on_mesh(shapes, session.mesh)
        self.init = jax.jit(make_state, out_shardings=shardings(without_totals))
        step_options = _step_options(session, spec, transform, capacity)
        batch = batch_spec(spec, session.mesh, spec.rows)
        self.program = build_train_step(step_options, optimizer, without_totals, batch)
        self.target = without_totals._replace(totals=_totals_spec(session, self.program))
        self.arguments = (
            self.target,
            spec.resident,
            chunk_spec(spec, session.mesh, spec.rows, capacity),
            control_spec(capacity, session.mesh),
        )
        self._out = (shardings(self.target), replicated(session.mesh))

    def lower(self, fn: Callable[..., Any]) -> Any:
        """Lower a form of the program, with its state donated."""
        return jax.jit(fn, donate_argnums=0, out_shardings=self._out).lower(*self.arguments)


def fit_plan(session: Session, train_loader: Any, val_loader: Any) -> FitPlan:
    """Return what the training loop drives, its state restored or initialised."""
    run, options, hooks = session.run, session.options, session.hooks
    feed = session.train_feed(train_loader)
    capacity = chunk_capacity(options.steps_per_dispatch, feed.spec.fed, run.num_batches)
    if session.record is not None:
        capacity = session.record["program"]["capacity"]
    step = TracedStep(session, feed.spec, device_transform_of(train_loader), capacity)
    totals = step.program.totals
    _check_first_batch(session, "train", feed, step.program)
    evaluation = None if val_loader is None else eval_plan(session, "validate", val_loader)
    _check_monitors(session, step.program, evaluation)
    period = validation_period(options.val_check_interval, run.num_batches)
    if session.path is not None:
        check_state(session.path, step.target)
    dispatch, run.state = _compile_and_init(session, step, feed)
    if evaluation is not None:
        evaluation.fused = dispatch.fused and evaluation.capacity > 1
    session.load_callbacks()
    run.capture = lambda: session.capture(dispatch)
    hooks.on_fit_start(run)
    plan = FitPlan(
        step=dispatch.step,
        totals=totals,
        resident=feed.resident,
        feed=feed.start(dispatch.capacity),
        controls=Controls(dispatch.capacity, lambda x: place(x, replicated(session.mesh))),
        hooks=hooks,
        reporter=Reporter(totals, options.log_every_n_steps, hooks),
        validate=None if evaluation is None else functools.partial(_validate, evaluation),
        should_validate=when_to_validate(period, options.check_val_every_n_epoch),
        val_every_n_batches=None if evaluation is None else period,
        fused=dispatch.fused,
        max_steps=dispatch.steps,
        refuse_stale=functools.partial(refuse_stale, session.module),
    )
    if evaluation is not None and session.record is None:
        _sanity_check(session, evaluation)
    return plan


def eval_plan(session: Session, stage: Stage, loader: Any) -> EvalPlan:
    """Return what the evaluation loop drives; its programs compile on first use."""
    feed, init, mesh = session.feed(loader, stage), session.initializer, session.mesh
    spec, transform = feed.spec, device_transform_of(loader)
    variables = on_mesh((init.params, init.model_state), mesh)
    capacity = chunk_capacity(
        session.options.steps_per_dispatch, spec.fed, feed.num_batches, _EVAL_STEPS
    )

    def build(rows: int) -> Program:
        batches = capacity if rows == feed.rows else 1
        options = _step_options(session, spec, transform, batches)
        batch = batch_spec(spec, mesh, rows)
        return build_eval_step(options, stage, variables[0], variables[1], batch)

    whole = build(feed.rows)
    _check_first_batch(session, stage, feed, whole)

    @functools.cache
    def step_for(rows: int) -> Callable[..., Any]:
        is_whole = rows == feed.rows
        program, batches = (whole, capacity) if is_whole else (build(rows), 1)
        arguments = (
            *variables,
            _totals_spec(session, program),
            spec.resident,
            chunk_spec(spec, mesh, rows, batches),
            control_spec(batches, mesh),
        )
        fn = program.fused if plan.fused and is_whole else program.single
        jitted = jax.jit(fn, donate_argnums=2, out_shardings=replicated(mesh))
        name = f"{stage} step" if is_whole else f"{stage} step for the last {rows} rows"
        return session.compile(name, lambda: jitted.lower(*arguments).compile())

    # On its own an evaluation runs step by step; in `fit` as was measured for training.
    plan = EvalPlan(
        stage=stage,
        step_for=step_for,
        totals=whole.totals,
        resident=feed.resident,
        feed=feed,
        hooks=session.hooks,
        fused=False,
        capacity=capacity,
    )
    return plan


def predict_plan(session: Session, loader: Any, variables: tuple[PyTree, PyTree]) -> PredictPlan:
    """Return what the prediction loop drives."""
    feed, mesh = session.feed(loader, "predict"), session.mesh
    spec, transform = feed.spec, device_transform_of(loader)
    capacity = chunk_capacity("auto", spec.fed, feed.num_batches, _EVAL_STEPS)
    fn = build_predict_step(_step_options(session, spec, transform, capacity))

    @functools.cache
    def step_for(rows: int) -> Callable[..., Any]:
        is_whole = rows == feed.rows
        chunk = chunk_spec(spec, mesh, rows, capacity if is_whole else 1)
        arguments = (*variables, spec.resident, chunk, np.int32(0))
        name = "predict step" if is_whole else f"predict step for the last {rows} rows"
        # Traced before the compilation is announced, so that a bad step is found before it.
        lowered = jax.jit(fn).lower(*arguments)
        return session.compile(name, lowered.compile)

    return PredictPlan(
        step_for=step_for,
        resident=feed.resident,
        feed=feed,
        hooks=session.hooks,
        capacity=capacity,
    )


def step_plan(session: Session, batch: Any) -> Plan:
    """Return what a training step will cost; nothing of the state is allocated.

    Args:
        session: Not entered.
        batch: A loader, or a batch of arrays or of `jax.ShapeDtypeStruct`.
    """
    session.module.run = session.run
    leaves = jax.tree.leaves(batch)
    if leaves and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves):
        shapes = spec_of(batch if hasattr(leaves[0], "sharding") else as_host_batch(batch))
        spec = FeedSpec(batch=shapes, fed=shapes, rows=num_rows(shapes, "the batch"), resident=None)
        transform = None
    else:
        spec = session.train_feed(batch).spec
        spec, transform = replace(spec, fed=spec.batch, resident=None), device_transform_of(batch)
    try:
        step = TracedStep(session, spec, transform, 1)
        compiled = step.lower(step.program.single).compile()
    finally:
        thaw(session.module)
    return plan_of(compiled, step.target, spec.rows, session.mesh.size)


def _compile_and_init(
    session: Session, step: TracedStep, feed: Feed
) -> tuple[Dispatch, TrainState]:
    """Compile the training step and what makes the first state; run that, or restore it."""
    wanted, saved = session.options.steps_per_dispatch, (session.record or {}).get("program")
    cache_dir = session.options.cache_dir
    memory = None if cache_dir is None else cache_dir / "dispatch"

    def compile_step() -> tuple[Dispatch, Any]:
        choice = DispatchChoice(wanted, step.program, step.lower, step.arguments, saved, memory)
        jobs = {name: lowered.compile for name, lowered in choice.lowered.items()}
        if session.path is None:
            lowered = step.init.lower(*step.init_arguments)
            jobs["init"] = functools.partial(lowered.compile, session.initializer.compile_options())
        # One after the other: XLA uses every core for one, and each holds 100 MB while it compiles.
        compiled: dict[str, Any] = {}
        for name, job in jobs.items():
            compiled[name] = job()
            trim_memory()
        make_state = compiled.pop("init", None)
        return choice.decide(compiled, feed), make_state

    dispatch, make_state = session.compile("train step", compile_step)
    if wanted == "auto":
        steps = f"up to {dispatch.steps} steps" if dispatch.fused else "one step"
        session.run.notice(f"{steps} a dispatch ({dispatch.reason})")
    if session.path is not None:
        return dispatch, restore_state(session.path, step.target)
    totals = place(step.program.totals.initial(), replicated(session.mesh))
    return dispatch, make_state(*step.init_arguments)._replace(totals=totals)


def _step_options(session: Session, spec: FeedSpec, transform: Any, capacity: int) -> StepOptions:
    return StepOptions(
        module=session.module,
        adapter=session.initializer.adapter,
        precision=session.options.precision,
        traced=session.hooks.traced,
        transform=transform,
        resident=spec.resident is not None,
        capacity=capacity,
    )


def _totals_spec(session: Session, program: Program) -> jax.ShapeDtypeStruct:
    sharding = replicated(session.mesh)
    return jax.ShapeDtypeStruct(program.totals.shape, np.float32, sharding=sharding)


def _check_first_batch(session: Session, stage: Stage, feed: Feed, program: Program) -> None:
    session.run.prog_bar |= {spec.name for spec in program.specs if spec.prog_bar}
    for check in session.hooks.checks:
        check(stage, feed.first, program.outputs)


def _check_monitors(session: Session, program: Program, evaluation: EvalPlan | None) -> None:
    specs = (*program.specs, *(evaluation.totals.specs if evaluation else ()))
    series = [spec.name for spec in specs]
    for callback in session.hooks.callbacks:
        name = getattr(callback, "monitor", None)
        if name is None or name in series:
            continue
        # A hook of the user's may log it later, so that then only a plain slip is refused.
        same = [s for s in series if s.endswith(f"/{name}") or s == name.replace("_", "/", 1)]
        close = did_you_mean(name, same or series, 0.9 if session.hooks.may_log else 0.5)
        close = close or did_you_mean(name, same, 0.0)
        if close or not session.hooks.may_log:
            raise ConfigError(
                f"{type(callback).__name__} monitors {name!r}, which no step logs; logged: "
                f"{', '.join(series)}.{close}"
            )


def _validate(plan: EvalPlan, run: Run) -> None:
    with run.timings.phase("validate"):
        evaluate(run, plan, run.state.params, run.state.model_state)


def _sanity_check(session: Session, plan: EvalPlan) -> None:
    """Run a few validation batches, so that an error there does not wait for an epoch's end."""
    count, run = session.options.num_sanity_val_steps, session.run
    # What can be read once only is left for the first validation.
    if count and not getattr(plan.feed.source, "is_one_shot", False):
        session.hooks.on_sanity_check_start(run)
        evaluate(run, plan, run.state.params, run.state.model_state, limit=count)
        session.hooks.on_sanity_check_end(run)
