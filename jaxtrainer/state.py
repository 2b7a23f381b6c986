"""`TrainState` as plain nested dicts of arrays, and the way between dicts and a user's model.

`nnx.split` and `nnx.merge` cost a thousand Python calls, so they run while tracing only; the
loop hands dicts to the compiled step. May import what is at or below level 1.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxtrainer.errors import ConfigError, StepError
from jaxtrainer.modules import module_types
from jaxtrainer.types import Array, PyTree

Nested = dict[str, Any]


class TrainState(NamedTuple):
    """Everything that decides the next number, on the device.

    Attributes:
        batch_count: Batches trained on so far: `[]`, int32.
        params: Trainable arrays, nested dicts.
        model_state: Every other variable of the model: statistics, RNG counters, your own.
        opt_state: `{optimiser name: Optax state}`.
        rng: Words of the key from which the keys of each step are folded: `[2]`, uint32.
        totals: Running totals of the epoch's metrics: `[4, num_metrics]`, float32.
        accumulated: What an accumulation window adds up, see `update.init_opt_state`, or `{}`.
        averaged: Averaged weights, see `averaging.init_average`, or `{}`.
        guard: Counters of batches that were left out, see `guard.init_guard`, or `{}`.
    """

    batch_count: Any
    params: Any
    model_state: Any
    opt_state: Any
    rng: Any
    totals: Any
    accumulated: Any
    averaged: Any
    guard: Any


class Adapter(Protocol):
    """Between a kind of model and the two nested dicts of its arrays.

    `split` is called on the model that `configure_model` returns and learns its structure;
    the other two need it.

    Attributes:
        types: Class name of each module of the model by its path, in the order of definition;
            known after `split`.
    """

    types: dict[str, str]

    def split(self, model: Any) -> tuple[Nested, Nested]:
        """Return `(params, model_state)` of a model, and remember its structure."""
        ...

    def merge(self, params: Nested, model_state: Nested, *, training: bool) -> Any:
        """Return the model in training or evaluation mode."""
        ...

    def read_back(self, model: Any, *, where: str) -> tuple[Nested, Nested]:
        """Return both after a step; raise StepError for changes that jit would lose."""
        ...

    def write(self, model: Any, params: Nested, model_state: Nested) -> Any:
        """Return the model with these arrays: the same, in place, if it can be changed."""
        ...

    def variables(self, params: Nested) -> dict[str, tuple[tuple[Any, ...], Any]]:
        """Return the path and the abstract variable of each parameter, for NNX filters."""
        ...


def adapter_for(model: Any) -> Adapter:
    """Return the adapter for an `nnx.Module` or for any other pytree with arrays.

    Raises:
        ConfigError: For `nnx.Module`s in a plain dict, list or tuple.
    """
    if isinstance(model, nnx.Module):
        return NNXAdapter()
    leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Module))
    if any(isinstance(leaf, nnx.Module) for leaf in leaves):
        # As a pytree it would train BatchNorm's statistics, and never be in evaluation mode.
        raise ConfigError(
            f"the model is a {type(model).__name__} of `nnx.Module`s; make it one module: "
            "`return nnx.Dict(generator=..., critic=...)`, or `nnx.List([...])`."
        )
    return PytreeAdapter()


class NNXAdapter:
    """Flax NNX: params are `nnx.Param`, model state is every other variable."""

    def split(self, model: nnx.Module) -> tuple[Nested, Nested]:
        """See `Adapter.split`."""
        _adopt_traced_arrays(model)
        self.types = module_types(model)
        self._graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        self._params, self._rest = _Layout(params), _Layout(rest)
        self._variables = dict(_variables(abstract(params)))
        if not self._params.names:
            raise ConfigError(
                f"the model is of type {type(model).__name__}, without an `nnx.Param`: there is "
                "nothing to train. Return a model with e.g. an `nnx.Linear` from `configure_model`."
            )
        return self._params.to_dict(params), self._rest.to_dict(rest)

    def merge(self, params: Nested, model_state: Nested, *, training: bool) -> nnx.Module:
        """See `Adapter.merge`."""
        states = self._params.to_tree(params), self._rest.to_tree(model_state)
        # copy=True: without it a merge inside `grad` may not be mutated there.
        model = nnx.merge(self._graphdef, *states, copy=True)
        view = nnx.view(
            model,
            # Any method called on an `nnx.Rngs` draws a key, also the one that sets a mode.
            only=nnx.Not(nnx.Rngs),
            raise_if_not_found=False,
            deterministic=not training,
            use_running_average=not training,
        )
        self._before = _static_attributes(view)
        return view

    def read_back(self, model: nnx.Module, *, where: str) -> tuple[Nested, Nested]:
        """See `Adapter.read_back`."""
        _check_static(self._before, _static_attributes(model), where)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        layouts = _Layout(params), _Layout(rest)
        for layout, old in zip(layouts, (self._params, self._rest), strict=True):
            if layout.treedef != old.treedef:
                changed = sorted(set(layout.names) ^ set(old.names)) or layout.names
                raise StepError(
                    f"{where} added or removed model variables: {', '.join(changed)}. "
                    "Create every variable in `configure_model`, so that its shape is known."
                )
        return layouts[0].to_dict(params), layouts[1].to_dict(rest)

    def write(self, model: nnx.Module, params: Nested, model_state: Nested) -> nnx.Module:
        """See `Adapter.write`."""
        nnx.update(model, self._params.to_tree(params), self._rest.to_tree(model_state))
        return model

    def variables(self, params: Nested) -> dict[str, tuple[tuple[Any, ...], Any]]:
        """See `Adapter.variables`."""
        return self._variables


class PytreeAdapter:
    """Any other pytree: Equinox modules, Linen variables, a dict of arrays.

    Floating-point arrays are params, other arrays are model state, what is no array is static.
    In a dict with a `"params"` entry (Linen's variables) only that entry is trained; what the
    step assigns to the other entries (`model["batch_stats"] = ...`) is carried on.
    """

    def split(self, model: PyTree) -> tuple[Nested, Nested]:
        """See `Adapter.split`."""
        leaves, self._treedef = jax.tree.flatten(model)
        self.types = module_types(model)
        self._is_linen = isinstance(model, dict) and "params" in model
        paths = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]]
        self._static = [None if _is_array(leaf) else leaf for leaf in leaves]
        kinds = [self._kind(p, leaf) for p, leaf in zip(paths, leaves, strict=True)]
        self._slots = list(zip(kinds, paths, strict=True))
        self._impls = _key_impls(zip(paths, leaves, strict=True))
        if "param" not in kinds:
            raise ConfigError(
                f"the model is {_described(model)} without a floating-point array: there is "
                "nothing to train. Return an `nnx.Module` or a pytree of arrays from "
                f"`configure_model`{_instead(model)}."
            )
        return self._collect("param", leaves), self._collect("state", leaves)

    def merge(self, params: Nested, model_state: Nested, *, training: bool) -> PyTree:
        """See `Adapter.merge`."""
        tables = {"param": dict(flat_items(params)), "state": dict(flat_items(model_state))}
        leaves = [
            static if kind == "static" else _typed(tables[kind][path], self._impls.get(path))
            for (kind, path), static in zip(self._slots, self._static, strict=True)
        ]
        return _in_mode(jax.tree.unflatten(self._treedef, leaves), training=training)

    def read_back(self, model: PyTree, *, where: str) -> tuple[Nested, Nested]:
        """See `Adapter.read_back`."""
        leaves, treedef = jax.tree.flatten(model)
        if treedef != self._treedef:
            raise StepError(
                f"{where} changed the structure of the model:\n{self._treedef}\n{treedef}"
            )
        return self._collect("param", leaves), self._collect("state", leaves)

    def write(self, model: PyTree, params: Nested, model_state: Nested) -> PyTree:
        """See `Adapter.write`."""
        new = self.merge(params, model_state, training=True)
        if not isinstance(model, dict):
            return new
        model.clear()
        model.update(new)
        return model

    def variables(self, params: Nested) -> dict[str, tuple[tuple[Any, ...], Any]]:
        """See `Adapter.variables`."""
        return {name: (tuple(name.split("/")), leaf) for name, leaf in flat_items(params)}

    def _kind(self, path: str, leaf: Any) -> str:
        if not _is_array(leaf):
            return "static"
        trainable = path.split("/")[0] == "params" if self._is_linen else True
        return "param" if trainable and jnp.issubdtype(leaf.dtype, jnp.inexact) else "state"

    def _collect(self, kind: str, leaves: list[Any]) -> Nested:
        slots = zip(self._slots, leaves, strict=True)
        return nest({path: _words(leaf) for (k, path), leaf in slots if k == kind})


def _in_mode(model: PyTree, *, training: bool) -> PyTree:
    """Set the `inference` flags of Equinox layers (Dropout, BatchNorm), which are leaves."""
    equinox = sys.modules.get("equinox")
    return model if equinox is None else equinox.nn.inference_mode(model, value=not training)


class _Layout:
    """The names and tree of an `nnx.State`, to go between it and a nested dict.

    Typed PRNG keys are kept as their words: passing a typed key to a compiled program costs
    several microseconds of Python, and words can be saved as they are.
    """

    def __init__(self, state: Any) -> None:
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(state)
        self.names = [_path(path) for path, _ in flat]
        self._impls = _key_impls((_path(path), leaf) for path, leaf in flat)

    def to_dict(self, state: Any) -> Nested:
        leaves = jax.tree.leaves(state)
        return nest({n: _words(leaf) for n, leaf in zip(self.names, leaves, strict=True)})

    def to_tree(self, nested: Nested) -> Any:
        table = dict(flat_items(nested))
        leaves = [_typed(table[n], self._impls.get(n)) for n in self.names]
        return jax.tree.unflatten(self.treedef, leaves)


def _variables(state: Any) -> Iterator[tuple[str, tuple[tuple[Any, ...], Any]]]:
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    for path, variable in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)[0]:
        for below, _ in jax.tree_util.tree_flatten_with_path(variable)[0]:
            yield _path((*path, *below)), (tuple(key.key for key in path), variable)


def nest(flat: Mapping[str, Any]) -> Nested:
    """Turn `{"a/b": x}` into `{"a": {"b": x}}`.

    Example:
        >>> nest({"dense/kernel": 1, "dense/bias": 2})
        {'dense': {'kernel': 1, 'bias': 2}}
    """
    nested: Nested = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        table = nested
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return nested


def flat_items(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `("a/b", x)` for every array of a nested dict."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of an `nnx.State` or another pytree by the names of `flat_items`."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def abstract(tree: PyTree) -> PyTree:
    """Return the tree with a `jax.ShapeDtypeStruct` in place of each array."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def size_of(tree: PyTree) -> tuple[int, int]:
    """Return `(number of elements, bytes)` of the arrays of a tree, allocated or abstract."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape")]
    count = sum(int(np.prod(x.shape)) for x in leaves)
    return count, sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)


def _is_key(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impls(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: jax.random.key_impl(leaf) for name, leaf in named if _is_key(leaf)}


def _words(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _typed(leaf: Any, impl: Any) -> Any:
    return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)


def _path(path: tuple[Any, ...]) -> str:
    # NNX ends each path with the `.value` of the Variable, which says nothing.
    keys = [k for k in path if not (isinstance(k, jax.tree_util.GetAttrKey) and k.name == "value")]
    return "/".join(jax.tree_util.keystr((k,), simple=True).replace("/", "_") for k in keys) or "_"


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _described(model: Any) -> str:
    if isinstance(model, type):
        return f"the class {model.__name__},"
    return f"of type {type(model).__name__},"


def _instead(model: Any) -> str:
    if isinstance(model, type):
        return f": `return {model.__name__}(..., rngs=rngs)`"
    is_linen = type(model).__module__.startswith("flax.linen") or hasattr(model, "init_with_output")
    return ": `return module.init(rngs.params(), x)`, Linen's variables" if is_linen else ""


def _adopt_traced_arrays(model: nnx.Module) -> None:
    # NNX takes an array attribute for data, but not a traced one, and under jit all of them are.
    for _, module in nnx.iter_modules(model):
        for name, value in list(vars(module).items()):
            if isinstance(value, Tracer):
                setattr(module, name, nnx.data(value))


def _static_attributes(model: nnx.Module) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        path: {
            k: _copied(v)
            for k, v in vars(module).items()
            if not k.startswith("_") and _is_static(v)
        }
        for path, module in nnx.iter_modules(model)
    }


def _is_static(value: Any) -> bool:
    # A traced array is static to NNX: whatever the step sets to one would be lost.
    if isinstance(value, Tracer) or not isinstance(value, nnx.Variable | nnx.Pytree | Array):
        return not _holds_variables(value)
    return False


def _holds_variables(value: Any) -> bool:
    # The bridge to Linen keeps its variables in plain dicts.
    leaves = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return any(isinstance(leaf, nnx.Variable) for leaf in leaves)


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, list | dict | set) else value


def _check_static(before: dict, after: dict, where: str) -> None:
    for path, attributes in after.items():
        for name, value in attributes.items():
            old = before.get(path, {}).get(name, _check_static)
            if old is not value and not _equal(old, value):
                label = ".".join(str(p) for p in (*path, name))
                raise StepError(
                    f"{where} set the model's attribute `{label}` while tracing, a change that the "
                    "compiled step would not repeat. Make it an `nnx.Variable` and assign "
                    f"`model.{label}[...] = value`."
                )


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:
        return False
