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

from jaxtrainer.data import as_host_batch, device_transform_of, num_rows, spec_of
from jaxtrainer.errors import ConfigError
from jaxtrainer.evaluation import (
    same_series,
    step_options,
    totals_spec,
)
from jaxtrainer.feed import FeedSpec
from jaxtrainer.flops import ModuleFlops, module_flops
from jaxtrainer.guard import Guard
from jaxtrainer.manual import refuse_options
from jaxtrainer.module import thaw
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
)
from jaxtrainer.session import Session
from jaxtrainer.sharding import on_mesh, place, replicated
from jaxtrainer.state import flat_items
from jaxtrainer.step import StepOptions, build_train_step
from jaxtrainer.types import PyTree
from jaxtrainer.update import OptimizerOptions, UpdateHook


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
        make_state, (seed, given) = init.state_fn(optimizer, averaging, guard)
        if given is not None and jax.process_count() > 1:
            given = place(given, replicated(session.mesh))
        self.init_arguments = seed, given
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
