"""From a session and loaders to what each loop drives: traced, compiled, restored, placed.

Everything here happens once a call, before its loop starts.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jaxtrainer.averaging import evaluated
from jaxtrainer.checkpoint import check_state, restore_state
from jaxtrainer.data import as_host_batch, device_transform_of, num_rows, spec_of
from jaxtrainer.dispatch import Dispatch, DispatchChoice, chunk_capacity
from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.evaluation import (
    check_first_batch,
    eval_plan,
    same_series,
    step_options,
    totals_spec,
)
from jaxtrainer.feed import Feed, FeedSpec
from jaxtrainer.flops import ModuleFlops, module_flops
from jaxtrainer.guard import Guard
from jaxtrainer.loaders import loaders_by_name, series_of_loader
from jaxtrainer.loops.controls import Controls
from jaxtrainer.loops.evaluate import EvalPlan, evaluate
from jaxtrainer.loops.fit import FitPlan
from jaxtrainer.loops.report import Reporter
from jaxtrainer.manual import refuse_options
from jaxtrainer.module import refuse_stale, thaw
from jaxtrainer.optim import Optimizer, owners, parse_optimizers, resolve
from jaxtrainer.plan import Plan, plan_of
from jaxtrainer.programs import (
    batch_spec,
    chunk_spec,
    control_spec,
    named_step,
    shardings,
    spec_in_chunk,
    specs_of_chunk,
    trim_memory,
)
from jaxtrainer.replay import Replay
from jaxtrainer.run import Run
from jaxtrainer.session import Session
from jaxtrainer.shapes import ByShape, described
from jaxtrainer.sharding import on_mesh, place, replicated
from jaxtrainer.shortage import Shortage
from jaxtrainer.state import TrainState, flat_items, size_of
from jaxtrainer.step import Program, StepOptions, build_train_step
from jaxtrainer.types import PyTree
from jaxtrainer.update import OptimizerOptions, UpdateHook
from jaxtrainer.validation import build_schedule


class TracedStep:
    """The training step, traced once, and the specs of all it works on.

    Attributes:
        program: Its fused and single form.
        target: Specs of the state, with shardings.
        init: Jitted function that makes the first state, without metric totals.
        arguments: Specs of the program's arguments.
        counts_epochs: Whether an optimiser or averaging starts at an epoch: the step must know it.
        rows: Samples of a batch.
        spec: What the feed hands to it.
        trained: Names of the parameters that an optimiser changes.
        options: What it was traced from.
        optimizer: How gradients become updates.
    """

    def __init__(
        self,
        session: Session,
        spec: FeedSpec,
        transform: Any,
        capacity: int,
        guard: Guard | None = None,
    ) -> None:
        options, init = session.options, session.initializer
        self.rows = spec.rows
        optimizer = OptimizerOptions(
            optimizers=_optimizers(session),
            accumulate=max(session.run.accumulation.values()),
            clip_value=options.clip_value,
            clip_algorithm=options.clip_algorithm,
            hooks=_update_hooks(session),
            is_manual=not session.module.automatic_optimization,
        )
        self.optimizer, self.trained = optimizer, set(owners(optimizer.optimizers))
        if optimizer.is_manual:
            refuse_options(optimizer, type(session.module).__name__)
        averaging = session.hooks.averaging(session.run)
        starts = any(o.start_epoch for o in optimizer.optimizers.values())
        self.counts_epochs = starts or averaging is not None
        make_state, self.init_arguments = init.state_fn(optimizer, averaging, guard)
        shapes = jax.eval_shape(make_state, *self.init_arguments)
        without_totals = on_mesh(shapes, session.mesh)
        self.init = jax.jit(make_state, out_shardings=shardings(without_totals))
        self.options = step_options(session, spec, transform, capacity)
        of_step = self.options, optimizer, without_totals
        self._build = functools.partial(
            build_train_step, *of_step, averaging=averaging, guard=guard
        )
        self.spec = spec
        self._batch = batch_spec(spec, session.mesh, spec.rows)
        self.program = self._build(self._batch)
        self.target = without_totals._replace(totals=totals_spec(session, self.program))
        self.arguments = (
            self.target,
            spec.resident,
            chunk_spec(spec, session.mesh, spec.rows, capacity),
            control_spec(capacity, session.mesh),
        )
        self._jit = functools.partial(
            jax.jit,
            donate_argnums=0,
            out_shardings=(shardings(self.target), replicated(session.mesh)),
            compiler_options=options.compiler_options,
        )

    def plan(self, session: Session, compiled: Any) -> Plan:
        """Return what a step costs, from a compiled form of the program."""
        # Of one step also where `compiled` is fused; nothing is compiled for it.
        flops = (self.lower(self.program.single).cost_analysis() or {}).get("flops", math.nan)
        return plan_of(
            compiled,
            self.target,
            flops=flops,
            batch_size=self.rows,
            num_devices=session.mesh.size,
            frozen=frozenset({name for name, _ in flat_items(self.target.params)} - self.trained),
            modules=session.initializer.adapter.types,
            count_modules=self._counter(session.mesh.size),
        )

    def for_chunk(self, session: Session, chunk: PyTree) -> TracedStep:
        """Return the step for batches of another shape, with the same state and series.

        Args:
            session: As it was made with.
            chunk: A chunk of such batches, on the devices.
        """
        other = copy.copy(self)
        batch = spec_in_chunk(chunk, session.mesh)
        other.rows = num_rows(batch, "the batch")
        other.spec = replace(self.spec, batch=batch, fed=batch, rows=other.rows)
        other._batch = batch
        other.program = self._build(batch)
        same_series(self.program, other.program, "train step")
        state, resident, _, control = self.arguments
        other.arguments = state, resident, specs_of_chunk(chunk), control
        return other

    def _counter(self, num_devices: int) -> Callable[[], dict[str, ModuleFlops]]:
        """Return what counts the operations of each module on a device; it keeps no arrays."""
        state, count = self.target, self.target.batch_count
        of_state = state.params, state.model_state, self._batch, state.rng, count, state.opt_state
        given = self.options, self.optimizer, (*of_state, count)
        return lambda: _flops_by_module(*given, num_devices)

    def lower(self, fn: Callable[..., Any]) -> Any:
        """Lower a form of the program, with its state donated."""
        return self._jit(fn).lower(*self.arguments)


def fit_plan(session: Session, train_loader: Any, val_loader: Any) -> FitPlan:
    """Return what the training loop drives, its state restored or initialised."""
    run, options, hooks = session.run, session.options, session.hooks
    feed = session.train_feed(train_loader)
    capacity = chunk_capacity(
        options.steps_per_dispatch,
        feed.spec.fed,
        run.num_batches,
        is_mixed=feed.shapes is not None,
    )
    if session.record is not None:
        capacity = session.record["program"]["capacity"]
    guard = hooks.guard(run)

    def build(session: Session, spec: FeedSpec, capacity: int = 1) -> TracedStep:
        return TracedStep(session, spec, device_transform_of(train_loader), capacity, guard)

    step = build(session, feed.spec, capacity)
    session.advise = Shortage(session, feed.spec, run.accumulate, build).notes
    run.state_bytes = size_of(step.target)[1]
    totals = step.program.totals
    run.prog_bar |= {spec.name for spec in step.program.specs if spec.prog_bar}
    check_first_batch(session, "train", feed, step.program)
    if options.overfit is not None and val_loader is not None:
        names = loaders_by_name(val_loader, "validate")
        val_loader = train_loader if None in names else dict.fromkeys(names, train_loader)
    evaluation = None if val_loader is None else eval_plan(session, "validate", val_loader)
    _check_monitors(session, step.program, evaluation)
    schedule = build_schedule(
        options.val_check_interval, options.check_val_every_n_epoch, run.num_batches
    )
    if session.path is not None:
        check_state(session.path, step.target)
    dispatch, run.state = _compile_and_init(session, step, feed)
    if evaluation is not None:
        evaluation.fuse(dispatch.fused)
    session.load_callbacks()
    run.capture = lambda: session.capture(dispatch)
    run.make_plan = lambda: step.plan(session, dispatch.step)
    if guard is not None:
        kind = step.options, step.optimizer, step.counts_epochs
        run.examine = Replay(session, feed, *kind).examine
    hooks.on_fit_start(run)
    plan = FitPlan(
        step=_by_shape(session, step, feed, dispatch, build),
        totals=totals,
        resident=feed.resident,
        feed=feed.start(dispatch.capacity),
        controls=Controls(
            dispatch.capacity,
            lambda x: place(x, replicated(session.mesh)),
            counts_epochs=step.counts_epochs,
        ),
        hooks=hooks,
        reporter=Reporter(totals, options.log_every_n_steps, hooks),
        validate=None if evaluation is None else functools.partial(_validate, evaluation),
        schedule=schedule,
        fused=dispatch.fused,
        max_steps=dispatch.steps,
        refuse_stale=functools.partial(refuse_stale, session.module),
    )
    if evaluation is not None and session.record is None:
        _sanity_check(session, evaluation)
    return plan


def _by_shape(
    session: Session, step: TracedStep, feed: Feed, dispatch: Dispatch, build: Callable[..., Any]
) -> Callable[..., Any]:
    """Return the compiled step, or one for each shape where the batches may have several."""
    if feed.shapes is None:
        return dispatch.step
    run, form = session.run, "fused" if dispatch.fused else "single"
    largest = step.spec

    def compile_for(chunk: PyTree) -> Callable[..., Any]:
        nonlocal largest
        began = run.clock()
        # What a hook has changed since would be in one program, and not in the others.
        refuse_stale(session.module)
        other = step.for_chunk(session, chunk)
        largest = max(largest, other.spec, key=lambda spec: size_of(spec.fed)[1])
        session.advise = Shortage(session, largest, run.accumulate, build).notes
        compiled = compile_form(session, other, form, "train step")
        # The loop counts the whole call as dispatch.
        run.timings.seconds["dispatch"] -= run.clock() - began
        return compiled

    return ByShape(step.arguments[2], dispatch.step, compile_for)


def compile_form(session: Session, step: TracedStep, form: str, title: str) -> Callable[..., Any]:
    """Compile the `"fused"` or `"single"` form of the step for batches of another shape."""
    title = f"{title} for {described(step.spec.batch)}"
    compiled = session.compile(title, lambda: step.lower(getattr(step.program, form)).compile())
    trim_memory()
    return compiled


def step_plan(session: Session, batch: Any) -> Plan:
    """Return what a training step will cost; nothing of the state is allocated.

    Args:
        session: Not entered.
        batch: A loader, or a batch of arrays or of `jax.ShapeDtypeStruct`.
    """
    session.module.run = session.run
    # A list of batches is a loader, though all its leaves are arrays.
    is_loader = isinstance(batch, list) and not all(hasattr(x, "shape") for x in batch)
    leaves = [] if is_loader else jax.tree.leaves(batch)
    if leaves and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves):
        shapes = spec_of(batch if hasattr(leaves[0], "sharding") else as_host_batch(batch))
        spec = FeedSpec(batch=shapes, fed=shapes, rows=num_rows(shapes, "the batch"), resident=None)
        transform = None
    else:
        spec = session.train_feed(batch).spec
        spec, transform = replace(spec, fed=spec.batch, resident=None), device_transform_of(batch)
    try:
        step = TracedStep(session, spec, transform, 1)
        plan = step.plan(session, step.lower(step.program.single).compile())
        # Counted while the module's attributes are as they were traced.
        _ = plan.module_flops
        return plan
    finally:
        thaw(session.module)


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
    trim_memory()
    if wanted == "auto":
        steps = f"up to {dispatch.steps} steps" if dispatch.fused else "one step"
        session.run.notice(f"{steps} a dispatch ({dispatch.reason})")
    if session.path is not None:
        with session.run.timings.phase("restore"):
            return dispatch, restore_state(session.path, step.target)
    totals = place(step.program.totals.initial(), replicated(session.mesh))
    return dispatch, make_state(*step.init_arguments)._replace(totals=totals)


def _flops_by_module(
    options: StepOptions, optimizer: OptimizerOptions, arguments: tuple[Any, ...], num_devices: int
) -> dict[str, ModuleFlops]:
    module, kept = options.module, vars(options.module).get("_frozen")
    try:
        jaxpr, _ = named_step(options, optimizer, arguments)
        counted = module_flops(jaxpr, options.adapter.types)
    except Exception:
        # A model may be anything, and the step itself has been traced: these are only figures.
        return {}
    finally:
        # Which attributes may change is for the compiled step to say.
        thaw(module)
        if kept is not None:
            vars(module)["_frozen"] = kept
    return {path: flops.divided(num_devices) for path, flops in counted.items()}


def _update_hooks(session: Session) -> tuple[UpdateHook, ...]:
    hooks, reports = [], session.options.log_every_n_steps
    for callback in session.hooks.traced_updates:
        every = callback.traced_update_every or reports
        if every % reports:
            raise ConfigError(
                f"{type(callback).__name__} looks at every {every} steps, but reports come every "
                f"{reports}; use a multiple, or `Trainer(log_every_n_steps={every})`."
            )
        hooks.append(UpdateHook(call=callback.traced_update, every=every))
    return tuple(hooks)


def _optimizers(session: Session) -> dict[str, Optimizer]:
    """Return the module's optimisers, as the callbacks leave them, with what each owns."""
    module, init = session.module, session.initializer
    variables = init.adapter.variables(init.params)
    returned = module.configure_optimizers()
    optimizers = parse_optimizers(returned, type(module).__name__, variables)
    for wrap in session.hooks.optimizer_wraps:
        where = f"{type(wrap.__self__).__name__}.wrap_optimizers"
        optimizers = resolve(wrap(session.run, optimizers), where, variables)
    return optimizers


def _check_monitors(session: Session, program: Program, evaluation: EvalPlan | None) -> None:
    specs = (*program.specs, *(evaluation.specs if evaluation else ()))
    series = [spec.name for spec in specs]
    loaders = [loader.name for loader in evaluation.loaders] if evaluation else []
    for callback in session.hooks.callbacks:
        name = getattr(callback, "monitor", None)
        if name is None or name in series:
            continue
        # A hook of the user's may log it later, so that then only a plain slip is refused.
        plain = name.replace("_", "/", 1)
        forms = {plain, *(series_of_loader(n, of) for n in (name, plain) for of in loaders)}
        same = [s for s in series if s.endswith(f"/{name}") or s in forms]
        close = did_you_mean(name, same or series, 0.9 if session.hooks.may_log else 0.5)
        close = close or did_you_mean(name, same, 0.0)
        if close or not session.hooks.may_log:
            raise ConfigError(
                f"{type(callback).__name__} monitors {name!r}, which no step logs; logged: "
                f"{', '.join(series)}.{close}"
            )


def _validate(plan: EvalPlan, run: Run) -> None:
    with run.timings.phase("validate"):
        evaluate(run, plan, *evaluated(run.state))


def _sanity_check(session: Session, plan: EvalPlan) -> None:
    """Run a few validation batches, so that an error there does not wait for an epoch's end."""
    count, run = session.options.num_sanity_val_steps, session.run
    # What can be read once only is left for the first validation.
    loaders = [x for x in plan.loaders if not getattr(x.feed.source, "is_one_shot", False)]
    if count and loaders:
        run.stage = "sanity"
        session.hooks.on_sanity_check_start(run)
        some = replace(plan, loaders=loaders)
        evaluate(run, some, *evaluated(run.state), limit=count)
        session.hooks.on_sanity_check_end(run)
        run.stage = "fit"
