"""From loaders to what the evaluation and prediction loops drive: traced, compiled, named.

Several loaders whose batches are alike share one program. May import levels 0 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrainer.checks import loader_arguments
from jaxtrainer.data import device_transform_of
from jaxtrainer.dispatch import chunk_capacity
from jaxtrainer.errors import LogError
from jaxtrainer.feed import Chunk, Feed, FeedSpec
from jaxtrainer.loaders import loaders_by_name, totals_of_loader
from jaxtrainer.loops.evaluate import EvalLoader, EvalPlan
from jaxtrainer.loops.predict import PredictLoader, PredictPlan, predict
from jaxtrainer.metrics import MetricSpec
from jaxtrainer.programs import (
    batch_spec,
    chunk_spec,
    control_spec,
    spec_in_chunk,
    specs_of_chunk,
    with_calls,
)
from jaxtrainer.session import Session
from jaxtrainer.shapes import described, shape_of
from jaxtrainer.sharding import replicated
from jaxtrainer.step import Program, build_eval_step, build_predict_step
from jaxtrainer.types import PyTree, Stage
from jaxtrainer.users_step import StepOptions

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
    is_mixed = feed.shapes is not None
    size = feed.spec.fed, feed.num_batches, _MAX_STEPS
    capacity = chunk_capacity(wanted, *size, is_mixed=is_mixed)
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
    """The evaluation step for a spec of batches: traced at once, compiled on first use.

    For batches of other shapes, or with fewer rows, it is traced and compiled as they come.

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
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        chunk = chunk_spec(spec, session.mesh, spec.rows, self.capacity)
        self._first = shape_of(chunk), spec.rows
        self.whole = self._build(batch_spec(spec, session.mesh, spec.rows))

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """What the step logs, by the names that it uses."""
        return self.whole.specs

    def for_chunk(self, chunk: Chunk) -> Callable[..., Any]:
        """Return the program for chunks of that shape."""
        # Batches of fewer rows may have been padded to the same shape.
        key = shape_of(chunk.tree), chunk.rows
        if key not in self._compiled:
            self._compiled[key] = self._compile(chunk, is_first=key == self._first)
        return self._compiled[key]

    def control(self, chunk: Chunk) -> np.ndarray:
        """Return an empty control vector for such chunks."""
        return np.zeros(control_spec(chunk.capacity, self._session.mesh).shape, np.int32)

    def _build(self, batch: PyTree) -> Program:
        return build_eval_step(self._options, self._stage, *self._variables, batch)

    def _for_batches_in(self, chunk: Chunk) -> Program:
        program = self._build(spec_of_batch(self._spec, self._session.mesh, chunk))
        same_series(self.whole, program, self._title)
        return program

    def _compile(self, chunk: Chunk, *, is_first: bool) -> Callable[..., Any]:
        mesh = self._session.mesh
        program = self.whole if is_first else self._for_batches_in(chunk)
        arguments = (
            *self._variables,
            totals_spec(self._session, program),
            self._spec.resident,
            specs_of_chunk(chunk.tree),
            control_spec(chunk.capacity, mesh),
        )
        fn = program.fused if self.fused and chunk.capacity > 1 else program.single
        jitted = jax.jit(
            fn,
            donate_argnums=2,
            out_shardings=replicated(mesh),
            compiler_options=self._session.compiler_options,
        )
        title = self._title if is_first else of_chunk(self._title, self._spec, chunk)
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
    size = spec.fed, feed.num_batches, _MAX_STEPS
    capacity = chunk_capacity("auto", *size, is_mixed=feed.shapes is not None)
    traced = step_options(session, spec, transform, capacity, arguments)
    title = "predict step" if name is None else f"predict step of {name!r}"

    first = shape_of(chunk_spec(spec, mesh, spec.rows, capacity)), spec.rows
    compiled: dict[Hashable, Callable[..., Any]] = {}

    def step_for(chunk: Chunk) -> Callable[..., Any]:
        key = shape_of(chunk.tree), chunk.rows
        if key not in compiled:
            arguments = (*variables, spec.resident, specs_of_chunk(chunk.tree), np.int32(0))
            # Traced before the compilation is announced, so that a bad step is found before it.
            fn, options = build_predict_step(traced, chunk.rows), session.compiler_options
            # Each process gets all rows; of one process the parts are put together on the host.
            whole = replicated(mesh) if jax.process_count() > 1 else None
            lowered = jax.jit(fn, out_shardings=whole, compiler_options=options).lower(*arguments)
            of_shape = title if key == first else of_chunk(title, spec, chunk)
            compiled[key] = session.compile(of_shape, lowered.compile)
        return compiled[key]

    return PredictLoader(
        name=name, step_for=step_for, resident=feed.resident, feed=feed, capacity=capacity
    )


def of_chunk(title: str, spec: FeedSpec, chunk: Chunk) -> str:
    """Return the title of a program for chunks unlike the first, whose spec is given."""
    if chunk.shape is None:
        return f"{title} for the last {chunk.rows} rows"
    return f"{title} for {described(spec.batch, chunk.shape)}"


def spec_of_batch(spec: FeedSpec, mesh: Mesh, chunk: Chunk) -> PyTree:
    """Return the spec of a chunk's batches, as the device transform gets them."""
    if spec.resident is not None:
        return batch_spec(spec, mesh, chunk.rows)
    return spec_in_chunk(chunk.tree, mesh, chunk.rows)


def same_series(first: Program, other: Program, title: str) -> None:
    """Raise LogError unless a step logs the same for batches of another shape."""
    if first.specs != other.specs:
        logged = (", ".join(spec.name for spec in p.specs) or "nothing" for p in (first, other))
        raise LogError(
            "{}: for batches of the first shape it logs {}, for those of another shape {}; log "
            "the same series, in the same order, for every shape.".format(title, *logged)
        )


def step_options(
    session: Session,
    spec: FeedSpec,
    transform: Any,
    capacity: int,
    arguments: Mapping[str, str] | None = None,
    *,
    is_trained: bool = False,
) -> StepOptions:
    """Return what a traced step of the session is made from.

    Args:
        session: Its module, model and callbacks.
        spec: What the feed hands to the step.
        transform: What the loader wants done on the device, if anything.
        capacity: Batches a chunk holds.
        arguments: What the user's step gets beside model and batch.
        is_trained: Whether the step is differentiated, so that remat has a meaning.

    Raises:
        ConfigError: For patterns that match nothing in the model.
    """
    return StepOptions(
        module=session.module,
        adapter=with_calls(session.initializer, session.options, is_trained=is_trained),
        precision=session.options.precision,
        layout=session.layout,
        matmul_precision=session.options.matmul_precision,
        offloads=is_trained and session.options.offload_optimizer,
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
