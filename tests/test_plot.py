"""Training curves: which panel a series is in, where epochs are marked, what is drawn and saved."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

import jaxtrainer
from jaxtrainer import FitResult, History
from jaxtrainer.account import Account, write_account
from jaxtrainer.curves import epoch_ends, panels_of, some_epochs
from jaxtrainer.errors import ConfigError, MissingExtraError, RunDirError

mpl.use("agg")


def make_history(epochs: int = 3) -> History:
    history = History()
    for epoch in range(epochs):
        for step in (4, 8):
            at = 8 * epoch + step
            history.add(
                "step", {"train/loss": 1.0 / at, "learning_rate": 0.1}, step=at, epoch=epoch
            )
        means = {"train/loss": 1.0 / (epoch + 1), "val/loss": 1.1 / (epoch + 1), "val/acc": 0.5}
        history.add("epoch", means, step=8 * (epoch + 1), epoch=epoch)
    return history


def make_result(history: History) -> FitResult:
    counts: Any = {"num_epochs": 3, "num_steps": 24, "num_samples": 192}
    return FitResult(history=history, metrics={}, stop_reason="max_epochs", elapsed_s=1.0, **counts)


def test_panels_have_the_losses_first_and_train_and_val_together():
    panels = panels_of(make_history())
    assert [panel.title for panel in panels] == ["loss", "acc", "learning_rate"]
    assert panels[0].names == ["train/loss", "val/loss"]
    assert [(line.kind, line.is_faint) for line in panels[0].lines] == [
        ("step", True),
        ("epoch", False),
        ("epoch", False),
    ]


def test_panel_is_logarithmic_where_values_span_three_decades():
    history = History()
    for step, (loss, score) in enumerate([(1000.0, 10.0), (math.nan, 0.0), (0.5, 5000.0)], 1):
        history.add("step", {"loss": loss, "score": score}, step=step, epoch=0)
    assert [panel.is_log for panel in panels_of(history)] == [True, False]


def test_epochs_end_at_their_last_step():
    history = make_history(2)
    # A validation within the epoch, and an epoch that was cut short.
    history.add("epoch", {"val/loss": 1.0}, step=12, epoch=1)
    history.add("epoch", {"val/loss": 1.0}, step=19, epoch=2)
    assert epoch_ends(history) == {1: 8, 2: 16, 3: 19}
    assert epoch_ends(history, num_epochs=2) == {1: 8, 2: 16}


def test_marked_epochs_are_few_and_round():
    ends = {epoch: 10 * epoch for epoch in range(1, 101)}
    assert list(some_epochs(ends, 10)) == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert some_epochs(ends, 200) == ends
    assert some_epochs({}, 5) == {}


def test_plot_draws_the_values_of_the_history():
    history = make_history()
    figure = make_result(history).plot()
    loss = figure.axes[0]
    means = next(line for line in loss.lines if line.get_label() == "val/loss")
    assert list(means.get_xdata()) == history.epoch["val/loss"].steps
    assert list(means.get_ydata()) == history.epoch["val/loss"].values
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train/loss", "val/loss"]
    (above,) = loss.child_axes
    assert list(above.get_xticks()) == [8, 16, 24]


@pytest.mark.parametrize(
    ("name", "start"), [("curves.png", b"\x89PNG"), ("curves.svg", b"<?xml"), ("c.pdf", b"%PDF")]
)
def test_plot_saves_what_the_name_says(tmp_path: Path, name: str, start: bytes):
    figure = make_result(make_history()).plot(tmp_path / "new" / name)
    assert isinstance(figure, Figure)
    assert (tmp_path / "new" / name).read_bytes().startswith(start)


def test_plot_of_a_directory_is_that_of_the_run(tmp_path: Path):
    write_account(tmp_path, Account(name="mine", history=make_history(), num_epochs=3))
    figure = jaxtrainer.plot(tmp_path, tmp_path / "curves.svg")
    assert figure.get_suptitle() == "mine"
    assert len(figure.axes) == 3


def test_plot_can_be_read_on_light_and_on_dark(tmp_path: Path):
    figure = make_result(make_history()).plot(tmp_path / "curves.png")
    assert figure.patch.get_alpha() == 0.0
    for color in {line.get_color() for axes in figure.axes for line in axes.lines}:
        luminance = mpl.colors.rgb_to_hsv(mpl.colors.to_rgb(color))[2]  # pyright: ignore
        assert 0.45 < luminance < 0.95, color


def test_plot_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="there is nothing to plot: the run has no series"):
        make_result(History()).plot()


def test_plot_to_a_name_without_a_format_is_refused_with_the_call():
    with pytest.raises(ConfigError, match=r"end it in \.png, \.svg or \.pdf: `result\.plot"):
        make_result(make_history()).plot("curves.jpgg")


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'jaxtrainer\[plot\]'"):
        make_result(make_history()).plot(tmp_path / "curves.png")
    assert not [*tmp_path.iterdir()]


def test_plot_of_a_directory_without_a_record_says_how_to_leave_one(tmp_path: Path):
    (tmp_path / "step_8").mkdir()
    with pytest.raises(RunDirError, match=r"but step_8\. A run leaves .*callbacks=\[Report\("):
        jaxtrainer.plot(tmp_path)
