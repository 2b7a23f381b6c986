"""The bar in a notebook: one output that is drawn over, and lines below it as text."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jaxtrainer.callbacks import ProgressBar
from jaxtrainer.display.notebook import is_notebook
from jaxtrainer.run import Run

Drawn = list[dict[str, str]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What was drawn in the one output, by a stand-in for IPython."""
    drawn: Drawn = []

    def update(data: dict[str, str], *, raw: bool) -> None:
        assert raw
        drawn.append(data)

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert display_id
        assert not drawn
        update(data, raw=raw)
        return SimpleNamespace(update=update)

    page = ModuleType("IPython.display")
    page.display = display  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "IPython.display", page)
    monkeypatch.setattr("jaxtrainer.display.notebook.importlib.util.find_spec", lambda _: "found")
    return drawn


def train(**options: Any) -> None:
    run = Run(num_batches=4)
    bar = ProgressBar(console=Console(force_jupyter=True), refresh_per_second=0, **options)
    bar.setup(run)
    bar.on_compile_start(run, "train step")
    bar.on_compile_end(run, "train step", 1.0)
    for epoch in range(2):
        bar.on_train_epoch_start(run)
        run.advance(4, 4)
        run.metrics["train/loss"] = 0.5
        print(f"of the user, epoch {epoch}")
        bar.on_train_epoch_end(run)
        run.next_epoch()
    bar.teardown(run)


def test_lines_of_a_notebook_are_one_text_with_those_of_the_user(
    drawn: Drawn, capsys: pytest.CaptureFixture[str]
):
    train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compiled train step in 1.00 s"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "of the user, epoch 0",
        "Epoch 1",
        "of the user, epoch 1",
        "Epoch 2",
    ]


def test_frames_of_a_notebook_are_drawn_over_and_leave_nothing(drawn: Drawn):
    train()
    assert drawn[0]["text/plain"].startswith("preparing ...")
    assert any("compiling train step" in data["text/plain"] for data in drawn)
    bars = [data["text/html"] for data in drawn if data["text/plain"].startswith("Epoch 1")]
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in bars[0]
    assert all(page.count("<pre") == 1 for page in bars)
    assert drawn[-1] == {"text/plain": ""}


def test_notebook_is_one_with_ipython_only(monkeypatch: pytest.MonkeyPatch):
    console = Console(force_jupyter=True)
    monkeypatch.setattr("jaxtrainer.display.notebook.importlib.util.find_spec", lambda _: None)
    assert not is_notebook(console)
