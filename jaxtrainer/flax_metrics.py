"""Values of `flax.nnx.metrics`, as `log` takes them: a mean and its weight.

Imports `errors` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jaxtrainer.errors import LogError

Average, Welford = nnx.metrics.Average, nnx.metrics.Welford


def mean_of_metric(name: str, metric: Any) -> tuple[jax.Array, jax.Array] | None:
    """Return the mean that a Flax metric holds, and its weight; None for anything else.

    Args:
        name: What it is logged as, for messages.
        metric: An `Average`, a subclass that computes what it does (`Accuracy`), or a `Welford`.

    Returns:
        The mean, which is NaN before any update, and the number of values: `[]`, float32.

    Raises:
        LogError: For a metric that is no mean.

    Example:
        >>> loss = Average()
        >>> loss.update(values=jax.numpy.array([1.0, 2.0, 6.0]))
        >>> mean, weight = mean_of_metric("loss", loss)
        >>> float(mean), float(weight)
        (3.0, 3.0)
    """
    if not isinstance(metric, nnx.metrics.Metric):
        return None
    if isinstance(metric, Average) and type(metric).compute is Average.compute:
        weight = metric.count[...].astype(jax.numpy.float32)
        return metric.total[...] / weight, weight
    if isinstance(metric, Welford) and type(metric).compute is Welford.compute:
        weight = metric.count[...].astype(jax.numpy.float32)
        return jax.numpy.where(weight > 0.0, metric.mean[...], jax.numpy.nan), weight
    instead = "log the scalars that its `compute()` returns"
    if isinstance(metric, nnx.MultiMetric):
        instead = f"log each of its metrics: `self.log('{name}/loss', metrics.loss)`"
    raise LogError(
        f"log({name!r}) got a {type(metric).__name__}, which is no mean of values that could go on "
        f"over the epoch; {instead}."
    )


def refuse_kept(metrics: Sequence[Any], model: Any, where: str) -> None:
    """Raise LogError if a metric that a step has logged is a part of the model.

    Its totals would be those of all steps so far, and each of them would count again.
    """
    if not metrics or not isinstance(model, nnx.Module):
        return
    parts = {id(node): path for path, node in nnx.iter_graph(model)}
    for metric in metrics:
        if id(metric) in parts:
            name = ".".join(map(str, parts[id(metric)]))
            raise LogError(
                f"{where} logged `model.{name}`, which goes on from step to step; `log` sums over "
                "the epoch itself. Make the metric in the step: "
                f"`metric = nnx.metrics.{type(metric).__name__}()`, update it, and log it."
            )
