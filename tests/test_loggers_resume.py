"""Files of loggers over several calls: gone on from, never doubled, never another run's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer import Run
from jaxtrainer.callbacks import Checkpoint, NonFinite
from jaxtrainer.loggers import CSVLogger, JSONLinesLogger
from jaxtrainer.loggers.csv_logger import _Csv
from jaxtrainer.loggers.table import Table
from tests import tiny
from tests.logged import Keeps, Talkative, columns_of, points_of, read_csv, read_lines

pytestmark = pytest.mark.usefixtures("compiled_once")

FILES = ("steps.csv", "epochs.csv", "metrics.jsonl")


def fit(folder: Path, module: Any = None, *callbacks: Any, **options: Any) -> Any:
    """Two or three epochs of 8 steps, with checkpoints and both loggers in one directory."""
    saver = Checkpoint(folder, save_top_k=-1)
    loggers = [CSVLogger(folder), JSONLinesLogger(folder)]
    loaders = tiny.make_loader(), tiny.make_batches(2)
    module = Talkative() if module is None else module
    callbacks = (*callbacks, saver)
    return tiny.fit(*loaders, module=module, callbacks=callbacks, logger=loggers, **options)[0]


def written(folder: Path) -> dict[str, Any]:
    lines = read_lines(folder / "metrics.jsonl")
    kinds = {k: columns_of([x for x in lines if x["kind"] == k]) for k in ("step", "epoch")}
    csv = {name: columns_of(read_csv(folder / name)) for name in FILES[:2]}
    media = [(x["kind"], x["step"]) for x in lines if x["kind"] in ("image", "text", "histogram")]
    return {**csv, **kinds, "media": media}


def assert_one_line_a_step(folder: Path) -> None:
    for kind, name in (("step", "steps.csv"), ("epoch", "epochs.csv")):
        steps = [int(row["step"]) for row in read_csv(folder / name)]
        assert steps == sorted({*steps})
        assert [x["step"] for x in read_lines(folder / "metrics.jsonl", kind)] == steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, compiled_once: None) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    result = fit(folder, max_epochs=3)
    found = written(folder)
    assert found["step"] == points_of(result.history, "step")
    return found


def test_resumed_run_writes_what_the_uninterrupted_one_does(tmp_path: Path, whole: dict[str, Any]):
    fit(tmp_path, max_epochs=2)
    fit(tmp_path, max_epochs=3, ckpt_path="last")
    assert written(tmp_path) == whole
    assert_one_line_a_step(tmp_path)
    assert not list(tmp_path.glob("*-1.*"))
    ends = read_lines(tmp_path / "metrics.jsonl", "end")
    assert [x["step"] for x in ends] == [16, 24]


def test_lines_after_the_step_that_is_resumed_are_cut_and_kept_beside(
    tmp_path: Path, whole: dict[str, Any]
):
    fit(tmp_path, max_epochs=3)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    for step in ("step_16", "step_24"):
        shutil.rmtree(tmp_path / step)
    fit(tmp_path, max_epochs=3, ckpt_path="last")
    assert written(tmp_path) == whole
    assert_one_line_a_step(tmp_path)
    for name, content in before.items():
        kept = tmp_path / name.replace(".", "-1.")
        assert kept.read_bytes() == content


@pytest.mark.slow
def test_run_that_goes_back_to_a_checkpoint_writes_each_step_once(in_tmp_path: Path):
    tmp_path = in_tmp_path / "run"
    batches = tiny.make_batches(24)
    batches[13]["x"][:] = float("nan")
    keeps = Keeps()
    saver = Checkpoint(tmp_path, every_n_train_steps=6)
    result, _ = tiny.fit(
        batches,
        module=tiny.Tiny(tiny.line),
        callbacks=[NonFinite("restore"), saver],
        logger=[CSVLogger(tmp_path), keeps],
        max_epochs=1,
    )
    found = columns_of(read_csv(tmp_path / "steps.csv"))["train/loss"]
    steps = [step for step, _ in found]
    assert steps == sorted({*steps})
    assert steps[-1] == result.num_steps
    want = points_of(result.history, "step")["train/loss"]
    assert [p for p in found if p[0] > 12] == [p for p in want if p[0] > 12]


def test_files_of_another_run_are_kept_under_another_name(tmp_path: Path):
    loggers = [CSVLogger(tmp_path), JSONLinesLogger(tmp_path)]
    trainer = tiny.make_trainer(logger=loggers, max_epochs=1)
    for _ in range(2):
        trainer.fit(Talkative(), tiny.make_loader(), tiny.make_batches(1))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        f"{stem}{number}{ending}"
        for stem, ending in (
            *(("epochs", ".csv"), ("steps", ".csv"), ("hyperparameters", ".json")),
            *(("images", ""), ("metrics", ".jsonl")),
        )
        for number in ("", "-1")
    )
    assert written(tmp_path)["step"]["train/loss"][-1][0] == 8


def test_sigterm_leaves_whole_logs(tmp_path: Path):
    class Kills(Talkative):
        def on_train_epoch_end(self, run: Run) -> None:
            if run.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, Kills(), max_epochs=3)
    assert caught.value.code == 143
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["status"] == "interrupted"
    assert [int(row["step"]) for row in read_csv(tmp_path / "epochs.csv")] == [8, 16]


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "samples": step, **values}


def test_csv_is_whole_after_every_write(tmp_path: Path):
    path = tmp_path / "x.csv"
    table = Table(path, _Csv())
    rows = [row(1, a=1.5), row(2, a=2.5, b=1), row(2, c='x,"y"'), row(1, b=7), row(3, a="")]
    for one in rows:
        table.put(one)
        assert path.read_bytes().endswith(b"\n")
        read_csv(path)
    table.close()
    assert [x["step"] for x in read_csv(path)] == ["1", "2", "3"]
    assert read_csv(path)[0] | {"c": ""} == read_csv(path)[0]
    assert (read_csv(path)[0]["b"], read_csv(path)[1]["c"]) == ("7", 'x,"y"')


def test_value_that_becomes_shorter_leaves_nothing_behind(tmp_path: Path):
    table = Table(tmp_path / "x.csv", _Csv())
    for one in (row(1, a=0.123456789), row(2, a=1), row(1, a=2)):
        table.put(one)
    table.close()
    assert [x["a"] for x in read_csv(tmp_path / "x.csv")] == ["2", "1"]


def test_part_of_a_line_that_a_kill_has_left_is_dropped(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("step,epoch,samples,a\n1,0,8,0.5\n2,0,1")
    table = Table(path, _Csv())
    table.put(row(2, a=0.25))
    table.close()
    assert [(x["step"], x["a"]) for x in read_csv(path)] == [("1", "0.5"), ("2", "0.25")]
    assert os.listdir(tmp_path) == ["x.csv"]


def test_file_that_was_edited_is_kept_beside(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("step,epoch,samples,a\n1, 0 ,8,0.5\nno row\n")
    before = path.read_bytes()
    Table(path, _Csv()).close()
    assert (tmp_path / "x-1.csv").read_bytes() == before
    assert len(read_csv(path)) == 1


def test_file_that_another_run_has_taken_is_not_replaced(tmp_path: Path):
    path = tmp_path / "x.csv"
    table = Table(path, _Csv())
    table.put(row(1, a=1))
    path.rename(tmp_path / "x-1.csv")
    path.write_text("another run's")
    with pytest.raises(OSError, match="the file of another run by now"):
        table.put(row(2, b=1))
    table.close()
    assert path.read_text() == "another run's"


def test_late_value_of_an_earlier_step_is_in_its_line(tmp_path: Path):
    table = Table(tmp_path / "x.csv", _Csv())
    for step in range(100):
        table.put(row(step, a=step))
    table.put(row(60, lr=0.5))
    table.close()
    rows = read_csv(tmp_path / "x.csv")
    assert [int(x["step"]) for x in rows] == list(range(100))
    assert {x["step"]: x["lr"] for x in rows if x["lr"]} == {"60": "0.5"}


def test_json_line_is_plain(tmp_path: Path):
    tiny.fit(logger=JSONLinesLogger(tmp_path), max_epochs=1)
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["kind"] == "hyperparameters"
