"""Loggers: what is read back is what the run has recorded, on the same axes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optax
import pytest

from jaxtrainer import FitResult, Run
from jaxtrainer.callbacks import GradientMonitor, LearningRateMonitor
from jaxtrainer.errors import ConfigError, MissingExtraError, RunDirError
from jaxtrainer.loggers import (
    CSVLogger,
    JSONLinesLogger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from jaxtrainer.records import (
    AXES,
    Axes,
    End,
    Histogram,
    HyperParameters,
    Image,
    Scalars,
    Text,
)
from jaxtrainer.settings import HIDDEN
from tests import tiny
from tests.bad_input import own_threads, refused
from tests.logged import (
    PICTURES,
    Keeps,
    Talkative,
    columns_of,
    points_of,
    read_csv,
    read_lines,
    read_png,
)

pytestmark = pytest.mark.usefixtures("compiled_once")

KINDS = {"step": "steps.csv", "epoch": "epochs.csv"}
EPOCHS, BATCHES, ROWS = 3, 10, 8
ONE: Any = {"max_epochs": 1}


class Logged:
    """A fit and a test of its module, with loggers of all kinds that need no other package."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keeps = folder, Keeps()
        # The rate is in the state of the optimiser, where it is read late.
        tx = optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1, 0, 50))
        loggers = [CSVLogger("csv"), JSONLinesLogger("json"), self.keeps]
        self.trainer = tiny.make_trainer(
            [LearningRateMonitor(), GradientMonitor(histograms=True)],
            logger=loggers,
            default_root_dir=folder,
            max_epochs=EPOCHS,
            num_sanity_val_steps=1,
        )
        self.module = Talkative(tx=tx)
        loader = tiny.make_loader(ROWS * BATCHES)
        self.result: FitResult = self.trainer.fit(self.module, loader, tiny.make_batches(2))
        self.num_in_fit = len(self.keeps.records)
        self.tested = self.trainer.test(self.module, tiny.make_batches(3), verbose=False)

    def rows(self, kind: str) -> list[dict[str, str]]:
        return read_csv(self.folder / "csv" / KINDS[kind])

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return read_lines(self.folder / "json" / "metrics.jsonl", kind)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, compiled_once: None) -> Logged:
    return Logged(tmp_path_factory.mktemp("logged"))


@pytest.mark.parametrize("kind", KINDS)
def test_csv_has_what_the_run_has_recorded(logged: Logged, kind: str):
    found = columns_of(logged.rows(kind))
    found.pop("test/loss", None)
    assert found == points_of(logged.result.history, kind)
    assert "lr" in found or "val/loss" in found


@pytest.mark.parametrize("kind", KINDS)
def test_json_lines_have_what_the_run_has_recorded(logged: Logged, kind: str):
    found = columns_of(logged.lines(kind))
    found.pop("test/loss", None)
    assert found == points_of(logged.result.history, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_one_line(logged: Logged, kind: str):
    steps = [int(row["step"]) for row in logged.rows(kind)]
    assert len(steps) == len({*steps})
    assert [row["step"] for row in logged.lines(kind)] == steps
    assert len(steps) >= EPOCHS


def test_axes_are_in_every_record(logged: Logged):
    for record in logged.keeps.records:
        assert record.axes.elapsed_s > 0
        assert record.axes.unix_time_s > 1.7e9
    rows = [*logged.rows("step"), *logged.lines("image"), *logged.lines("end")]
    assert all({*AXES} <= row.keys() for row in rows)


def test_samples_are_those_of_the_step_and_not_of_the_report(logged: Logged):
    rows = [*logged.rows("step"), *logged.rows("epoch"), *logged.lines("histogram")]
    assert [int(row["samples"]) for row in rows] == [ROWS * int(row["step"]) for row in rows]
    epochs = {int(row["step"]): int(row["epoch"]) for row in logged.rows("epoch")}
    assert epochs == {10: 0, 20: 1, 30: 2}


def test_result_of_a_test_is_at_the_step_that_was_trained_to(logged: Logged):
    [row] = [row for row in logged.rows("epoch") if row["test/loss"]]
    assert row["step"] == "30"
    assert float(row["test/loss"]) == logged.tested["test/loss"]


def test_hyperparameters_are_logged_once_at_the_start(logged: Logged):
    first, *others = logged.keeps.records
    assert isinstance(first, HyperParameters)
    assert not [r for r in others if isinstance(r, HyperParameters)]
    assert first.values["module"] | {"make": 0, "tx": 0} == {
        "width": 8,
        "api_key": HIDDEN,
        "make": 0,
        "tx": 0,
    }
    assert first.values["trainer"]["max_epochs"] == EPOCHS
    assert first.values["trainer"]["callbacks"] == ["LearningRateMonitor", "GradientMonitor"]
    text = (logged.folder / "csv" / "hyperparameters.json").read_text()
    assert json.loads(text) == first.values


def test_end_has_the_final_values(logged: Logged):
    ends = logged.keeps.of(End)
    assert [(e.status, e.reason) for e in ends] == [("finished", "max_epochs"), ("finished", "")]
    assert ends[0].metrics.keys() >= {"train/loss", "val/loss", "extra", "lr"}
    assert ends[0].metrics["val/loss"] == logged.result.metrics["val/loss"]
    assert isinstance(logged.keeps.records[logged.num_in_fit - 1], End)


def test_pictures_are_written_as_a_grid(logged: Logged):
    lines = logged.lines("image")
    assert [line["step"] for line in lines] == [10, 20, 30]
    pixels = read_png((logged.folder / "json" / lines[0]["file"]).read_bytes())
    assert pixels.shape == (2 * 4, 3 * 6, 1)
    want = np.round(255 * PICTURES).astype(np.uint8)
    assert (pixels[4:, 6:12, 0] == want[4]).all()
    assert not pixels[4:, 12:].any()


def test_texts_and_histograms_are_read_back(logged: Logged):
    assert [t["text"] for t in logged.lines("text")] == [f"after step {n}" for n in (10, 20, 30)]
    assert {type(r) for r in logged.keeps.records} >= {Scalars, Image, Histogram, Text}
    first = next(h for h in logged.lines("histogram") if h["name"] == "weights")
    assert sum(first["counts"]) == 10
    assert (first["edges"][0], first["edges"][-1]) == (0.0, 9.0)


def test_histograms_of_gradients_are_those_of_the_monitor(logged: Logged):
    monitor: Any = logged.trainer.callbacks[1]
    found = [h for h in logged.keeps.of(Histogram) if h.name == "grad_hist/last"]
    want = monitor.histograms["last"]
    assert [h.axes.step for h in found] == [step for step, _ in want]
    assert all((h.counts == c).all() for h, (_, c) in zip(found, want, strict=True))
    line = next(h for h in logged.lines("histogram") if h["name"] == "grad_hist/last")
    assert line["edges"][-1] == "Infinity"


def test_nothing_of_a_sanity_check_is_logged(logged: Logged):
    assert not [r for r in logged.keeps.records if r.axes.step == 0 and not is_params(r)]


def is_params(record: Any) -> bool:
    return isinstance(record, HyperParameters)


def test_mean_and_step_value_of_a_series_have_names_of_their_own(logged: Logged):
    by_kind = {kind: set() for kind in KINDS}
    for record in logged.keeps.of(Scalars):
        by_kind[record.kind] |= record.tagged.keys()
    assert not by_kind["step"] & by_kind["epoch"]
    assert "train/loss_epoch" in by_kind["epoch"]
    assert {"val/loss", "extra", "test/loss"} <= by_kind["epoch"]


def test_threads_of_loggers_end_with_the_call(logged: Logged):
    assert not own_threads()
    assert logged.keeps.closed == 2


def test_numbers_that_json_lacks_are_read_back(tmp_path: Path):
    class Odd(tiny.Tiny):
        def on_train_epoch_end(self, run: Run) -> None:
            for name, value in (("nan", np.nan), ("inf", np.inf), ("step", -np.inf)):
                run.log(name, value)

    loggers = [CSVLogger(tmp_path), JSONLinesLogger(tmp_path)]
    tiny.fit(module=Odd(), logger=loggers, max_epochs=1)
    for row in (read_csv(tmp_path / "epochs.csv")[0], *read_lines(tmp_path / "metrics.jsonl")):
        if row.get("kind", "epoch") == "epoch":
            assert np.isnan(float(row["nan"]))
            assert (float(row["inf"]), float(row["logged/step"])) == (np.inf, -np.inf)
            assert int(row["step"]) == 8


def test_without_a_logger_nothing_is_written(in_tmp_path: Path):
    module = Talkative()
    for logger in (None, False, []):
        tiny.fit(tiny.make_batches(2), tiny.make_batches(1), module=module, logger=logger, **ONE)
    assert not [path for path in in_tmp_path.rglob("*") if "jax" not in path.name]
    assert not own_threads()


def test_fast_dev_run_logs_nothing(tmp_path: Path):
    keeps = Keeps()
    tiny.fit(logger=[CSVLogger(tmp_path / "x"), keeps], fast_dev_run=True)
    assert not keeps.records
    assert not list(tmp_path.iterdir())


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    second = SimpleNamespace(process_index=lambda: 1)
    monkeypatch.setattr("jaxtrainer.loggers.together.jax", second)
    tiny.fit(logger=CSVLogger(tmp_path / "x"), **ONE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_logs_are_whole_after_an_exception(error: type[BaseException], tmp_path: Path):
    class Fails(tiny.Tiny):
        def on_train_epoch_end(self, run: Run) -> None:
            if run.epoch == 1:
                raise error

    keeps = Keeps()
    with pytest.raises(error):
        tiny.fit(module=Fails(), logger=[CSVLogger(tmp_path), keeps], max_epochs=3)
    assert [int(row["step"]) for row in read_csv(tmp_path / "epochs.csv")] == [8, 16]
    assert (keeps.of(End)[-1].status, keeps.of(End)[-1].reason) == ("failed", error.__name__)
    assert not own_threads()


def test_stopped_run_is_logged_as_interrupted():
    class Stops(tiny.Tiny):
        def on_train_epoch_end(self, run: Run) -> None:
            run.stop("interrupted")

    keeps = Keeps()
    tiny.fit(module=Stops(), logger=keeps, max_epochs=3)
    assert keeps.of(End)[-1].status == "interrupted"


BAD: Any = {
    "class": (CSVLogger, "write `CSVLogger('runs/x')`"),
    "true": (True, "pass `logger=CSVLogger('runs/x')`"),
    "path": ("runs/x", "logger must be a Logger or several, got 'runs/x'"),
    "list": ([CSVLogger("x"), None], "got None"),
    "twice": ([same := CSVLogger("x"), same], "the same logger is in the list twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_logger_is_refused(case: str):
    logger, says = BAD[case]
    with pytest.raises(ConfigError) as caught:
        tiny.make_trainer(logger=logger)
    assert says in str(caught.value)


@pytest.mark.parametrize("kind", [CSVLogger, JSONLinesLogger])
def test_directory_that_is_none_is_refused(kind: Any, tmp_path: Path):
    for bad in (None, "", 3, "gs://bucket/x"):
        with pytest.raises(ConfigError, match=kind.__name__):
            kind(bad)
    (tmp_path / "file").touch()
    refused(RunDirError, f"pass `{kind.__name__}`", logger=kind(tmp_path / "file"))
    assert not (tmp_path / "metrics.jsonl").exists()


EXTRAS: Any = {
    "tensorboard": ("tensorboardX", lambda: TensorBoardLogger("x")),
    "wandb": ("wandb", WandbLogger),
    "mlflow": ("mlflow", MLFlowLogger),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_missing_extra_names_what_installs_it(extra: str, monkeypatch: pytest.MonkeyPatch):
    package, make = EXTRAS[extra]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        make()
    assert f"needs {package}" in str(caught.value)
    assert f"`pip install 'jaxtrainer[{extra}]'`" in str(caught.value)


def test_axes_of_a_record_have_a_wall_clock():
    assert Axes(step=1, epoch=0, samples=8, elapsed_s=0.1).unix_time_s > 1.7e9
