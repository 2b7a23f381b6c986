"""`Layout`: where the arrays of a state live, for specs and inside what is traced.

How parameters are divided is settled by `partition`. May import levels 0 and 1, and `state`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrainer.sharding import batch_sharding, num_data_shards, place
from jaxtrainer.state import Nested, TrainState, flat_items, nest
from jaxtrainer.types import PyTree


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the arrays of a state live. Makes specs, and constrains what is traced.

    Attributes:
        mesh: The devices.
        specs: How each parameter is divided, by name; those that are whole are not there.
        gathered: The axes along which parameters are kept in parts, and used whole: those that
            divide the batch, too.
        undivided: Parameters that were to be divided, and whose shapes do not allow it.
    """

    mesh: Mesh
    specs: Mapping[str, P] = field(default_factory=dict)
    gathered: tuple[str, ...] = ()
    undivided: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every device holds all of every parameter."""
        return not self.specs

    def of_params(self, params: PyTree) -> PyTree:
        """Return the shardings of parameters, or of anything else with their names and shapes."""
        return nest({name: self._sharding(name) for name, _ in flat_items(params)})

    def of_variables(self, params: Nested, model_state: Nested) -> tuple[Nested, Nested]:
        """Return the specs of `(params, model_state)`; what is no parameter is whole."""
        placed = jax.tree.map(_spec, params, self.of_params(params))
        return placed, jax.tree.map(self._whole, model_state)

    def of_averaged(self, averaged: Nested) -> Nested:
        """Return the specs of averaged weights, see `averaging.init_average`."""
        if not averaged:
            return averaged
        params = jax.tree.map(_spec, averaged["params"], self.of_params(averaged["params"]))
        return {**jax.tree.map(self._whole, averaged), "params": params}

    def of_state(self, state: TrainState) -> TrainState:
        """Return the specs of a state: what has a parameter's name and shape lives where it does.

        Args:
            state: Abstract or real.
        """
        params, model_state = self.of_variables(state.params, state.model_state)
        whole = jax.tree.map(self._whole, state)
        if self.is_whole:
            return whole
        shapes = {name: x.shape for name, x in flat_items(state.params)}
        return whole._replace(
            params=params,
            model_state=model_state,
            opt_state=self._following(state.opt_state, shapes),
            accumulated=self._following(state.accumulated, shapes),
            averaged=self.of_averaged(state.averaged),
        )

    def place(self, variables: tuple[Nested, Nested]) -> tuple[Nested, Nested]:
        """Return `(params, model_state)` on the devices, each array where it lives."""
        specs = self.of_variables(*variables)
        return jax.tree.map(lambda x, spec: place(x, spec.sharding), variables, specs)

    def keep(self, state: TrainState) -> TrainState:
        """Return a state constrained to where it lives (traced)."""
        if self.is_whole:
            return state
        return _constrained(state, jax.tree.map(lambda x: x.sharding, self.of_state(state)))

    def keep_params(self, params: Nested) -> Nested:
        """Return gradients, or what else has the names of parameters, where those live (traced).

        Said of gradients, so that each device keeps its part of their sum and no more.
        """
        return params if self.is_whole else _constrained(params, self.of_params(params))

    def whole_params(self, params: Nested) -> Nested:
        """Return parameters as a step uses them: gathered from their parts (traced)."""
        if not self.gathered:
            return params
        spec_of = {name: _without(spec, self.gathered) for name, spec in self.specs.items()}
        divided = {
            name: jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec_of[name]))
            for name, x in flat_items(params)
            if name in spec_of
        }
        return nest({**dict(flat_items(params)), **divided})

    def regathering(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a loss function that keeps no gathered parameter for the backward pass.

        They are gathered once more there, as Rajbhandari et al., "ZeRO", 2020, do in stage 3;
        else the parameters of all layers would be whole at its end.
        """
        if not self.gathered:
            return loss_fn
        return jax.checkpoint(loss_fn, policy=_is_kept)

    def divided_batch(self, batch: PyTree) -> PyTree:
        """Return a batch with its rows divided over the devices (traced).

        Said where parameters are divided too, so that these are what moves.
        """

        def constrain(x: Any) -> Any:
            if not x.ndim or x.shape[0] % num_data_shards(self.mesh):
                return x
            where = batch_sharding(self.mesh, x.shape[0], stacked=False)
            return jax.lax.with_sharding_constraint(x, where)

        return batch if self.is_whole else jax.tree.map(constrain, batch)

    def compiler_options(self) -> dict[str, Any]:
        """Return what XLA has to be told so that gathered parameters do not pile up.

        On a CPU it would gather all of them at the start, and add up all gradients in one
        operation: no device would hold less. On GPU and TPU both are the defaults.
        """
        if not self.gathered or self.mesh.devices.flat[0].platform != "cpu":
            return {}
        return {
            "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
            "xla_disable_hlo_passes": "cpu-all-reduce-combiner",
        }

    def _sharding(self, name: str) -> NamedSharding:
        return NamedSharding(self.mesh, self.specs.get(name, P()))

    def _whole(self, leaf: Any) -> jax.ShapeDtypeStruct:
        return _spec(leaf, NamedSharding(self.mesh, P()))

    def _following(self, tree: PyTree, shapes: Mapping[str, tuple[int, ...]]) -> PyTree:
        def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            name = next((n for n in _names_in(path) if n in shapes), None)
            # Statistics of rows and columns (Adafactor's) have the name and another shape.
            if name is None or shapes[name] != leaf.shape:
                return self._whole(leaf)
            return _spec(leaf, self._sharding(name))

        return jax.tree_util.tree_map_with_path(place, tree)


def axes_of(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _names_in(path: tuple[Any, ...]) -> Iterator[str]:
    """Yield the names that may end a path, longest first: that of a parameter is one of them."""
    keys: list[str] = []
    for key in reversed(path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        keys.insert(0, str(key.key))
    for start in range(len(keys)):
        yield "/".join(keys[start:])


def _is_kept(prim: Any, *_: Any, **params: Any) -> bool:
    # A constraint is a copy at most, but for those that gather.
    return prim.name != "sharding_constraint"


def _constrained(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def _spec(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _without(spec: P, axes: Collection[str]) -> P:
    entries = [tuple(a for a in axes_of(entry) if a not in axes) for entry in spec]
    return P(*(e if len(e) > 1 else e[0] if e else None for e in entries))
