"""Streaming metrics: what `log` records while tracing, and its running totals on the device.

All scalars of a step travel as one float32 vector, and the totals of an epoch as one
`[4, num_metrics]` array, so that a hundred logged values cost no more leaves than one.
Imports `errors` and `types` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from jaxtrainer.errors import LogError
from jaxtrainer.types import Array, Reduce, Stage

PREFIX: dict[str, str] = {"train": "train", "validate": "val", "test": "test", "predict": "predict"}
TOTAL, TOTAL_ERROR, WEIGHT, WEIGHT_ERROR = range(4)


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """How one logged name is reported."""

    name: str
    reduce: Reduce
    prog_bar: bool
    on_step: bool
    on_epoch: bool


def series_name(stage: Stage, name: str) -> str:
    """Return the one name of a series: `loss` in validation is `val/loss`.

    A name that has a `/`, or begins with the stage (`val_loss`), is left as it is.

    Example:
        >>> series_name("validate", "loss"), series_name("validate", "val_loss")
        ('val/loss', 'val_loss')
    """
    prefix = PREFIX[stage]
    return name if "/" in name or name.startswith(f"{prefix}_") else f"{prefix}/{name}"


@dataclass
class Recorder:
    """Collects the scalars that one traced step logs.

    Args:
        stage: Decides prefix and defaults: a training step reports steps and epochs, an
            evaluation step epochs only.
        default_weight: Weight of a value in the epoch mean: the number of samples in the batch.
    """

    stage: Stage
    default_weight: float | Array = 1.0
    specs: dict[str, MetricSpec] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._trace = get_opaque_trace_state(convention="nnx")

    def log(
        self,
        name: str,
        value: Any,
        *,
        prog_bar: bool = False,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce: Reduce = "mean",
        weight: Any = None,
    ) -> None:
        """Record one scalar; see `TrainModule.log`."""
        if not isinstance(name, str) or not name:
            raise LogError(f"log got the name {name!r}; pass a string: `log('accuracy', value)`.")
        self._check_trace(name)
        key = series_name(self.stage, name)
        if key in self.specs:
            raise LogError(
                f"log records the series {key!r} twice in one step, now as {name!r}; give each its "
                "own name (a callback has an option for it: `Accuracy(name=...)`)."
            )
        if reduce not in ("mean", "sum", "min", "max"):
            raise LogError(f"log({name!r}, reduce={reduce!r}): use 'mean', 'sum', 'min' or 'max'.")
        training = self.stage == "train"
        self.specs[key] = MetricSpec(
            name=key,
            reduce=reduce,
            prog_bar=prog_bar,
            on_step=training if on_step is None else on_step,
            on_epoch=True if on_epoch is None else on_epoch,
        )
        self.values[key] = _scalar(name, value, "value")
        self.weights[key] = _scalar(name, self._weight(weight), "weight")

    def _weight(self, weight: Any) -> Any:
        return self.default_weight if weight is None else weight

    def _check_trace(self, name: str) -> None:
        if get_opaque_trace_state(convention="nnx") != self._trace:
            raise LogError(
                f"log({name!r}) was called inside a nested transform (grad, vmap, scan, jit, ...), "
                "which its value cannot leave. Return the value from the transformed function "
                "(`has_aux=True`, or an output of the scan) and log it outside."
            )

    def row(self) -> Array:
        """Return the values, in the order logged: `[num_metrics]`, float32."""
        return _stack(self.values)

    def weight_row(self) -> Array:
        """Return the weights: `[num_metrics]`, float32."""
        return _stack(self.weights)


def _stack(values: Mapping[str, Array]) -> Array:
    return jnp.stack(list(values.values())) if values else jnp.zeros((0,), jnp.float32)


def _scalar(name: str, value: Any, what: str) -> Array:
    array = as_array(value)
    if array is None:
        raise LogError(
            f"log({name!r}) got a {what} of type {type(value).__name__}; pass a scalar: a number "
            "or an array of shape ()."
        )
    if array.size != 1:
        raise LogError(
            f"log({name!r}) got a {what} of shape {array.shape}; it records scalars: "
            f"`log({name!r}, jnp.mean(value))`."
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise LogError(f"log({name!r}) got a complex {what}; log its real part or modulus.")
    return array.reshape(()).astype(jnp.float32)


def as_array(value: Any) -> Array | None:
    """Return a number or array as a JAX array; None for anything else."""
    if isinstance(value, str | bytes | list | tuple):
        return None
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        return None


def host_scalar(name: str, value: Any) -> float:
    """Return a value logged in a hook as a float.

    Raises:
        LogError: If it is no real scalar.
    """
    try:
        array = np.asarray(value)
        if array.size == 1:
            return float(array.reshape(()))
        got = f"shape {array.shape}"
    except (TypeError, ValueError):
        got = f"type {type(value).__name__}"
    raise LogError(f"log({name!r}) got a value of {got}; pass a scalar: a number or its mean.")


class Totals:
    """Running totals of the metrics of one stage, with compensated sums.

    float32 loses whole counts beyond 2**24; the second and fourth rows keep what each addition
    lost (Kahan 1965, "Further remarks on reducing truncation errors"), so that means stay exact
    over any number of samples.
    """

    def __init__(self, specs: tuple[MetricSpec, ...]) -> None:
        self.specs = specs
        self._is_min = np.array([s.reduce == "min" for s in specs], bool)
        self._is_max = np.array([s.reduce == "max" for s in specs], bool)
        self._is_mean = np.array([s.reduce == "mean" for s in specs], bool)
        self.shape = (4, len(specs))

    def initial(self) -> np.ndarray:
        """Return the totals of nothing: `[4, num_metrics]`, float32."""
        totals = np.zeros(self.shape, np.float32)
        totals[TOTAL] = np.where(self._is_min, np.inf, np.where(self._is_max, -np.inf, 0.0))
        return totals

    def update(self, totals: Array, row: Array, weights: Array) -> Array:
        """Add one step's values and weights (traced)."""
        added = jnp.where(self._is_mean, row * weights, row)
        total, error = _add(totals[TOTAL], totals[TOTAL_ERROR], added)
        if self._is_min.any() or self._is_max.any():
            extreme = self._is_min | self._is_max
            kept = jnp.where(
                self._is_min, jnp.minimum(totals[TOTAL], row), jnp.maximum(totals[TOTAL], row)
            )
            total, error = jnp.where(extreme, kept, total), jnp.where(extreme, 0.0, error)
        weight, weight_error = _add(totals[WEIGHT], totals[WEIGHT_ERROR], weights)
        return jnp.stack([total, error, weight, weight_error])

    def compute(self, totals: np.ndarray) -> dict[str, float]:
        """Return the epoch values of the metrics that report epochs, from totals on the host."""
        t = np.asarray(totals, np.float64)
        total, weight = t[TOTAL] - t[TOTAL_ERROR], t[WEIGHT] - t[WEIGHT_ERROR]
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(self._is_mean, total / weight, total)
        return {s.name: float(v) for s, v in zip(self.specs, values, strict=True) if s.on_epoch}

    def step_values(self, row: np.ndarray) -> dict[str, float]:
        """Return the values of one step of the metrics that report steps."""
        return {s.name: float(v) for s, v in zip(self.specs, row, strict=True) if s.on_step}


def _add(total: Array, error: Array, value: Array) -> tuple[Array, Array]:
    corrected = value - error
    new = total + corrected
    # Non-finite totals have no lost part: inf - inf would turn an infinite mean into NaN.
    lost = (new - total) - corrected
    return new, jnp.where(jnp.isfinite(new), lost, 0.0)


class LoggedOutputs(Mapping[str, Any]):
    """The scalars one step logged, as a read-only mapping over a row still on the device.

    Names are those passed to `log`, with or without the stage: `outputs["loss"]`.
    """

    def __init__(self, specs: tuple[MetricSpec, ...], rows: jax.Array, index: int) -> None:
        self._names = {s.name: i for i, s in enumerate(specs)}
        self._rows = rows
        self._index = index

    def __getitem__(self, name: str) -> jax.Array:
        for key in (name, f"train/{name}", f"val/{name}", f"test/{name}"):
            if key in self._names:
                return self._rows[self._index, self._names[key]]
        raise KeyError(f"{name!r} was not logged by the step; logged: {', '.join(self._names)}")

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
