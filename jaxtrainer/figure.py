"""Training curves with Matplotlib, an optional package that is imported on first use.

May import levels 0 to 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtrainer.account import read_account
from jaxtrainer.curves import Line, Panel, epoch_ends, panels_of, some_epochs
from jaxtrainer.display.text import fit
from jaxtrainer.errors import ConfigError, MissingExtraError
from jaxtrainer.run import History

_COLORS = ("#3b82d6", "#e07a1f", "#2f9e62", "#d1495b", "#8a63d2", "#9a7b4f", "#d16ba5", "#5f8a8b")
"""Middle tones, which are seen on white and on black."""
_GREY = "#808080"
_WIDTH, _HEIGHT = 6.4, 3.4
_LONGEST = 60
"""Characters of a name; what is longer would be cut off by the edge."""
_DENSE = 300
"""Points of a line from which on it is drawn thin."""
_SUFFIXES = (".png", ".svg", ".pdf")


def plot(run_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Any:
    """Draw the training curves of a run from its directory; see `FitResult.plot`.

    Args:
        run_dir: Where a `Report` or a logger to CSV or JSON lines has written.
        path: Where to save them too, as PNG, SVG or PDF.

    Returns:
        The Matplotlib figure.

    Raises:
        RunDirError: If nothing there has the curves of a run.
        MissingExtraError: Without Matplotlib, naming the command that installs it.

    Example:
        >>> # jaxtrainer.plot("runs/mnist", "curves.png")
    """
    account = read_account(run_dir)
    return draw(account.history, path, num_epochs=account.num_epochs, title=account.name)


def draw(
    history: History,
    path: str | os.PathLike[str] | None = None,
    *,
    num_epochs: int | None = None,
    title: str = "",
) -> Any:
    """Draw a history as one panel for each family of metrics, steps on the x axis.

    Values of single steps are faint where the means of epochs are there too. The background is
    transparent and the text grey, so that the picture can be read on light and on dark.

    Args:
        history: What to draw.
        path: Where to save it as well, as PNG, SVG or PDF; None saves nothing.
        num_epochs: Epochs that were completed, see `epoch_ends`.
        title: Above all panels.

    Returns:
        The Matplotlib figure.

    Raises:
        MissingExtraError: Without Matplotlib.
        ConfigError: If nothing was logged, or for a path of another kind.
    """
    panels = panels_of(history)
    if not panels:
        raise ConfigError(
            "there is nothing to plot: the run has no series. Train at least one step, and "
            "report more often with `Trainer(log_every_n_steps=...)`."
        )
    file = None if path is None else _checked(path)
    ends = some_epochs(epoch_ends(history, num_epochs), 10)
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure = _new_figure((columns * _WIDTH, rows * _HEIGHT), shown=file is None)
    figure.patch.set_alpha(0.0)
    for number, panel in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(rows, columns, number), panel, ends)
    if title:
        figure.suptitle(title, color=_GREY)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    return figure


def _checked(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"plot({os.fspath(path)!r}): the name says the format, so end it in "
            f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}: `result.plot('curves.png')`."
        )
    return file


def _new_figure(size: tuple[float, float], *, shown: bool) -> Any:
    options = {"figsize": size, "layout": "constrained"}
    if not shown:
        # One that pyplot does not know needs no display, and is freed when it is dropped.
        with _importing():
            from matplotlib.figure import Figure
        return Figure(**options)
    with _importing():
        import matplotlib
        from matplotlib import pyplot
    figure = pyplot.figure(**options)
    if "inline" in matplotlib.get_backend():
        # A notebook shows what a cell returns, and open figures once more.
        pyplot.close(figure)
    return figure


@contextmanager
def _importing() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            "plotting needs Matplotlib: `pip install 'jaxtrainer[plot]'`. "
            "`result.report('report.html')` draws the same curves without it."
        ) from error


def _draw_panel(axes: Any, panel: Panel, ends: Mapping[int, int]) -> None:
    axes.patch.set_alpha(0.0)
    names = panel.names
    for line in panel.lines:
        _draw_line(axes, line, _COLORS[names.index(line.name) % len(_COLORS)])
    axes.set_title(fit(panel.title, _LONGEST), color=_GREY, loc="left")
    axes.set_xlabel("step", color=_GREY, loc="right")
    if panel.is_log:
        axes.set_yscale("log")
    axes.tick_params(colors=_GREY, which="both")
    axes.grid(True, color=_GREY, alpha=0.2, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GREY)
    _mark_epochs(axes, ends)
    # Below, where it hides nothing.
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.08)}
    axes.legend(frameon=False, labelcolor=_GREY, ncols=3, fontsize=9, **place)


def _draw_line(axes: Any, line: Line, color: str) -> None:
    if line.is_faint:
        axes.plot(line.steps, line.values, color=color, alpha=0.35, linewidth=1.0)
        return
    has_dots = len(line.values) == 1 or (line.kind == "epoch" and len(line.values) <= 60)
    look = {"marker": "o" if has_dots else "None", "ms": 3.5, "color": color}
    width = 1.5 if len(line.values) <= _DENSE else 0.6
    axes.plot(line.steps, line.values, lw=width, label=fit(line.name, _LONGEST), **look)


def _mark_epochs(axes: Any, ends: Mapping[int, int]) -> None:
    if not ends:
        return
    for step in ends.values():
        axes.axvline(step, color=_GREY, alpha=0.35, linewidth=0.8, linestyle=":")
    above = axes.secondary_xaxis("top")
    above.set_xticks(list(ends.values()), _labels(list(ends)))
    above.tick_params(colors=_GREY, length=0, labelsize=8)
    above.spines["top"].set_visible(False)


def _labels(epochs: Sequence[int]) -> list[str]:
    return [f"epoch {epochs[0]}", *map(str, epochs[1:])]
