"""`ModelSummary`: prints what the model is made of, before training."""

from __future__ import annotations

import jax
import rich
from rich.console import Console

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.run import Run
from jaxtrainer.summary import Summary, summarize


class ModelSummary(Callback):
    """Print the tree of modules when `fit` starts: classes, shapes, sizes, what trains, the step.

    Made from the names and shapes of the state and from the compiled step: the model is not run,
    and no array is read. Below the modules is what `Trainer.plan` says: memory, and the operations
    of a step.

    The column FLOPs has the operations of one step in each module, forward and backward, those of
    the modules below it included, on one device. They are counted in a trace of the step; a module
    that is called twice has those of both calls, and what is computed outside of the modules' own
    methods is that of the model as a whole: it is in no row. See `Plan.module_flops`. Without NNX
    modules there is no such column.

    Args:
        max_depth: Levels of modules to show; -1 shows all, 0 the totals only.
        console: Where to print it; the console that `rich.print` uses by default.

    Attributes:
        summary: The `Summary`, once `fit` has started.

    Raises:
        ConfigError: For a depth below -1.

    Example:
        >>> callback = ModelSummary(max_depth=2)
    """

    @checks_options
    def __init__(self, *, max_depth: int = 1, console: Console | None = None) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ConfigError(f"max_depth must be -1 (all), 0 or more, got {max_depth!r}.")
        self.max_depth = max_depth
        self.console = console
        self.summary: Summary | None = None

    def on_fit_start(self, run: Run) -> None:
        """Print it, in one process only."""
        state, plan = run.state, run.plan
        self.summary = summarize(
            state.params,
            state.model_state,
            max_depth=self.max_depth,
            types=plan.modules,
            frozen=plan.frozen,
            flops={path: flops.total for path, flops in plan.module_flops.items()},
            figures=plan.figures(),
        )
        if jax.process_index() == 0:
            (self.console or rich.get_console()).print(self.summary)
