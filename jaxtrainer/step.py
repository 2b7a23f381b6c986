"""Everything that is traced: the training, evaluation and prediction programs.

One call of the training program runs up to K steps: gather or slice the batch, the user's
step (`users_step.py`), gradients, accumulation, clipping, optimiser, metrics. May import levels 0
to 2.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrainer.averaging import Averaging, update_average
from jaxtrainer.control import APPLY, ENDS_EPOCH, ENDS_WINDOW, EPOCH, LEFT_OUT, RESET, START, STOP
from jaxtrainer.errors import LogError
from jaxtrainer.guard import Guard, guard_row, guard_specs, judge, num_trained, settle, withhold
from jaxtrainer.loss_scale import loss_scale, scaled_grad
from jaxtrainer.manual import Updates
from jaxtrainer.metrics import MetricSpec, Recorder, Totals
from jaxtrainer.module import tracing
from jaxtrainer.offload import to_device, to_host
from jaxtrainer.optim import join
from jaxtrainer.outputs import (
    check_predictions,
    noting,
    refuse_leaked,
)
from jaxtrainer.precision import matmuls_in, tracing_matmuls
from jaxtrainer.scopes import scopes_of
from jaxtrainer.state import Nested, TrainState
from jaxtrainer.types import Array, PyTree, Stage
from jaxtrainer.update import OptimizerOptions, optimise, update_specs
from jaxtrainer.users_step import StepOptions, UsersStep, num_rows, prepared


@dataclass(kw_only=True)
class Program:
    """Functions ready to be compiled, and what their metric rows mean.

    Attributes:
        single: Runs the one batch `control[START]` of a chunk.
        fused: Runs the batches from `control[START]` to `control[STOP]`.
        totals: Meaning of a row.
        outputs: What the user's step returns: specs by key.
        fingerprint: The same for the same traced step, in any process.
    """

    single: Callable[..., Any]
    fused: Callable[..., Any]
    totals: Totals
    outputs: Mapping[str, Any]
    fingerprint: str = ""

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """Return the logged metrics, in the order of a row."""
        return self.totals.specs


def build_train_step(
    options: StepOptions,
    optimizer: OptimizerOptions,
    state: TrainState,
    batch: PyTree,
    averaging: Averaging | None = None,
    guard: Guard | None = None,
) -> Program:
    """Return programs `fn(state, resident, chunk, control) -> (state, rows)`.

    Args:
        options: Module, model and layout of the chunk.
        optimizer: How gradients become updates.
        state: Abstract or real state; its `totals` are not looked at.
        batch: Spec of one batch, as the loader gives it.
        averaging: How weights are averaged, if they are.
        guard: What to do about a batch that is not finite; None for nothing.

    Returns:
        The programs. `chunk` has leaves `[capacity, batch, ...]`, or `[capacity, batch]` int32
        row indices into `resident`; `control` is int32 `[APPLY + capacity]`; `rows` comes back
        as `[capacity, num_metrics]` float32 (`[1, num_metrics]` unfused).
    """
    run_step, trace = step_fn(options, optimizer)
    # Traced here once; inside the loop below the cached jaxpr is put in line.
    inner = jax.jit(run_step, inline=True)
    # The epoch's type is that of the other counter; another would be traced a second time.
    count = state.batch_count
    arguments = state.params, state.model_state, batch, state.rng, count, state.opt_state, count
    with matmuls_in(options.matmul_precision):
        traced = jax.make_jaxpr(inner)(*arguments, loss_scale(state))
    refuse_leaked(traced.consts, trace.where)
    of_update = update_specs(optimizer, state.params, state.opt_state)
    of_guard = guard_specs(guard)
    specs = (*trace.recorder.specs.values(), *of_update, *of_guard)
    _refuse_twice(specs)
    totals = Totals(specs)
    is_windowed = optimizer.accumulate > 1
    is_of_guard = np.arange(totals.shape[1])[None] >= totals.shape[1] - len(of_guard)

    def one_step(
        state: TrainState, batch: PyTree, epoch: Array, flags: Array, is_seen: Array | bool
    ) -> tuple[TrainState, Array]:
        before = state
        changes, loss, model_state, row, weights, weight = inner(
            *(state.params, state.model_state, batch, state.rng, num_trained(state)),
            *(state.opt_state, epoch, loss_scale(state)),
        )
        state = state._replace(model_state=model_state, batch_count=state.batch_count + 1)
        apply, verdict = (flags & ENDS_WINDOW) > 0, None
        updated: Array | bool = True
        if guard is not None:
            # Of the step's own updates the parameters, and what its scaled gradients were.
            looked_at = (changes[0], changes[2]) if optimizer.is_manual else changes
            verdict = judge(guard, before, loss, looked_at, (flags & LEFT_OUT) > 0)
            if is_windowed:
                given = changes, loss, weight, apply
                changes, loss, weight, apply = withhold(verdict, state.accumulated, *given)
        if optimizer.is_manual:
            params, opt_state, _ = changes
            state, logged = state._replace(params=params, opt_state=opt_state), row[:0]
        else:
            state, logged = optimise(optimizer, state, changes, loss, weight, apply, epoch)
        if verdict is not None:
            state = settle(verdict, before, state, is_windowed=is_windowed)
            updated = ~verdict.leaves_out
        state = update_average(
            averaging,
            state,
            updated=apply if is_windowed else updated,
            epoch=epoch,
            ends_epoch=(flags & ENDS_EPOCH) > 0,
            is_seen=is_seen,
        )
        # What an update logs has no epoch mean, and may be -inf.
        none = jnp.zeros((len(of_update),), jnp.float32)
        counts = guard_row(of_guard, state.guard)
        values = _join(row, none, counts), _join(weights, none, jnp.ones_like(counts))
        sums = totals.update(before.totals, *values)
        if verdict is not None:
            sums = jnp.where(verdict.leaves_out & ~is_of_guard, before.totals, sums)
        state = options.layout.keep(state._replace(totals=sums))
        return state, totals.scalars(_join(row, logged, counts))

    def with_totals(state: TrainState, control: Array) -> TrainState:
        return state._replace(totals=jnp.where(control[RESET] > 0, totals.initial(), state.totals))

    @tracing_matmuls(options.matmul_precision)
    def single(state: TrainState, resident: PyTree, chunk: PyTree, control: Array) -> Any:
        i = control[START]
        batch = _take(options, resident, chunk, i)
        state = with_totals(state, control)
        if options.offloads:
            state = state._replace(opt_state=to_device(state.opt_state))
        state, row = one_step(state, batch, control[EPOCH], control[APPLY + i], True)
        if options.offloads:
            state = state._replace(opt_state=to_host(state.opt_state))
        return state, row[None]

    @tracing_matmuls(options.matmul_precision)
    def fused(state: TrainState, resident: PyTree, chunk: PyTree, control: Array) -> Any:
        def body(i: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
            state, rows = carry
            batch = _take(options, resident, chunk, i)
            is_seen = i + 1 == control[STOP].astype(i.dtype)
            state, row = one_step(state, batch, control[EPOCH], control[APPLY + i], is_seen)
            return state, lax.dynamic_update_index_in_dim(rows, row, i, 0)

        rows = jnp.zeros((options.capacity, totals.num_scalars), jnp.float32)
        carry = with_totals(state, control), rows
        return _loop(control, body, carry)

    return Program(
        single=single,
        fused=fused,
        totals=totals,
        outputs=trace.outputs,
        # Addresses of functions differ from process to process.
        fingerprint=re.sub(r"0x[0-9a-f]+", "", str(traced)),
    )


def step_fn(
    options: StepOptions, optimizer: OptimizerOptions
) -> tuple[Callable[..., Any], UsersStep]:
    """Return the user's step with its gradients, and what is known of it once it is traced.

    It gives `(gradients, loss, model_state, row, weights, weight)`; of a step that makes its own
    updates, `(params, opt_state, checked)` is the first, with what must be finite besides. With a
    scale the loss is scaled for the derivative, and no result is.
    """
    trace = UsersStep(options, "train")

    def gradients(
        params: Nested, model_state: Nested, batch: PyTree, key: Array, scale: Array | None
    ) -> Any:
        def loss_fn(trained: Nested) -> tuple[Array, Any]:
            return trace.run(join(params, trained), model_state, batch, key)

        # What no optimiser owns is no argument of the derivative: its gradients cost nothing.
        trained = optimizer.trained(params)
        loss_fn = options.layout.regathering(loss_fn)
        (loss, aux), grads = scaled_grad(loss_fn, scale)(trained)
        return options.layout.keep_params(grads), loss, *aux

    @tracing_matmuls(options.matmul_precision)
    def run_step(
        params: Nested,
        model_state: Nested,
        batch: PyTree,
        rng: Array,
        batch_count: Array,
        opt_state: PyTree,
        epoch: Array,
        scale: Array | None = None,
    ) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(rng), batch_count)
        if not optimizer.is_manual:
            return gradients(params, model_state, batch, key, scale)
        kind = options.adapter, options.precision, trace.where
        updates = Updates(optimizer, *kind, params, opt_state, epoch, scale)
        loss, aux = trace.run(params, model_state, batch, key, updates)
        return (updates.params, updates.opt_state, updates.checked), loss, *aux

    return run_step, trace


def build_eval_step(
    options: StepOptions, stage: Stage, params: Nested, model_state: Nested, batch: PyTree
) -> Program:
    """Return programs `fn(params, model_state, totals, resident, chunk, control)`.

    They return `(totals, rows)`, with shapes as in `build_train_step`; `totals` is
    `[4, num_metrics]` float32.
    """
    trace = UsersStep(options, stage)

    def forward(params: Nested, model_state: Nested, batch: PyTree) -> tuple[Array, Array]:
        _, (_, row, weights, _) = trace.run(params, model_state, batch, None)
        return row, weights

    count, inner = num_rows(batch), jax.jit(forward, inline=True)
    with matmuls_in(options.matmul_precision):
        refuse_leaked(jax.make_jaxpr(inner)(params, model_state, batch).consts, trace.where)
    totals = Totals(tuple(trace.recorder.specs.values()))

    @tracing_matmuls(options.matmul_precision)
    def program(length: int, *arguments: Any) -> Any:
        params, model_state, sums, resident, chunk, control = arguments
        start = control[START]
        sums = jnp.where(control[RESET] > 0, totals.initial(), sums)

        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            sums, rows = carry
            given = _take(options, resident, chunk, i, count)
            row, weights = inner(params, model_state, given)
            at = i if length > 1 else 0
            rows = lax.dynamic_update_index_in_dim(rows, totals.scalars(row), at, 0)
            return totals.update(sums, row, weights), rows

        carry = sums, jnp.zeros((length, totals.num_scalars), jnp.float32)
        if length == 1:
            return body(start, carry)
        return _loop(control, body, carry)

    return Program(
        single=functools.partial(program, 1),
        fused=functools.partial(program, options.capacity),
        totals=totals,
        outputs=trace.outputs,
    )


def build_predict_step(options: StepOptions, rows: int) -> Callable[..., PyTree]:
    """Return `fn(params, model_state, resident, chunk, index) -> predictions` for a batch."""
    module = options.module

    @tracing_matmuls(options.matmul_precision)
    def program(
        params: Nested, model_state: Nested, resident: PyTree, chunk: PyTree, index: Array
    ) -> PyTree:
        batch = prepared(options, _take(options, resident, chunk, index, rows))
        where = f"{type(module).__name__}.predict_step"
        with scopes_of(options.adapter):
            given = options.layout.whole_params(options.precision.cast_params(params))
            model = options.adapter.merge(given, model_state, training=False)
            with noting(where, batch), tracing(module, Recorder("predict"), None):
                predictions = module.predict_step(model, batch, **options.arguments)
        check_predictions(predictions, where)
        options.adapter.read_back(model, where=where)
        return predictions

    return program


def _refuse_twice(specs: Sequence[MetricSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in {n for n in names if names.count(n) > 1}:
        raise LogError(
            f"the series {name!r} is logged by the step, or by a callback, and by the optimiser's "
            "update too (`gradient_clip_val` logs 'train/grad_norm'); choose another name."
        )


def _join(*rows: Array) -> Array:
    return jnp.concatenate(rows)


def _loop(control: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    # Unsigned: JAX counts a negative index from the end, in kernels of their own.
    start, stop = control[START].astype(jnp.uint32), control[STOP].astype(jnp.uint32)
    return lax.fori_loop(start, stop, body, carry)


def _take(
    options: StepOptions, resident: PyTree, chunk: PyTree, i: Array, rows: int | None = None
) -> PyTree:
    batch = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), chunk)
    if rows is not None:
        # A padded batch is cut to its rows: XLA divides them unevenly, and moves none.
        batch = jax.tree.map(lambda a: a if len(a) == rows else a[:rows], batch)
    if not options.resident:
        return batch
    return jax.tree.map(lambda a: a.at[batch].get(mode="promise_in_bounds"), resident)
