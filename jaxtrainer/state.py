"""`TrainState` as plain nested dicts of arrays, and the way between dicts and a user's model.

`nnx.split` and `nnx.merge` cost a thousand Python calls, so they run while tracing only; the
loop hands dicts to the compiled step. May import what is at or below level 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtrainer.errors import ConfigError, StepError
from jaxtrainer.types import Array, PyTree

Nested = dict[str, Any]


class TrainState(NamedTuple):
    """Everything that decides the next number, on the device.

    Attributes:
        batch_count: Batches trained on so far: `[]`, int32.
        params: Trainable arrays, nested dicts.
        model_state: Every other variable of the model: statistics, RNG counters, your own.
        opt_state: `{optimiser name: Optax state}`.
        rng: Key from which the keys of each step are folded: `[]`, typed PRNG key.
        totals: Running totals of the epoch's metrics: `[4, num_metrics]`, float32.
        accumulated: `{"grads": ..., "weight": ...}` of an open accumulation window, or `{}`.
    """

    batch_count: Any
    params: Any
    model_state: Any
    opt_state: Any
    rng: Any
    totals: Any
    accumulated: Any


class Adapter(Protocol):
    """Between a kind of model and the two nested dicts of its arrays.

    `split` is called on the model that `configure_model` returns and learns its structure;
    the other two need it.
    """

    def split(self, model: Any) -> tuple[Nested, Nested]:
        """Return `(params, model_state)` of a model, and remember its structure."""
        ...

    def merge(self, params: Nested, model_state: Nested, *, training: bool) -> Any:
        """Return the model in training or evaluation mode."""
        ...

    def read_back(self, model: Any, *, where: str) -> tuple[Nested, Nested]:
        """Return both after a step; raise StepError for changes that jit would lose."""
        ...


def adapter_for(model: Any) -> Adapter:
    """Return the adapter for an `nnx.Module` or for any other pytree with arrays."""
    return NNXAdapter() if isinstance(model, nnx.Module) else PytreeAdapter()


class NNXAdapter:
    """Flax NNX: params are `nnx.Param`, model state is every other variable."""

    def split(self, model: nnx.Module) -> tuple[Nested, Nested]:
        """See `Adapter.split`."""
        self._graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        self._params, self._rest = _Layout(params), _Layout(rest)
        if not self._params.names:
            raise ConfigError(
                f"configure_model returned a {type(model).__name__} without an `nnx.Param`: "
                "there is nothing to train."
            )
        return self._params.to_dict(params), self._rest.to_dict(rest)

    def merge(self, params: Nested, model_state: Nested, *, training: bool) -> nnx.Module:
        """See `Adapter.merge`."""
        states = self._params.to_tree(params), self._rest.to_tree(model_state)
        # copy=True: without it a merge inside `grad` may not be mutated there.
        model = nnx.merge(self._graphdef, *states, copy=True)
        view = nnx.view(
            model,
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
        layout = _Layout(rest)
        if layout.treedef != self._rest.treedef:
            changed = sorted(set(layout.names) ^ set(self._rest.names)) or layout.names
            raise StepError(
                f"{where} added or removed model variables: {', '.join(changed)}. "
                "Create every variable in `configure_model`, so that its shape is known."
            )
        return self._params.to_dict(params), layout.to_dict(rest)


class PytreeAdapter:
    """Any other pytree: Equinox modules, Linen variables, a dict of arrays.

    Floating-point arrays are params, other arrays are model state, what is no array is static.
    In a dict with a `"params"` entry (Linen's variables) only that entry is trained; what the
    step assigns to the other entries (`model["batch_stats"] = ...`) is carried on.
    """

    def split(self, model: PyTree) -> tuple[Nested, Nested]:
        """See `Adapter.split`."""
        leaves, self._treedef = jax.tree.flatten(model)
        self._is_linen = isinstance(model, dict) and "params" in model
        paths = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]]
        self._static = [None if _is_array(leaf) else leaf for leaf in leaves]
        kinds = [self._kind(p, leaf) for p, leaf in zip(paths, leaves, strict=True)]
        self._slots = list(zip(kinds, paths, strict=True))
        if "param" not in kinds:
            raise ConfigError(
                f"configure_model returned {type(model).__name__} without a floating-point array: "
                "there is nothing to train. Return an `nnx.Module` or a pytree of arrays."
            )
        return self._collect("param", leaves), self._collect("state", leaves)

    def merge(self, params: Nested, model_state: Nested, *, training: bool) -> PyTree:
        """See `Adapter.merge`."""
        tables = {"param": dict(flat_items(params)), "state": dict(flat_items(model_state))}
        leaves = [
            static if kind == "static" else tables[kind][path]
            for (kind, path), static in zip(self._slots, self._static, strict=True)
        ]
        return jax.tree.unflatten(self._treedef, leaves)

    def read_back(self, model: PyTree, *, where: str) -> tuple[Nested, Nested]:
        """See `Adapter.read_back`."""
        leaves, treedef = jax.tree.flatten(model)
        if treedef != self._treedef:
            raise StepError(f"{where} changed the structure of the model:\n{self._treedef}\n{treedef}")
        return self._collect("param", leaves), self._collect("state", leaves)

    def _kind(self, path: str, leaf: Any) -> str:
        if not _is_array(leaf):
            return "static"
        trainable = path.split("/")[0] == "params" if self._is_linen else True
        return "param" if trainable and jnp.issubdtype(leaf.dtype, jnp.inexact) else "state"

    def _collect(self, kind: str, leaves: list[Any]) -> Nested:
        slots = zip(self._slots, leaves, strict=True)
        return nest({path: leaf for (k, path), leaf in slots if k == kind})


class _Layout:
    """The names and tree of an `nnx.State`, to go between it and a nested dict."""

    def __init__(self, state: Any) -> None:
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(state)
        self.names = [_path(path) for path, _ in flat]

    def to_dict(self, state: Any) -> Nested:
        return nest(dict(zip(self.names, jax.tree.leaves(state), strict=True)))

    def to_tree(self, nested: Nested) -> Any:
        table = dict(flat_items(nested))
        return jax.tree.unflatten(self.treedef, [table[name] for name in self.names])


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


def abstract(tree: PyTree) -> PyTree:
    """Return the tree with a `jax.ShapeDtypeStruct` in place of each array."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def size_of(tree: PyTree) -> tuple[int, int]:
    """Return `(number of elements, bytes)` of the arrays of a tree, allocated or abstract."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape")]
    count = sum(int(np.prod(x.shape)) for x in leaves)
    return count, sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)


def _path(path: tuple[Any, ...]) -> str:
    # NNX ends each path with the `.value` of the Variable, which says nothing.
    keys = [k for k in path if not (isinstance(k, jax.tree_util.GetAttrKey) and k.name == "value")]
    return "/".join(jax.tree_util.keystr((k,), simple=True).replace("/", "_") for k in keys) or "_"


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _static_attributes(model: nnx.Module) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        path: {k: v for k, v in vars(module).items() if not k.startswith("_") and _is_static(v)}
        for path, module in nnx.iter_modules(model)
    }


def _is_static(value: Any) -> bool:
    return not isinstance(value, nnx.Variable | nnx.Pytree | Array | dict)


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
