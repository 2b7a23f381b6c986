"""From traced functions to compiled programs: ahead of time, from specs alone.

May import levels 0 to 3.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtrainer.averaging import Averaging, init_average
from jaxtrainer.casts import cast_calls
from jaxtrainer.checks import configured_model
from jaxtrainer.control import APPLY
from jaxtrainer.errors import ConfigError
from jaxtrainer.feed import FeedSpec
from jaxtrainer.guard import Guard, init_guard
from jaxtrainer.layout import Layout
from jaxtrainer.module import TrainModule
from jaxtrainer.options import Options
from jaxtrainer.partition import build_layout
from jaxtrainer.patterns import refuse_unmatched
from jaxtrainer.precision import Precision
from jaxtrainer.remat import remat_calls
from jaxtrainer.rows import padded_rows
from jaxtrainer.scopes import NamedModules, WrappedCalls
from jaxtrainer.sharding import batch_sharding, on_mesh, replicated
from jaxtrainer.state import (
    Adapter,
    Nested,
    NNXAdapter,
    TrainState,
    abstract,
    adapter_for,
    flat_items,
    size_of,
)
from jaxtrainer.step import step_fn
from jaxtrainer.types import PyTree
from jaxtrainer.update import OptimizerOptions, init_opt_state
from jaxtrainer.users_step import StepOptions

_SMALL_MODEL = 50_000_000
"""Parameters up to which initialisation compiles without optimisation: it runs once."""


class Initializer:
    """The traced `configure_model`, and with it the structure of the state.

    Nothing is allocated by making one: `params` and `model_state` are abstract.

    Args:
        module: The user's module. If it has a trained model, that is where training starts.
        seed: Seed of parameters, dropout and step keys.
        precision: The dtype in which parameters are kept.
    """

    def __init__(self, module: TrainModule, seed: int, precision: Precision) -> None:
        self.module = module
        self.seed = np.uint32(seed)
        self.precision = precision
        self.given: tuple[Nested, Nested] | None = None
        self.adapter: Adapter
        if module.model is not None:
            self.adapter = adapter_for(module.model)
            self.given = self._split(module.model)
            self.params, self.model_state = abstract(self.given)
        else:
            shapes = jax.eval_shape(self.make_model, self.seed)
            self.params, self.model_state = shapes

    def make_model(self, seed: Any) -> tuple[Nested, Nested]:
        """Return `(params, model_state)` of a fresh model (traced)."""
        model_key = jax.random.split(jax.random.key(seed))[0]
        model = configured_model(self.module, nnx.Rngs(model_key))
        self.adapter = adapter_for(model)
        return self._split(model)

    def _split(self, model: Any) -> tuple[Nested, Nested]:
        params, model_state = self.adapter.split(model)
        return self.precision.cast_to_params(params), model_state

    def state_fn(
        self,
        options: OptimizerOptions,
        averaging: Averaging | None = None,
        guard: Guard | None = None,
    ) -> tuple[Callable[..., TrainState], tuple]:
        """Return a function that makes the state without metric totals, and its arguments."""

        def make(seed: Any, given: Any) -> TrainState:
            params, model_state = self.make_model(seed) if given is None else given
            opt_state, window = init_opt_state(options, params)
            return TrainState(
                batch_count=np.int32(0),
                params=params,
                model_state=model_state,
                opt_state=opt_state,
                rng=jax.random.key_data(jax.random.split(jax.random.key(seed))[1]),
                totals=None,
                accumulated=window,
                averaged=init_average(averaging, params, model_state),
                guard=init_guard(guard),
            )

        return make, (self.seed, self.given)

    def compile_options(self) -> dict[str, Any]:
        """Return XLA options for programs that run once."""
        small = size_of(self.params)[0] <= _SMALL_MODEL
        return {"xla_backend_optimization_level": 0} if small else {}


def layout_of(init: Initializer, options: Options, mesh: Mesh) -> Layout:
    """Return where the parameters of a model live, and what follows them."""
    variables, may_idle = init.adapter.variables(init.params), isinstance(options.mesh, Mesh)
    return build_layout(mesh, options.sharding, init.params, variables, may_idle=may_idle)


def with_calls(init: Initializer, options: Options, *, is_trained: bool) -> Adapter:
    """Return the model's adapter, its modules called as precision and remat say.

    Args:
        init: Of the model.
        options: Of the trainer.
        is_trained: Whether the step is differentiated.

    Raises:
        ConfigError: For patterns that match nothing in the model, or a model without modules.
    """
    overrides, remat = options.precision.overrides, options.remat
    if not overrides and not remat:
        return init.adapter
    modules, names = init.adapter.types, [name for name, _ in flat_items(init.params)]
    given = "Precision(overrides=...)" if overrides else "remat"
    if not isinstance(init.adapter, NNXAdapter):
        raise ConfigError(
            f"{given} stands around the calls of `nnx.Module`s, and the model is none. Leave it "
            "out, and write `jax.checkpoint` or the casts into the model."
        )
    refuse_unmatched("Precision(overrides=...)", overrides, [*modules, *names])
    refuse_unmatched("remat", remat, modules)
    arounds = [cast_calls(options.precision)] if overrides else []
    if remat and is_trained:
        arounds.append(remat_calls(remat, modules))
    adapter: Any = WrappedCalls(init.adapter, arounds)
    return adapter


def chunk_spec(spec: FeedSpec, mesh: Mesh, rows: int, capacity: int) -> PyTree:
    """Return the specs of a chunk: leaves `[capacity, padded, ...]`, placed like the feed's."""
    rows = padded_rows(mesh, rows)
    sharding = batch_sharding(mesh, rows, stacked=True)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((capacity, rows, *x.shape[1:]), x.dtype, sharding=sharding),
        spec.fed,
    )


def batch_spec(spec: FeedSpec, mesh: Mesh, rows: int) -> PyTree:
    """Return the spec of one batch of that many rows, as the device transform gets it."""
    # With the mesh in its type, the step traced from it is the one found in JAX's trace cache.
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), spec.batch)
    return on_mesh(batch, mesh)


def specs_of_chunk(chunk: PyTree) -> PyTree:
    """Return the specs of a chunk that is on the devices."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), chunk
    )


def spec_in_chunk(chunk: PyTree, mesh: Mesh, rows: int | None = None) -> PyTree:
    """Return the spec of one batch of a chunk that holds the batches themselves.

    Args:
        chunk: On the devices.
        mesh: The devices.
        rows: Of a batch; None where it has no padding.
    """
    shape = slice(1, None) if rows is None else slice(2, None)
    first = () if rows is None else (rows,)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*first, *x.shape[shape]), x.dtype), chunk)
    return on_mesh(batch, mesh)


def control_spec(capacity: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Return the spec of the control vector."""
    return jax.ShapeDtypeStruct((APPLY + capacity,), np.int32, sharding=replicated(mesh))


def shardings(specs: PyTree) -> PyTree:
    """Return the sharding of each spec."""
    return jax.tree.map(lambda x: x.sharding, specs)


def named_step(
    options: StepOptions, optimizer: OptimizerOptions, arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Return the jaxpr of `step.step_fn` with the paths of the model's modules in its names.

    Traced once more for that, apart from what is compiled.

    Args:
        options: What the step was traced from.
        optimizer: How gradients become updates.
        arguments: Of the function, or their specs.

    Returns:
        `(jaxpr, shapes)`, as `jax.make_jaxpr(fn, return_shape=True)` does.
    """
    adapter: Any = NamedModules(options.adapter)
    # Where things live is no part of what is computed.
    plain = replace(options, adapter=adapter, layout=Layout(mesh=options.layout.mesh))
    fn, _ = step_fn(plain, optimizer)
    with adapter.scopes():
        return jax.make_jaxpr(fn, return_shape=True)(*arguments)


def trim_memory() -> None:
    """Return freed memory to the system, where the C library can.

    Compiling leaves some 100 MB of free memory in the arenas of XLA's threads, which nothing
    else would use again.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
