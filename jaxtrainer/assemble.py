"""From a session and loaders to what each loop drives: traced, compiled, restored, placed.

Everything here happens once a call, before its loop starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtrainer import configuration
from jaxtrainer.averaging import evaluated
from jaxtrainer.checkpoint import check_state, restore_state
from jaxtrainer.data import device_transform_of
from jaxtrainer.dispatch import Dispatch, DispatchChoice, chunk_capacity
from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.evaluation import (
    check_first_batch,
    eval_plan,
)
from jaxtrainer.feed import Feed, FeedSpec
from jaxtrainer.loaders import loaders_by_name, series_of_loader
from jaxtrainer.loops.controls import Controls
from jaxtrainer.loops.evaluate import EvalPlan, evaluate
from jaxtrainer.loops.fit import FitPlan
from jaxtrainer.loops.report import Reporter
from jaxtrainer.module import refuse_stale
from jaxtrainer.programs import (
    trim_memory,
)
from jaxtrainer.replay import Replay
from jaxtrainer.run import Run
from jaxtrainer.session import Session
from jaxtrainer.shapes import ByShape, described
from jaxtrainer.sharding import place, replicated
from jaxtrainer.shortage import Shortage
from jaxtrainer.state import TrainState, size_of
from jaxtrainer.step import Program
from jaxtrainer.traced import TracedStep
from jaxtrainer.types import PyTree
from jaxtrainer.validation import build_schedule


def fit_plan(session: Session, train_loader: Any, val_loader: Any) -> FitPlan:
    """Return what the training loop drives, its state restored or initialised."""
    run, options, hooks = session.run, session.options, session.hooks
    asked = configuration.of_call(options, session.module, hooks.callbacks, session.path)
    configuration.compare(asked, "call")
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
    traced = feed.spec.batch, capacity, run.num_batches, step.program.fingerprint
    configuration.compare(configuration.of_step(*traced), "step")
    session.advise = Shortage(session, feed.spec, run.accumulate, build).notes
    if step.layout.undivided:
        names = ", ".join(step.layout.undivided[:3])
        more = len(step.layout.undivided) - 3
        run.notice(
            f"whole on each device, as no dimension divides: {names}"
            + (f" and {more} more" if more > 0 else "")
        )
    run.state_bytes = size_of(step.target)[1]
    totals = step.program.totals
    run.prog_bar |= {spec.name for spec in step.program.specs if spec.prog_bar}
    run.forked |= {s.name for s in step.program.specs if s.on_step and s.on_epoch}
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


def compile_step(session: Session, step: TracedStep, feed: Feed) -> tuple[Dispatch, Any]:
    """Return the compiled training step, and what makes the first state.

    The latter is a compiled function of `step.init_arguments`, or None where the session restores
    a state.
    """
    wanted, saved = session.options.steps_per_dispatch, (session.record or {}).get("program")
    cache_dir = session.options.cache_dir
    memory = None if cache_dir is None else cache_dir / "dispatch"
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


def _compile_and_init(
    session: Session, step: TracedStep, feed: Feed
) -> tuple[Dispatch, TrainState]:
    """Compile the training step and what makes the first state; run that, or restore it."""
    job = functools.partial(compile_step, session, step, feed)
    dispatch, make_state = session.compile("train step", job)
    trim_memory()
    if session.options.steps_per_dispatch == "auto":
        steps = f"up to {dispatch.steps} steps" if dispatch.fused else "one step"
        session.run.notice(f"{steps} a dispatch ({dispatch.reason})")
    if session.path is not None:
        with session.run.timings.phase("restore"):
            return dispatch, restore_state(session.path, step.target)
    totals = place(step.program.totals.initial(), replicated(session.mesh))
    return dispatch, make_state(*step.init_arguments)._replace(totals=totals)


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
