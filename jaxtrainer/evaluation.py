"""From loaders to what the evaluation and prediction loops drive: traced, compiled, named.

Several loaders whose batches are alike share one program. May import levels 0 to 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, final

import jax
import numpy as np

from jaxtrainer.checks import loader_arguments
from jaxtrainer.data import device_transform_of
from jaxtrainer.dispatch import chunk_capacity
from jaxtrainer.feed import Feed, FeedSpec
from jaxtrainer.loaders import loaders_by_name, totals_of_loader
from jaxtrainer.loops.evaluate import EvalLoader, EvalPlan
from jaxtrainer.loops.predict import PredictLoader, PredictPlan, predict
from jaxtrainer.metrics import MetricSpec
from jaxtrainer.programs import batch_spec, chunk_spec, control_spec
from jaxtrainer.session import Session
from jaxtrainer.sharding import replicated
from jaxtrainer.step import Program, StepOptions, build_eval_step, build_predict_step
from jaxtrainer.types import PyTree, Stage

_MAX_STEPS = 32
"""Batches of a dispatch, whose duration nothing measures here."""


def eval_plan(session: Session, stage: Stage, loader: Any) -> EvalPlan:
    """Return what the evaluation loop drives; its programs compile on first use."""
    steps: dict[Hashable, EvaluationStep] = {}
    plan = EvalPlan(
        stage=stage,
        loaders=[
            _eval_loader(session, stage, name, one, steps)
            for name, one in loaders_by_name(loader, stage).items()
        ],
        hooks=session.hooks,
    )
    session.run.prog_bar |= {spec.name for spec in plan.specs if spec.prog_bar}
    return plan


def _eval_loader(
    session: Session,
    stage: Stage,
    name: str | None,
    loader: Any,
    steps: dict[Hashable, EvaluationStep],
) -> EvalLoader:
    arguments = loader_arguments(session.module, stage, name)
    feed, transform = session.feed(loader, stage, name), device_transform_of(loader)
    wanted = session.options.steps_per_dispatch
    capacity = chunk_capacity(wanted, feed.spec.fed, feed.num_batches, _MAX_STEPS)
    options = step_options(session, feed.spec, transform, capacity, arguments)
    # Batches that look alike to the trace are run by one program, unless it knows the loader.
    specs = (feed.spec.batch, feed.spec.fed, feed.spec.resident)
    shapes = (jax.tree.structure(specs), *jax.tree.leaves(specs))
    key = (shapes, feed.rows, capacity, id(transform), *arguments.values())
    if key not in steps:
        steps[key] = EvaluationStep(session, stage, options, feed.spec, name)
    step = steps[key]
    check_first_batch(session, stage, feed, step.whole)
    return EvalLoader(
        name=name,
        step=step,
        totals=totals_of_loader(step.specs, name),
        resident=feed.resident,
        feed=feed,
    )


@final
class EvaluationStep:
    """The evaluation step for batches of one spec: traced at once, compiled on first use.

    Attributes:
        capacity: Batches a chunk holds.
        fused: Whether a call runs several. On its own an evaluation runs step by step; in `fit`
            as was measured for training.
        whole: The program for batches that are whole.
    """

    def __init__(
        self, session: Session, stage: Stage, options: StepOptions, spec: FeedSpec, name: str | None
    ) -> None:
        self.capacity = options.capacity
        self.fused = False
        self._session, self._options, self._spec = session, options, spec
        self._stage: Stage = stage
        self._title = f"{stage} step" if name is None else f"{stage} step of {name!r}"
        self._variables = session.variable_specs
        self._compiled: dict[int, Callable[..., Any]] = {}
        self.whole = self._build(spec.rows)

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """What the step logs, by the names that it uses."""
        return self.whole.specs

    def for_rows(self, rows: int) -> Callable[..., Any]:
        """Return the program for batches of that many rows."""
        if rows not in self._compiled:
            self._compiled[rows] = self._compile(rows)
        return self._compiled[rows]

    def control(self, rows: int) -> np.ndarray:
        """Return an empty control vector for such batches."""
        return np.zeros(control_spec(self._batches(rows), self._session.mesh).shape, np.int32)

    def _batches(self, rows: int) -> int:
        return self.capacity if rows == self._spec.rows else 1

    def _build(self, rows: int) -> Program:
        batch = batch_spec(self._spec, self._session.mesh, rows)
        return build_eval_step(self._options, self._stage, *self._variables, batch)

    def _compile(self, rows: int) -> Callable[..., Any]:
        mesh, is_whole, batches = self._session.mesh, rows == self._spec.rows, self._batches(rows)
        program = self.whole if is_whole else self._build(rows)
        arguments = (
            *self._variables,
            totals_spec(self._session, program),
            self._spec.resident,
            chunk_spec(self._spec, mesh, rows, batches),
            control_spec(batches, mesh),
        )
        fn = program.fused if self.fused and is_whole else program.single
        jitted = jax.jit(
            fn,
            donate_argnums=2,
            out_shardings=replicated(mesh),
            compiler_options=self._session.options.compiler_options,
        )
        title = self._title if is_whole else f"{self._title} for the last {rows} rows"
        return self._session.compile(title, lambda: jitted.lower(*arguments).compile())


def predict_plan(session: Session, loader: Any, variables: tuple[PyTree, PyTree]) -> PredictPlan:
    """Return what the prediction loop drives."""
    loaders = [
        _predict_loader(session, name, one, variables)
        for name, one in loaders_by_name(loader, "predict").items()
    ]
    return PredictPlan(loaders=loaders, hooks=session.hooks)


def streamed(predictions: Iterator[tuple[str | None, PyTree]]) -> Iterator[Any]:
    """Yield the predictions of each batch, with the loader's name where it has one."""
    for name, values in predictions:
        yield values if name is None else (name, values)


def predictions_of(session: Session) -> Iterator[tuple[str | None, PyTree]]:
    """Run a whole prediction, and yield the loader's name and the predictions of each batch."""
    with session:
        variables = session.variables
        plan = predict_plan(session, session.loader("predict"), variables)
        yield from predict(session.run, plan, *variables)


def _predict_loader(
    session: Session, name: str | None, loader: Any, variables: tuple[PyTree, PyTree]
) -> PredictLoader:
    arguments = loader_arguments(session.module, "predict", name)
    feed, mesh, transform = (
        session.feed(loader, "predict", name),
        session.mesh,
        device_transform_of(loader),
    )
    spec = feed.spec
    capacity = chunk_capacity("auto", spec.fed, feed.num_batches, _MAX_STEPS)
    fn = build_predict_step(step_options(session, spec, transform, capacity, arguments))
    title = "predict step" if name is None else f"predict step of {name!r}"

    @functools.cache
    def step_for(rows: int) -> Callable[..., Any]:
        is_whole = rows == feed.rows
        chunk = chunk_spec(spec, mesh, rows, capacity if is_whole else 1)
        arguments = (*variables, spec.resident, chunk, np.int32(0))
        # Traced before the compilation is announced, so that a bad step is found before it.
        options = session.options.compiler_options
        lowered = jax.jit(fn, compiler_options=options).lower(*arguments)
        of_rows = title if is_whole else f"{title} for the last {rows} rows"
        return session.compile(of_rows, lowered.compile)

    return PredictLoader(
        name=name, step_for=step_for, resident=feed.resident, feed=feed, capacity=capacity
    )


def step_options(
    session: Session,
    spec: FeedSpec,
    transform: Any,
    capacity: int,
    arguments: Mapping[str, str] | None = None,
) -> StepOptions:
    """Return what a traced step of the session is made from.

    Args:
        session: Its module, model and callbacks.
        spec: What the feed hands to the step.
        transform: What the loader wants done on the device, if anything.
        capacity: Batches a chunk holds.
        arguments: What the user's step gets beside model and batch.
    """
    return StepOptions(
        module=session.module,
        adapter=session.initializer.adapter,
        precision=session.options.precision,
        traced=session.hooks.traced,
        transform=transform,
        resident=spec.resident is not None,
        capacity=capacity,
        arguments=arguments or {},
    )


def totals_spec(session: Session, program: Program) -> jax.ShapeDtypeStruct:
    """Return the spec of a program's metric totals: `[4, num_metrics]`, float32."""
    sharding = replicated(session.mesh)
    return jax.ShapeDtypeStruct(program.totals.shape, np.float32, sharding=sharding)


def check_first_batch(session: Session, stage: Stage, feed: Feed, program: Program) -> None:
    """Let the callbacks look at the first batch, and at what the step returns for it."""
    for check in session.hooks.checks:
        check(stage, feed.first, program.outputs)
