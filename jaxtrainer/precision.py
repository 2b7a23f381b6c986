"""Which dtypes parameters are kept in, and which the step computes in.

Imports `errors`, `patterns` and `types` only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.patterns import covers
from jaxtrainer.types import PyTree


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """How the loss is scaled for float16, whose smallest number is 6e-8.

    Gradients are taken of the loss times the scale, and divided by it in float32, so that they do
    not vanish on the way. A batch whose gradients are not finite is left out, and the scale falls;
    after `growth_interval` batches without one it rises. With powers of two both are exact.

    Args:
        init_scale: The scale at first.
        growth_factor: What it is multiplied by when it rises.
        backoff_factor: What it is multiplied by when it falls.
        growth_interval: Batches without an overflow after which it rises.
        min_scale: It does not fall below. A batch that is not finite there is not one that a
            scale can help: it is what a `NonFinite` is for.

    Raises:
        ConfigError: For values that cannot work.

    References:
        Micikevicius et al., "Mixed precision training", 2018, section 3.2.
    """

    init_scale: float = 2.0**15
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 1.0

    def __post_init__(self) -> None:
        wrong = {
            "init_scale": self.init_scale < self.min_scale,
            "growth_factor": self.growth_factor <= 1,
            "backoff_factor": not 0 < self.backoff_factor < 1,
            "growth_interval": self.growth_interval < 1,
            "min_scale": self.min_scale <= 0,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(
                f"LossScale({name}={getattr(self, name)!r}) cannot work: the scale rises from "
                "init_scale by a growth_factor above 1 every growth_interval (1 or more) batches, "
                "and falls by a backoff_factor between 0 and 1 to min_scale, above 0."
            )


_DTYPES: dict[str, tuple[Any, Any]] = {
    "32-true": (None, None),
    "bf16-mixed": (None, jnp.bfloat16),
    "bf16-true": (jnp.bfloat16, jnp.bfloat16),
    "16-mixed": (None, jnp.float16),
}
"""Dtype of stored parameters and of the computation, by name; None leaves them as they are."""

_ALIASES = {"32": "32-true", "float32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


@dataclass(frozen=True)
class Precision:
    """Dtypes of stored parameters and of the computation.

    Args:
        name: `"32-true"` for float32 throughout; `"bf16-mixed"` and `"16-mixed"` for parameters in
            float32 and the computation in bfloat16 or float16; `"bf16-true"` for bfloat16
            throughout, optimiser state included.
        overrides: Dtype to compute in by path of a module or parameter, e.g. `{"head": "float32",
            "*/norm": "float32"}`, the first that matches. Such a module, with all below it, gets
            its parameters and floating-point inputs in that dtype, and every other module that
            has parameters gets its inputs in the precision's own. NNX models only.
        loss_scale: How the loss is scaled, with `"16-mixed"`.

    Raises:
        ConfigError: For a name or dtype that does not exist, with the close match.

    Example:
        >>> Precision("bf16-mixed", overrides={"head": "float32"}).dtype_of("head/kernel")
        dtype('float32')
    """

    name: str = "32-true"
    _: KW_ONLY
    overrides: Mapping[str, Any] = field(default_factory=dict)
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        name = _ALIASES.get(str(self.name), str(self.name))
        if name not in _DTYPES:
            known = ", ".join(map(repr, _DTYPES))
            hint = did_you_mean(name, _DTYPES)
            raise ConfigError(f"precision={self.name!r} is not known; use one of {known}.{hint}")
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(
                f"overrides={self.overrides!r}: pass dtypes by path, `{{'head': 'float32'}}`."
            )
        is_scaled = name == "16-mixed"
        if self.loss_scale is not None and not is_scaled:
            raise ConfigError(
                f"precision {name!r} needs no loss scale, which is for float16; leave out "
                "loss_scale, or use `Precision('16-mixed', loss_scale=...)`."
            )
        overrides = {pattern: _dtype(pattern, x) for pattern, x in self.overrides.items()}
        self._set(name=name, overrides=overrides)
        self._set(loss_scale=(self.loss_scale or LossScale()) if is_scaled else None)

    @property
    def params(self) -> Any:
        """Return the dtype that parameters are kept in; None for that of the model."""
        return _DTYPES[self.name][0]

    @property
    def compute(self) -> Any:
        """Return the dtype of the computation; None for that of the parameters."""
        return _DTYPES[self.name][1]

    def override_of(self, path: str) -> Any:
        """Return the dtype that `overrides` gives a module or parameter, or None."""
        return next((x for pattern, x in self.overrides.items() if covers(pattern, path)), None)

    def dtype_of(self, path: str) -> Any:
        """Return the dtype that a module or parameter of that path is computed in, or None."""
        override = self.override_of(path)
        return self.compute if override is None else override

    def cast_to_compute(self, tree: PyTree) -> PyTree:
        """Cast the floating-point arrays of a tree to the compute dtype (traced)."""
        return cast(tree, self.compute)

    def cast_params(self, params: PyTree) -> PyTree:
        """Cast parameters, nested dicts by name, to what each is computed in (traced)."""
        if not self.overrides:
            return self.cast_to_compute(params)

        def of_name(path: Any, leaf: Any) -> Any:
            return cast(leaf, self.dtype_of("/".join(key.key for key in path)))

        return jax.tree_util.tree_map_with_path(of_name, params)

    def cast_to_params(self, tree: PyTree) -> PyTree:
        """Cast the floating-point arrays of a tree to the dtype parameters are kept in."""
        return cast(tree, self.params)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def parse_precision(value: Any) -> Precision:
    """Return the policy of that name, or the one given.

    Raises:
        ConfigError: If there is none, naming the close match.
    """
    return value if isinstance(value, Precision) else Precision(value)


_TORCH = {"medium": "bfloat16"}
"""Words of `torch.set_float32_matmul_precision` that mean something else to JAX, or nothing."""


def check_matmul_precision(value: str | None) -> str | None:
    """Return the option, or raise ConfigError unless JAX knows the word."""
    if value is None:
        return None
    try:
        with jax.default_matmul_precision(value):
            return value
    except (ValueError, TypeError):
        words = ("default", "tensorfloat32", "high", "highest", "bfloat16", "float32")
        hint = f" Write {_TORCH[value]!r}." if value in _TORCH else did_you_mean(str(value), words)
        raise ConfigError(
            f"matmul_precision={value!r} is not known; use one of {', '.join(map(repr, words))}, "
            f"or a name of `jax.lax.DotAlgorithmPreset`.{hint}"
        ) from None


def matmuls_in(value: str | None) -> AbstractContextManager[Any]:
    """Return a context in which matrix products are traced with that precision."""
    return nullcontext() if value is None else jax.default_matmul_precision(value)


def tracing_matmuls(
    value: str | None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function so that its matrix products are traced with that precision."""

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def traced(*args: Any) -> Any:
            with matmuls_in(value):
                return fn(*args)

        return fn if value is None else traced

    return wrap


def wide(dtype: Any) -> Any:
    """Return the dtype in which to add up values of a dtype: float32 or wider.

    In bfloat16 a sum or an average would round away what each value adds.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def widened(tree: PyTree) -> PyTree:
    """Cast a tree to the dtypes in which to add its values up (traced)."""
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf is a floating-point array."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Cast the floating-point arrays of a tree; a dtype of None leaves them."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if is_floating(x) else x, tree)


def _dtype(pattern: str, value: Any) -> Any:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if value is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        words = ("float32", "bfloat16", "float16")
        hint = did_you_mean(str(value), words)
        raise ConfigError(
            f"overrides={{{pattern!r}: {value!r}}}: pass a floating-point dtype, one of "
            f"{', '.join(map(repr, words))}.{hint}"
        )
    return dtype
