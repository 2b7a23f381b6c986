"""Sparklines, and the table of a result that has them, at fixed widths and encodings."""

from __future__ import annotations

import io
import math
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from jaxtrainer import FitResult, History
from jaxtrainer.display.sparkline import ASCII, BLOCKS, sparkline


class File(io.StringIO):
    """A file with an encoding of its own."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._encoding


def result_of(count: int) -> FitResult:
    history = History()
    for epoch in range(count):
        values = {"train/loss": 1.0 / (1 + epoch), "val/accuracy": 0.5 + 0.1 * min(epoch, 4)}
        history.add("epoch", values, step=10 * epoch + 10, epoch=epoch)
    return FitResult(
        history=history,
        metrics={"train/loss": 0.125, "val/accuracy": 0.9},
        stop_reason="max_epochs",
        num_epochs=count,
        num_steps=10 * count,
        num_samples=80 * count,
        elapsed_s=1.5,
        best_checkpoint="/runs/" + "a" * 90 + "/step_70",
    )


def printed(result: FitResult, width: int, encoding: str = "utf-8", **options: object) -> str:
    file = File(encoding)
    console = Console(file=file, width=width, **options)  # pyright: ignore[reportArgumentType]
    console.print(result)
    return file.getvalue()


def test_sparkline_spans_all_levels():
    assert sparkline([float(i) for i in range(8)]) == BLOCKS
    assert sparkline([float(i) for i in range(8)], levels=ASCII) == ASCII


def test_sparkline_of_many_values_has_their_means():
    assert sparkline([0.0, 2.0, 7.0, 9.0, 14.0, 16.0], width=3) == "▁▅█"
    assert len(sparkline([float(i) for i in range(1000)], width=40)) == 40


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([2.0, 2.0, 2.0], "▄▄▄"),
        ([1.0, math.nan, 0.0], "█!▁"),
        ([math.inf, -math.inf], "!!"),
        ([-1.5e308, 1.5e308], "▁█"),
        ([0.0, 5e-324], "▁█"),
        ([], ""),
    ],
)
def test_sparkline_of_unusual_values(values: list[float], line: str):
    assert sparkline(values) == line


def test_result_at_80_columns():
    assert printed(result_of(8), 80).splitlines()[:9] == [
        "fit: max_epochs" + " " * 21,
        "┌──────────────┬────────┬──────────┐",
        "│ epochs       │ 8      │          │",
        "│ steps        │ 80     │          │",
        "│ samples      │ 640    │          │",
        "│ time         │ 1.50 s │          │",
        "│ train/loss   │ 0.125  │ █▄▃▂▂▁▁▁ │",
        "│ val/accuracy │ 0.9    │ ▁▃▄▆████ │",
        "└──────────────┴────────┴──────────┘",
    ]


def test_result_at_200_columns_has_sparklines_of_40():
    table = printed(result_of(500), 200).splitlines()[1:9]
    assert {len(line) for line in table} == {len("│ val/accuracy │ 0.125  │  │") + 40}
    assert table[5].startswith("│ train/loss   │ 0.125  │ █▂▂▂▁▁")


def test_result_in_few_columns_keeps_its_numbers():
    table = printed(result_of(500), 40).splitlines()
    assert max(map(len, table)) <= 40
    assert any("train/loss" in line and "0.125" in line for line in table)


def test_result_where_blocks_cannot_be_encoded_is_ascii():
    text = printed(result_of(8), 80, encoding="ascii")
    assert text.isascii()
    assert "| train/loss   | 0.125  | #=-.._" in text


def test_result_in_a_file_has_no_colour_and_on_a_terminal_without_colour_neither():
    assert "\x1b" not in printed(result_of(8), 80)
    on_terminal = printed(result_of(8), 80, force_terminal=True, no_color=True)
    assert not re.search(r"\x1b\[([0-9;]*;)?[349][0-7]m", on_terminal)


def test_result_as_text_has_its_paths_whole():
    result = result_of(8)
    assert str(result).splitlines()[-1] == f"best checkpoint: {result.best_checkpoint}"


def test_result_in_a_notebook_is_its_table():
    shown: list[str] = []
    result = result_of(8)
    result._repr_pretty_(SimpleNamespace(text=shown.append), False)
    assert shown == [str(result)]


def test_result_of_one_epoch_has_no_column_for_curves():
    assert printed(result_of(1), 80).splitlines()[2] == "│ epochs       │ 1      │"
