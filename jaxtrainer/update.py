"""From gradients to an update: accumulation, clipping, the optimisers. Runs while tracing.

Called by `step`, and by `manual` where the training step makes its own updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxtrainer.metrics import MetricSpec, Recorder
from jaxtrainer.optim import Optimizer, clip, join, owners, select
from jaxtrainer.precision import wide
from jaxtrainer.state import Nested, TrainState
from jaxtrainer.types import Array, PyTree


@dataclass(frozen=True, kw_only=True)
class UpdateHook:
    """A callback's traced look at updates, near every `every`-th batch."""

    call: Callable[..., None]
    every: int


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What turns gradients into an update.

    Attributes:
        optimizers: The optimisers by name, as `optim.parse_optimizers` returns them.
        accumulate: Batches to an update at most; which of them end a window the host says.
        clip_value: Limit of the gradients' norm or values.
        clip_algorithm: `"norm"` or `"value"`.
        hooks: What callbacks want to know of an update.
        is_manual: Whether the training step makes the updates itself.
    """

    optimizers: Mapping[str, Optimizer]
    accumulate: int = 1
    clip_value: float | None = None
    clip_algorithm: str = "norm"
    hooks: tuple[UpdateHook, ...] = ()
    is_manual: bool = False

    def trained(self, params: Nested) -> Nested:
        """Return the parameters that some optimiser owns; the others are frozen."""
        return select(params, owners(self.optimizers))


class Delayed(NamedTuple):
    """State of an optimiser with a `start_step`.

    Attributes:
        steps: Training steps so far: `[]`, int32.
        state: What the transformation keeps; as it was initialised until the start.
    """

    steps: Array
    state: PyTree


def init_opt_state(options: OptimizerOptions, params: Nested) -> tuple[PyTree, PyTree]:
    """Return optimiser state and the empty accumulation window (traced).

    The window has the weighted sums of `grads`, in float32 or wider, and of `loss`, the `weight`
    so far, and in `logged`, if it is not empty, what the latest update logged: `[num_metrics]`.
    """
    opt_state = {name: _init(o, params) for name, o in options.optimizers.items()}
    if options.accumulate == 1:
        return opt_state, {}
    zero, num_metrics = jnp.zeros((), jnp.float32), len(update_specs(options, params, opt_state))
    trained = options.trained(params)
    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), trained)
    window = {"grads": grads, "loss": zero, "weight": zero}
    # Orbax saves no array without elements.
    unknown = {"logged": jnp.full((num_metrics,), -jnp.inf, jnp.float32)} if num_metrics else {}
    return opt_state, window | unknown


def update_specs(
    options: OptimizerOptions, params: Nested, opt_state: PyTree
) -> tuple[MetricSpec, ...]:
    """Return what an update logs, in the order of its row; nothing is computed."""
    if options.is_manual:
        return ()
    specs: list[MetricSpec] = []

    def update(params: Nested, opt_state: PyTree, loss: Array, count: Array) -> Any:
        log = _UpdateLog(options, count)
        _update(options, log, params, opt_state, options.trained(params), loss, count)
        specs.extend(log.specs)

    scalars = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    jax.eval_shape(update, params, opt_state, *scalars)
    return tuple(specs)


def optimise(
    options: OptimizerOptions,
    state: TrainState,
    grads: PyTree,
    loss: Array,
    weight: Array,
    apply: Array,
    epoch: Array,
) -> tuple[TrainState, Array]:
    """Take the gradients of one batch into the state: into the window, or as an update.

    Args:
        options: How gradients become updates.
        state: Before this batch's update; its `batch_count` counts this batch.
        grads: Of the parameters that some optimiser owns.
        loss: Scalar of this batch.
        weight: Scalar weight of this batch in its window.
        apply: Scalar bool: whether this batch ends the window.
        epoch: Index of the epoch: `[]`, int32.

    Returns:
        The new state, and what the latest update logged: `[num_metrics]`, float32, with -inf for
        what was not computed.
    """
    if options.accumulate == 1:
        return _apply(options, state, grads, loss, epoch)
    logged = {k: state.accumulated[k] for k in ("logged",) if k in state.accumulated}
    # The mean over the window weighs each batch by its samples, also in a window cut short.
    added = {"grads": grads, "loss": loss, "weight": jnp.ones(())}
    sums = {k: v for k, v in state.accumulated.items() if k not in logged}
    sums = jax.tree.map(lambda s, x: s + weight.astype(s.dtype) * x.astype(s.dtype), sums, added)

    def end_window(state: TrainState) -> TrainState:
        # A window without weight (no token in it counts) has the gradient zero.
        total = jnp.where(sums["weight"] != 0, sums["weight"], 1.0)
        mean = jax.tree.map(lambda s, x: (s / total.astype(s.dtype)).astype(x.dtype), sums, added)
        state, row = _apply(options, state, mean["grads"], mean["loss"], epoch)
        empty = jax.tree.map(jnp.zeros_like, sums)
        return state._replace(accumulated=empty | {k: row for k in logged})

    def go_on(state: TrainState) -> TrainState:
        return state._replace(accumulated=sums | logged)

    state = lax.cond(apply, end_window, go_on, state)
    return state, state.accumulated.get("logged", jnp.zeros((0,), jnp.float32))


def _apply(
    options: OptimizerOptions, state: TrainState, grads: PyTree, loss: Array, epoch: Array
) -> tuple[TrainState, Array]:
    log = _UpdateLog(options, state.batch_count)
    params, opt_state = _update(options, log, state.params, state.opt_state, grads, loss, epoch)
    return state._replace(params=params, opt_state=like(state.opt_state, opt_state)), log.row()


def _update(
    options: OptimizerOptions,
    log: _UpdateLog,
    params: Nested,
    opt_state: PyTree,
    grads: PyTree,
    loss: Array,
    epoch: Array,
) -> tuple[Nested, PyTree]:
    clipped = grads = _without_frozen(options.optimizers, opt_state, grads, epoch)
    if options.clip_value is not None:
        clipped, norm = clip(grads, options.clip_value, options.clip_algorithm)
        if norm is not None:
            log.norm(norm)
    new, states, updates = params, {}, {}
    for name, optimizer in options.optimizers.items():
        change = update_owned(optimizer, params, opt_state[name], clipped, epoch, value=loss)
        new, updates = join(new, change.params), join(updates, change.updates)
        states[name] = counted(change.state)
    log.look(grads, options.trained(params), updates)
    return new, states


class Change(NamedTuple):
    """What one optimiser's update gives: its own parameters, the steps they made, its state."""

    params: Any
    updates: Any
    state: Any


def update_owned(
    optimizer: Optimizer,
    params: Nested,
    state: PyTree,
    grads: Nested,
    epoch: Array,
    **extra: Any,
) -> Change:
    """Return the update of an optimiser's own parameters.

    Args:
        optimizer: Whose names are settled.
        params: All parameters.
        state: The optimiser's.
        grads: Gradients of its own parameters, and of any others.
        epoch: Index of the epoch: `[]`, int32.
        extra: Further arguments of the transformation's `update`.
    """
    params, grads = select(params, optimizer.wrt), select(grads, optimizer.wrt)
    tx = optax.with_extra_args_support(optimizer.tx)

    def update(state: PyTree) -> Change:
        # Optax multiplies its integer counters with floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, new = tx.update(grads, state, params, **extra)
        return Change(optax.apply_updates(params, updates), updates, like(state, new))

    is_on, inner = _is_on(optimizer, state, epoch), _inner(state)
    if is_on is None:
        return update(inner)
    shapes = jax.eval_shape(update, inner).updates

    def keep(state: PyTree) -> Change:
        # The parameters themselves: to add a zero would make 0.0 of -0.0.
        return Change(params, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), state)

    change = lax.cond(is_on, update, keep, inner)
    if isinstance(state, Delayed):
        return change._replace(state=state._replace(state=change.state))
    return change


def _without_frozen(
    optimizers: Mapping[str, Optimizer], opt_state: PyTree, grads: Nested, epoch: Array
) -> Nested:
    """Return the gradients with zeros for parameters that are frozen for now."""
    for name, optimizer in optimizers.items():
        is_on = _is_on(optimizer, opt_state[name], epoch)
        if is_on is not None:
            own = select(grads, optimizer.wrt)
            own = jax.tree.map(lambda g, is_on=is_on: jnp.where(is_on, g, jnp.zeros_like(g)), own)
            grads = join(grads, own)
    return grads


def _is_on(optimizer: Optimizer, state: PyTree, epoch: Array) -> Array | None:
    """Return whether the optimiser has started; None if it does so at once."""
    if not (optimizer.start_epoch or optimizer.start_step):
        return None
    is_on = epoch >= optimizer.start_epoch
    return is_on & (state.steps >= optimizer.start_step) if optimizer.start_step else is_on


def _inner(state: PyTree) -> PyTree:
    return state.state if isinstance(state, Delayed) else state


def counted(state: PyTree) -> PyTree:
    """Return an optimiser's state after one more training step."""
    return state._replace(steps=state.steps + 1) if isinstance(state, Delayed) else state


def _init(optimizer: Optimizer, params: Nested) -> PyTree:
    state = optimizer.tx.init(select(params, optimizer.wrt))
    return Delayed(jnp.int32(0), state) if optimizer.start_step else state


class _UpdateLog:
    """Collects what one traced update logs: its norm before clipping, and what hooks log."""

    def __init__(self, options: OptimizerOptions, batch_count: Array) -> None:
        self.options = options
        self.batch_count = batch_count
        self.specs: list[MetricSpec] = []
        self._rows: list[Array] = []

    def row(self) -> Array:
        """Return the values: `[num_metrics]`, float32."""
        return jnp.concatenate([jnp.zeros((0,), jnp.float32), *self._rows])

    def norm(self, norm: Array) -> None:
        """Take the gradients' global norm before clipping."""
        recorder = Recorder("train")
        recorder.log("grad_norm", norm)
        self._take(recorder.specs, recorder.row(), every=1)

    def look(self, grads: PyTree, params: PyTree, updates: PyTree) -> None:
        """Call the hooks, where a report will show it."""
        for hook in self.options.hooks:
            specs: dict[str, MetricSpec] = {}

            def call(hook: UpdateHook = hook, specs: dict[str, MetricSpec] = specs) -> Array:
                recorder = Recorder("train", takes_arrays=False)
                hook.call(grads, params, updates, recorder.log)
                specs.update(recorder.specs)
                return recorder.row()

            shape = jax.eval_shape(call).shape
            # Known on the device, so that the host need not say it, which would be another
            # program or an argument a step. An update is reported if it is the last one until
            # a report, and windows are at most `accumulate` batches long.
            is_due = (-self.batch_count) % hook.every < self.options.accumulate
            row = lax.cond(is_due, call, lambda s=shape: jnp.full(s, -jnp.inf, jnp.float32))
            self._take(specs, row, every=hook.every)

    def _take(self, specs: dict[str, MetricSpec], row: Array, every: int) -> None:
        of_update = {"on_step": True, "on_epoch": False, "every": every}
        self.specs += [dataclasses.replace(spec, **of_update) for spec in specs.values()]
        self._rows.append(row)


def like(old: PyTree, new: PyTree) -> PyTree:
    """Return new with the strong dtypes of old, so that one program serves every step."""
    return jax.tree.map(lambda o, n: lax.convert_element_type(n, o.dtype), old, new)
