"""`TracedStep`: the training step as it is traced, before anything of it is compiled.

May import levels 0 to 6, but not what drives it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jaxtrainer.accelerators import Accelerator
from jaxtrainer.data import as_host_batch, device_transform_of, num_rows, spec_of
from jaxtrainer.errors import ConfigError
from jaxtrainer.evaluation import (
    same_series,
    step_options,
    totals_spec,
)
from jaxtrainer.feed import FeedSpec
from jaxtrainer.flops import Counted, module_flops, product_bytes
from jaxtrainer.guard import Guard
from jaxtrainer.loss_scale import loss_scale
from jaxtrainer.manual import refuse_options
from jaxtrainer.module import thaw
from jaxtrainer.offload import hosted, refuse_offload
from jaxtrainer.optim import Optimizer, owners, parse_optimizers, resolve
from jaxtrainer.peaks import arithmetic_of
from jaxtrainer.plan import Plan, plan_of
from jaxtrainer.programs import (
    batch_spec,
    chunk_spec,
    control_spec,
    named_step,
    shardings,
    spec_in_chunk,
    specs_of_chunk,
)
from jaxtrainer.session import Session
from jaxtrainer.sharding import check_batch_size, replicated
from jaxtrainer.state import flat_items
from jaxtrainer.step import build_train_step
from jaxtrainer.types import PyTree
from jaxtrainer.update import OptimizerOptions, UpdateHook
from jaxtrainer.users_step import StepOptions
from jaxtrainer.virtual import is_virtual


class TracedStep:
    """The training step, traced once, and the specs of all it works on.

    Attributes:
        program: Its fused and single form.
        target: Specs of the state, with shardings.
        init: Jitted function that makes the first state, without metric totals.
        arguments: Specs of the program's arguments.
        counts_epochs: Whether an optimiser or averaging starts at an epoch: the step must know it.
        layout: Where the state lives.
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
        if options.precision.loss_scale is not None:
            guard = replace(guard or Guard(), loss_scale=options.precision.loss_scale)
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
        make_state, self._init_arguments = init.state_fn(optimizer, averaging, guard)
        shapes = jax.eval_shape(make_state, *self._init_arguments)
        self.layout = session.layout
        without_totals = self.layout.of_state(shapes)
        kept = without_totals
        if options.offload_optimizer:
            refuse_offload(session.mesh)
            kept = kept._replace(opt_state=hosted(kept.opt_state))
        self.init = jax.jit(make_state, out_shardings=shardings(kept))
        self.options = step_options(session, spec, transform, capacity, is_trained=True)
        of_step = self.options, optimizer, without_totals
        self._build = functools.partial(
            build_train_step, *of_step, averaging=averaging, guard=guard
        )
        self.spec = spec
        self._batch = batch_spec(spec, session.mesh, spec.rows)
        self.program = self._build(self._batch)
        self.target = kept._replace(totals=totals_spec(session, self.program))
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
            compiler_options=session.compiler_options,
        )

    @property
    def init_arguments(self) -> tuple[Any, Any]:
        """Arguments of `init`: the seed, and the weights to start from on the devices, if any."""
        seed, given = self._init_arguments
        return seed, None if given is None else self.layout.place(given)

    def plan(self, session: Session, compiled: Any, accelerator: Accelerator | None = None) -> Plan:
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
            mesh=dict(session.mesh.shape),
            arithmetic=arithmetic_of(session.run.precision, session.run.matmul_precision),
            accelerator=accelerator,
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

    def _counter(self, num_devices: int) -> Callable[[], Counted]:
        """Return what counts the operations of each module on a device; it keeps no arrays."""
        state, count = self.target, self.target.batch_count
        of_state = state.params, state.model_state, self._batch, state.rng, count, state.opt_state
        given = self.options, self.optimizer, (*of_state, count, loss_scale(state))
        return lambda: _counted(*given, num_devices)

    def lower(self, fn: Callable[..., Any]) -> Any:
        """Lower a form of the program, with its state donated."""
        return self._jit(fn).lower(*self.arguments)


def step_plan(session: Session, batch: Any, accelerator: Accelerator | None = None) -> Plan:
    """Return what a training step will cost; nothing of the state is allocated.

    Args:
        session: Not entered.
        batch: A loader, or a batch of arrays or of `jax.ShapeDtypeStruct`.
        accelerator: What to estimate the time of a step on.
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
        check_batch_size(session.mesh, spec.rows)
        # What is never run needs no machine code of quality; XLA's own passes are the same.
        options = {"xla_backend_optimization_level": 0} if is_virtual(session.mesh) else {}
        compiled = step.lower(step.program.single).compile(options)
        plan = step.plan(session, compiled, accelerator)
        # Counted while the module's attributes are as they were traced; and read before the
        # program's text is gone with it.
        _ = plan.module_flops, plan.traffic
        return plan
    finally:
        thaw(session.module)


def _counted(
    options: StepOptions, optimizer: OptimizerOptions, arguments: tuple[Any, ...], num_devices: int
) -> Counted:
    module, kept = options.module, vars(options.module).get("_frozen")
    try:
        jaxpr, _ = named_step(options, optimizer, arguments)
        flops = module_flops(jaxpr, options.adapter.types)
        size = product_bytes(jaxpr.jaxpr)
    except Exception:
        # A model may be anything, and the step itself has been traced: these are only figures.
        return Counted({}, 0.0)
    finally:
        # Which attributes may change is for the compiled step to say.
        thaw(module)
        if kept is not None:
            vars(module)["_frozen"] = kept
    return Counted(
        {path: some.divided(num_devices) for path, some in flops.items()}, size / num_devices
    )


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
