"""What `fit` returns, and how results are shown. Imports `run` only, and rich to draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.table import Table

from jaxtrainer.metrics import is_private
from jaxtrainer.run import History, Run


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a call of `Trainer.fit` did.

    Attributes:
        history: Every logged series, at steps and at epoch ends.
        metrics: The last epoch mean of every series; of those without one, the last value.
        stop_reason: `"max_epochs"`, `"max_steps"`, `"max_time"`, `"interrupted"`, or a callback's.
        num_epochs: Epochs completed, those before a resume included.
        num_steps: Optimiser updates, likewise.
        num_samples: Samples trained on, likewise.
        elapsed_s: Seconds, likewise.
        timings: Seconds of this call by phase, see `Timings`.
        best_checkpoint: Directory of the best checkpoint, if any was saved.
        last_checkpoint: Directory of the newest.
    """

    history: History
    metrics: dict[str, float]
    stop_reason: str
    num_epochs: int
    num_steps: int
    num_samples: int
    elapsed_s: float
    timings: dict[str, float] = field(default_factory=dict)
    best_checkpoint: str | None = None
    last_checkpoint: str | None = None

    @classmethod
    def of(cls, run: Run) -> FitResult:
        """Return the result of a run that has ended."""
        # A resumed run that had nothing left to do has values, and no history.
        known = {name: value for name, value in run.metrics.items() if not is_private(name)}
        return cls(
            history=run.history,
            metrics={**known, **{name: run.history[name].values[-1] for name in run.history}},
            stop_reason=run.stop_reason,
            num_epochs=run.epoch,
            num_steps=run.global_step,
            num_samples=run.samples,
            elapsed_s=run.elapsed_s,
            timings=dict(run.timings.seconds),
            best_checkpoint=run.best_checkpoint,
            last_checkpoint=run.last_checkpoint,
        )

    def __rich__(self) -> Table:
        table = Table(title=f"fit: {self.stop_reason}", title_justify="left", show_header=False)
        table.add_row("epochs", f"{self.num_epochs}")
        table.add_row("steps", f"{self.num_steps}")
        table.add_row("samples", f"{self.num_samples}")
        table.add_row("time", f"{self.elapsed_s:.2f} s")
        for name, value in self.metrics.items():
            table.add_row(name, f"{value:.5g}")
        for name, path in (("best", self.best_checkpoint), ("last", self.last_checkpoint)):
            if path:
                table.add_row(f"{name} checkpoint", path)
        return table

    def __str__(self) -> str:
        return render(self.__rich__())


def metrics_table(title: str, metrics: Mapping[str, float]) -> Table:
    """Return a table of the metrics of one evaluation."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.5g}")
    return table


def render(table: RenderableType, width: int = 80) -> str:
    """Return what rich draws as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")
