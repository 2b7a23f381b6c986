"""What is read of a run from its directory: a record, the lines of a logger, or both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer import History
from jaxtrainer.account import Account, joined, read_account, saved_in, write_account
from jaxtrainer.errors import ConfigError, RunDirError


def row(kind: str, step: int, **values: Any) -> dict[str, Any]:
    axes = {"step": step, "epoch": step // 9, "samples": 8 * step, "elapsed_s": 0.5 * step}
    return {"kind": kind, **axes, "unix_time_s": 1.7e9, **values}


ROWS = [
    row("hyperparameters", 0, values={"module": {"width": 8}}),
    row("step", 4, **{"train/loss": 1.0}),
    row("step", 8, **{"train/loss": "NaN"}),
    row("epoch", 8, **{"train/loss": 0.75, "val/loss": 0.5}),
    row("image", 8, name="digits", file="images/digits_8.png"),
    row("end", 8, status="finished", reason="max_epochs", metrics={"val/loss": 0.5}),
]


def write_lines(folder: Path, rows: list[dict[str, Any]], rest: str = "") -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + rest, encoding="utf-8")
    return folder


def history_of(*steps: int) -> History:
    history = History()
    for step in steps:
        history.add("step", {"train/loss": float(step)}, step=step, epoch=0)
    return history


def test_account_is_read_as_it_was_written(tmp_path: Path):
    history = history_of(1, 2)
    history.add("epoch", {"val/loss": math.inf}, step=2, epoch=0)
    account = Account(name="mine", history=history, num_epochs=1, config={"a": {"b": math.nan}})
    write_account(tmp_path, account)
    found = read_account(tmp_path)
    assert found.history == history
    assert (found.name, found.num_epochs) == ("mine", 1)
    assert math.isnan(found.config["a"]["b"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_account_of_lines_has_their_curves_and_settings(tmp_path: Path):
    found = read_account(write_lines(tmp_path, ROWS))
    assert found.history.epoch["val/loss"].values == [0.5]
    assert found.history.step["train/loss"].steps == [4, 8]
    assert math.isnan(found.history.step["train/loss"].values[1])
    assert found.config == {"module": {"width": 8}}
    assert (found.stop_reason, found.num_steps) == ("max_epochs", 8)
    assert (found.num_samples, found.elapsed_s) == (64, 4.0)


def test_account_of_a_run_that_was_killed_leaves_out_half_a_line(tmp_path: Path):
    found = read_account(write_lines(tmp_path, ROWS[:3], rest='{"kind": "step", "st'))
    assert found.history.step["train/loss"].steps == [4, 8]
    assert found.stop_reason == ""


def test_account_of_tables_has_their_curves(tmp_path: Path):
    head = "step,epoch,samples,elapsed_s,unix_time_s,"
    (tmp_path / "steps.csv").write_text(
        f"{head}train/loss,lr\n4,0,32,0.5,1.7,1.0,\n8,0,64,1,2,,2\n"
    )
    (tmp_path / "epochs.csv").write_text(f"{head}val/loss\n8,0,64,1.0,1.7,0.5\n")
    (tmp_path / "hyperparameters.json").write_text('{"module": {"width": 8}}')
    found = read_account(tmp_path)
    assert found.config == {"module": {"width": 8}}
    assert found.history.step["train/loss"].steps == [4]
    assert found.history.step["lr"].values == [2.0]
    assert found.history.epoch["val/loss"].values == [0.5]


def test_lines_that_go_on_after_the_record_count(tmp_path: Path):
    write_account(tmp_path, Account(num_steps=4, stop_reason="max_steps", environment={"jax": "1"}))
    found = read_account(write_lines(tmp_path, ROWS[:4]))
    assert (found.stop_reason, found.num_steps, found.environment) == ("", 8, {"jax": "1"})


def test_record_of_the_same_run_completes_the_lines(tmp_path: Path):
    write_account(tmp_path, Account(num_steps=8, num_epochs=1, stop_reason="max_epochs"))
    found = read_account(write_lines(tmp_path, ROWS))
    assert (found.num_epochs, found.config) == (1, {})
    assert found.history.step["train/loss"].steps == [4, 8]


def test_joined_histories_have_each_point_once():
    whole = joined(history_of(1, 2, 3, 4), history_of(3, 4, 5))
    assert whole.step["train/loss"].steps == [1, 2, 3, 4, 5]
    assert joined(history_of(1, 2), History()) == history_of(1, 2)


def test_account_of_a_line_in_the_middle_that_is_none_is_refused(tmp_path: Path):
    folder = write_lines(tmp_path, ROWS[:2], rest='{"kind":\n' + json.dumps(ROWS[3]))
    with pytest.raises(RunDirError, match=r"metrics\.jsonl cannot be read as the record"):
        read_account(folder)


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("missing", RunDirError, "missing is no directory; pass the directory of a run"),
        ("s3://bucket/runs/x", ConfigError, "is a URL"),
    ],
)
def test_account_of_no_directory_is_refused(
    tmp_path: Path, path: str, error: type[Exception], words: str
):
    with pytest.raises(error, match=words):
        read_account(path if "://" in path else tmp_path / path)


def test_damaged_checkpoint_is_listed_without_a_score(tmp_path: Path):
    (tmp_path / "step_4" / "record").mkdir(parents=True)
    (tmp_path / "step_4" / "record" / "metadata").write_text("{}")
    (saved,) = saved_in(tmp_path)
    assert (saved.step, saved.score, saved.size_bytes) == (4, None, 2)
