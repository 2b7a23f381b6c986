"""`GradientMonitor`: norms and histograms of gradients, by module, at reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrainer.callback import Callback
from jaxtrainer.errors import checks_options
from jaxtrainer.options import check_count
from jaxtrainer.run import Run
from jaxtrainer.state import flat_items
from jaxtrainer.types import Array, LogFn, PyTree

BINS = 32
FIRST_EDGE, LAST_EDGE = 1e-9, 1e1
"""Magnitudes below the first edge, zero included, and from the last edge on, have a bin each."""

_TOTAL, _HISTOGRAM = "total", "grad_hist"


class GradientMonitor(Callback):
    """Record the norms of gradients, parameters and updates of each module.

    Computed in the compiled step, at the steps of a report only, and fetched with the report.
    Series are `grad_norm/NAME`, `param_norm/NAME` and `update_norm/NAME`, one for each module and
    one called `total`: Euclidean norms over all arrays of the module. Gradients are those before
    clipping, and under accumulation the mean of the latest complete window.

    Args:
        depth: Levels of the model's tree to tell apart: with 1 `encoder`, with 2
            `encoder/layer1`, and so on; 0 for the total alone.
        every_n_steps: Look every this many steps, a multiple of the trainer's
            `log_every_n_steps`, which is the default.
        histograms: Count the gradients' magnitudes too (with depth 1 or more), for the loggers
            as well, as `grad_hist/NAME`. It makes the row
            that each step writes longer by 32 numbers for each module.

    Attributes:
        edges: Magnitudes between the bins of a histogram: `[31]`, float64, log-spaced.
        histograms: By module, of this call of `fit`, a list of `(optimiser step, counts)` with
            counts `[32]`, float64: the first bin is of what is smaller than the first edge, the
            last of what is not smaller than the last edge, or no number.

    Raises:
        ConfigError: For a value out of range; when the step is built, if `every_n_steps` is no
            multiple of `log_every_n_steps`.

    Example:
        >>> monitor = GradientMonitor(depth=2, histograms=True)
    """

    may_log = False

    @checks_options
    def __init__(
        self, *, depth: int = 1, every_n_steps: int | None = None, histograms: bool = False
    ) -> None:
        self.depth = check_count("depth", depth, 0)
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps)
        self.traced_update_every = every_n_steps
        self.edges = np.geomspace(FIRST_EDGE, LAST_EDGE, BINS - 1)
        self.histograms: dict[str, list[tuple[int, np.ndarray]]] = {}
        self._counts = histograms

    def setup(self, run: Run) -> None:
        """Forget the histograms of an earlier call."""
        if run.stage == "fit":
            self.histograms = {}

    def traced_update(self, grads: PyTree, params: PyTree, updates: PyTree, log: LogFn) -> None:
        """Log the norms, and a count for each bin (traced)."""
        for kind, tree in (("grad", grads), ("param", params), ("update", updates)):
            squares = {k: sum(map(_square, arrays)) for k, arrays in self._groups(tree).items()}
            for name, square in squares.items():
                log(f"{kind}_norm/{name}", jnp.sqrt(square))
            log(f"{kind}_norm/{_TOTAL}", jnp.sqrt(sum(map(_square, jax.tree.leaves(tree)))))
        for name, arrays in self._groups(grads).items() if self._counts else ():
            counts = sum(map(self._histogram, arrays), jnp.zeros(BINS, jnp.int32))
            for i in range(BINS):
                log(f"{_HISTOGRAM}/{name}/_{i}", counts[i])

    def on_report(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        """Assemble the histograms of the reported step."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        for series in metrics if self._counts else ():
            kind, _, rest = series.partition("/")
            if kind == _HISTOGRAM:
                found[rest.rpartition("/")[0]].append(metrics[series])
                # A checkpoint keeps the newest value of every series, and these are many.
                run.metrics.pop(series, None)
        for name, counts in found.items():
            self.histograms.setdefault(name, []).append((step, np.array(counts)))
            edges = [0.0, *self.edges, np.inf]
            run.log_histogram(f"{_HISTOGRAM}/{name}", counts, edges=edges, step=step)

    def _groups(self, tree: PyTree) -> dict[str, list[Array]]:
        groups: defaultdict[str, list[Array]] = defaultdict(list)
        for path, leaf in flat_items(tree) if self.depth else ():
            groups["/".join(path.split("/")[: self.depth])].append(leaf)
        return groups

    def _histogram(self, array: Array) -> Array:
        size = jnp.abs(array).astype(jnp.float32).reshape(1, -1)
        size = jnp.where(jnp.isnan(size), jnp.inf, size)
        # Compared with every edge: sums, which a device is good at, in place of scattered adds.
        above = jnp.sum(size >= self.edges.astype(np.float32).reshape(-1, 1), axis=1)
        above = jnp.concatenate([jnp.array([array.size]), above, jnp.zeros((1,), above.dtype)])
        return above[:-1] - above[1:]


def _square(array: Array) -> Array:
    return jnp.sum(jnp.square(jnp.abs(array).astype(jnp.float32)))
