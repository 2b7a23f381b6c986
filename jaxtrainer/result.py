"""What `fit` returns, and how results are shown: as a table, as curves, as a page.

May import levels 0 to 2, and rich to draw.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxtrainer.account import Account, saved_in
from jaxtrainer.display.sparkline import Sparkline
from jaxtrainer.environment import environment
from jaxtrainer.figure import draw
from jaxtrainer.metrics import is_private
from jaxtrainer.page import write_report
from jaxtrainer.places import place
from jaxtrainer.records import unix_time_s
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
        call_s: Seconds of this call.
        best_checkpoint: Directory of the best checkpoint, if any was saved.
        last_checkpoint: Directory of the newest.
        config: Options of the trainer, hyper-parameters of the module, callbacks.
        notices: The lines that the run had for its user.
    """

    history: History
    metrics: dict[str, float]
    stop_reason: str
    num_epochs: int
    num_steps: int
    num_samples: int
    elapsed_s: float
    timings: dict[str, float] = field(default_factory=dict)
    call_s: float = 0.0
    best_checkpoint: str | None = None
    last_checkpoint: str | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    notices: Sequence[str] = field(default=(), repr=False)

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
            call_s=run.timings.elapsed_s,
            best_checkpoint=run.best_checkpoint,
            last_checkpoint=run.last_checkpoint,
            config=run.config,
            notices=tuple(run.notices),
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the training curves, one panel for each family of metrics.

        Args:
            path: Where to save them too, as PNG, SVG or PDF: `"curves.png"`.

        Returns:
            The Matplotlib figure. Without a path `matplotlib.pyplot.show()` shows it; a notebook
            shows it by itself.

        Raises:
            MissingExtraError: Without Matplotlib, naming the command that installs it.
            ConfigError: If nothing was logged, or for a path of another kind.

        Example:
            >>> # result.plot("curves.png")
        """
        return draw(self.history, path, num_epochs=self.num_epochs)

    def report(self, path: str | os.PathLike[str] = "report.html") -> Path:
        """Write a page about the run that opens in a browser: one file, without a server.

        It has the curves, the configuration, the environment, timings and checkpoints. Nothing in
        it is fetched or executed. Values of settings that are named as secrets are left out.

        Args:
            path: Of the file, or a directory that gets a `report.html`.

        Returns:
            The file.

        Raises:
            ConfigError: For a name that a browser would not open as a page, or a URL.

        Example:
            >>> # result.report("runs/mnist/report.html")
        """
        return write_report(self.account(), path)

    def account(self) -> Account:
        """Return all that a report of the run shows, with the environment of this process."""
        paths = [path for path in (self.best_checkpoint, self.last_checkpoint) if path]
        folders = list(dict.fromkeys(place(path).parent for path in paths))
        return Account(
            name=folders[-1].name if folders else "run",
            history=self.history,
            stop_reason=self.stop_reason,
            num_epochs=self.num_epochs,
            num_steps=self.num_steps,
            num_samples=self.num_samples,
            elapsed_s=self.elapsed_s,
            call_s=self.call_s,
            timings=self.timings,
            config=self.config,
            environment=environment(),
            notices=self.notices,
            written_at=datetime.fromtimestamp(unix_time_s()).astimezone().isoformat(" ", "seconds"),
            best_checkpoint=self.best_checkpoint,
            checkpoints=tuple(saved for folder in folders for saved in saved_in(folder)),
        )

    def __rich__(self) -> Group:
        table = Table(title=f"fit: {self.stop_reason}", title_justify="left", show_header=False)
        table.add_row("epochs", f"{self.num_epochs}")
        table.add_row("steps", f"{self.num_steps}")
        table.add_row("samples", f"{self.num_samples}")
        table.add_row("time", f"{self.elapsed_s:.2f} s")
        for name, value in self.metrics.items():
            table.add_row(name, f"{value:.5g}", *self._sparkline(name))
        return Group(table, *map(Text, self._places()))

    def __str__(self) -> str:
        # Whole lines: a path that is cut or wrapped is none to copy.
        return "\n".join([render(self.__rich__().renderables[0]), *self._places()])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # What IPython and notebooks show of a result that a cell returns.
        printer.text(str(self))

    def _sparkline(self, name: str) -> list[Sparkline]:
        tables = (self.history.epoch, self.history.step)
        series = [table[name].values for table in tables if len(table.get(name, ())) > 1]
        return [Sparkline(values) for values in series[:1]]

    def _places(self) -> list[str]:
        known = (("best", self.best_checkpoint), ("last", self.last_checkpoint))
        return [f"{name} checkpoint: {path}" for name, path in known if path]


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
