"""Streaming metrics: what `log` records while tracing, and its running totals on the device.

All scalars of a step travel as one float32 vector, and the totals of an epoch as one
`[4, num_entries]` array, so that a hundred logged values cost no more leaves than one.
Imports `errors`, `types` and `flax_metrics` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from jaxtrainer.errors import LogError
from jaxtrainer.flax_metrics import mean_of_metric
from jaxtrainer.types import Array, Reduce, Stage

PREFIX: dict[str, str] = {"train": "train", "validate": "val", "test": "test", "predict": "predict"}
TOTAL, TOTAL_ERROR, WEIGHT, WEIGHT_ERROR = range(4)


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """How one logged name is reported.

    Attributes:
        every: Of what an update logs: it is computed, and so reported, near multiples of this
            many batches only, and is -inf elsewhere. 0 for what each step logs.
        shape: Of a private series it may be other than `()`; an array reports epochs only.
    """

    name: str
    reduce: Reduce
    prog_bar: bool
    on_step: bool
    on_epoch: bool
    every: int = 0
    shape: tuple[int, ...] = ()

    def is_reported(self, value: float, batch: int) -> bool:
        """Return whether a step's value is reported after that many batches of the run."""
        is_known = not self.every or (batch % self.every == 0 and value != -math.inf)
        return self.on_step and is_known


def is_private(name: str) -> bool:
    """Return whether a series is for a callback only: its name has `_` first."""
    return name.rsplit("/", 1)[-1].startswith("_")


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

        takes_arrays: Whether a private series may be an array.

    Attributes:
        metrics: The Flax metrics that were logged.
    """

    stage: Stage
    default_weight: float | Array = 1.0
    specs: dict[str, MetricSpec] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    takes_arrays: bool = True

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
        """Record one scalar; see `TrainModule.log`.

        A private series (its name has `_` first) may be an array. It is reduced over the epoch
        element by element, and is then in `run.arrays`.
        """
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
        if (mean := mean_of_metric(name, value)) is not None:
            if weight is not None or reduce != "mean":
                raise LogError(
                    f"log({name!r}) got a {type(value).__name__}, whose mean and weight are its "
                    f"own; leave out `weight` and `reduce`, or log `metric.compute()`."
                )
            self.metrics.append(value)
            value, weight = mean
        array = _recorded(name, value, "value", any_shape=self.takes_arrays and is_private(key))
        training = self.stage == "train" and not array.shape
        self.specs[key] = MetricSpec(
            name=key,
            reduce=reduce,
            prog_bar=prog_bar,
            on_step=training if on_step is None else on_step,
            on_epoch=True if on_epoch is None else on_epoch,
            shape=array.shape,
        )
        weight = self.default_weight if weight is None else weight
        self.values[key] = array
        self.weights[key] = _recorded(name, weight, "weight")

    def _check_trace(self, name: str) -> None:
        if get_opaque_trace_state(convention="nnx") != self._trace:
            raise LogError(
                f"log({name!r}) was called inside a nested transform (grad, vmap, scan, jit, ...), "
                "which its value cannot leave. Return the value from the transformed function "
                "(`has_aux=True`, or an output of the scan) and log it outside."
            )

    def row(self) -> Array:
        """Return the values, in the order logged: `[num_entries]`, float32."""
        return _flat(self.values.values())

    def weight_row(self) -> Array:
        """Return the weight of each entry: `[num_entries]`, float32."""
        weights = self.weights.items()
        return _flat(jnp.broadcast_to(w, self.specs[key].shape) for key, w in weights)


def _flat(values: Iterable[Array]) -> Array:
    return jnp.concatenate([jnp.zeros((0,), jnp.float32), *map(jnp.ravel, values)])


def _recorded(name: str, value: Any, what: str, *, any_shape: bool = False) -> Array:
    array = as_array(value)
    if array is None:
        raise LogError(
            f"log({name!r}) got a {what} of type {type(value).__name__}; pass a scalar: a number "
            "or an array of shape ()."
        )
    if array.size != 1 and not any_shape:
        raise LogError(
            f"log({name!r}) got a {what} of shape {array.shape}; it records scalars: "
            f"`log({name!r}, jnp.mean(value))`."
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise LogError(f"log({name!r}) got a complex {what}; log its real part or modulus.")
    return (array.reshape(()) if array.size == 1 else array).astype(jnp.float32)


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
    mean = mean_of_metric(name, value)
    try:
        array = np.asarray(value if mean is None else mean[0])
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
        sizes = np.array([math.prod(s.shape) for s in specs], int)
        kinds = np.repeat(np.array([s.reduce for s in specs], str), sizes)
        self._is_min, self._is_max, self._is_mean = (kinds == k for k in ("min", "max", "mean"))
        self.shape = (4, int(sizes.sum()))
        self._starts = np.cumsum(sizes) - sizes
        self._is_scalar = np.array([not s.shape for s in specs], bool)
        self.num_scalars = int(self._is_scalar.sum())

    def initial(self) -> np.ndarray:
        """Return the totals of nothing: `[4, num_entries]`, float32."""
        totals = np.zeros(self.shape, np.float32)
        totals[TOTAL] = np.where(self._is_min, np.inf, np.where(self._is_max, -np.inf, 0.0))
        return totals

    def update(self, totals: Array, row: Array, weights: Array) -> Array:
        """Add one step's values and weights (traced)."""
        # The mean of nothing is no number, and has no part in a mean.
        weighted = jnp.where(weights == 0.0, 0.0, row * weights)
        added = jnp.where(self._is_mean, weighted, row)
        total, error = _add(totals[TOTAL], totals[TOTAL_ERROR], added)
        if self._is_min.any() or self._is_max.any():
            extreme = self._is_min | self._is_max
            kept = jnp.where(
                self._is_min, jnp.minimum(totals[TOTAL], row), jnp.maximum(totals[TOTAL], row)
            )
            total, error = jnp.where(extreme, kept, total), jnp.where(extreme, 0.0, error)
        weight, weight_error = _add(totals[WEIGHT], totals[WEIGHT_ERROR], weights)
        return jnp.stack([total, error, weight, weight_error])

    def scalars(self, row: Array) -> Array:
        """Return the scalars of a step's values: `[num_scalars]` of `[num_entries]` (traced)."""
        return row if self._is_scalar.all() else row[self._starts[self._is_scalar]]

    def compute(self, totals: np.ndarray) -> dict[str, float]:
        """Return the epoch values of the scalars that report epochs, from totals on the host."""
        values = zip(self.specs, self._values(totals)[self._starts], strict=True)
        return {s.name: float(v) for s, v in values if s.on_epoch and not s.shape}

    def arrays(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        """Return the epoch values of the series that are arrays: float64."""
        values, starts = self._values(totals), zip(self.specs, self._starts, strict=True)
        return {
            s.name: values[start : start + math.prod(s.shape)].reshape(s.shape)
            for s, start in starts
            if s.shape
        }

    def _values(self, totals: np.ndarray) -> np.ndarray:
        t = np.asarray(totals, np.float64)
        total, weight = t[TOTAL] - t[TOTAL_ERROR], t[WEIGHT] - t[WEIGHT_ERROR]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self._is_mean, total / weight, total)

    def step_values(self, row: np.ndarray, batch: int = 0) -> dict[str, float]:
        """Return what is reported of one step, the `batch`-th batch of the run."""
        scalars = (spec for spec in self.specs if not spec.shape)
        values = zip(scalars, row.tolist(), strict=True)
        return {spec.name: value for spec, value in values if spec.is_reported(value, batch)}


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
        self._names = {s.name: i for i, s in enumerate(s for s in specs if not s.shape)}
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
