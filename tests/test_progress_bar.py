"""`ProgressBar`, driven by a loop that only writes integers into a `Run`."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator

import pytest
import rich
from rich.console import Console

from jaxtrainer.callback import HOOKS, Callback
from jaxtrainer.callbacks.progress_bar import ProgressBar
from jaxtrainer.errors import ConfigError, OptionError
from jaxtrainer.hooks import CallbackList
from jaxtrainer.run import Limits, Run


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Rig:
    """A bar, its run, and what it has drawn; no drawing thread."""

    def __init__(self, *, in_log: bool = False, leave: bool = True, width: int = 80) -> None:
        self.clock = ManualClock()
        self.run = Run(clock=self.clock, limits=Limits(max_epochs=5), num_batches=235)
        self.file = io.StringIO() if in_log else Terminal()
        self.console = Console(
            file=self.file, width=width, height=20, force_terminal=not in_log, color_system=None
        )
        self.bar = ProgressBar(console=self.console, refresh_per_second=0, leave=leave)
        self.bar.setup(self.run)

    def text(self) -> str:
        return self.file.getvalue()

    def shown(self) -> list[str]:
        """Return the frames that a draw would show now, as text."""
        return [frame.plain() for frame in self.bar.frames()]

    def step(self, batches: int, seconds: float) -> None:
        self.clock.now += seconds
        self.run.advance(batches, batches)

    def train_epoch(self) -> None:
        self.bar.on_train_epoch_start(self.run)
        self.step(235, 1.25)
        self.run.metrics["train/loss"] = 0.1234
        self.bar.on_train_epoch_end(self.run)
        self.run.next_epoch()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.bar.teardown(rig.run)


@pytest.fixture
def log() -> Iterator[Rig]:
    log = Rig(in_log=True)
    yield log
    log.bar.teardown(log.run)


def test_bar_has_no_hook_that_runs_once_a_batch():
    hooks = CallbackList([ProgressBar()], Callback())
    frequent = [
        name for name in HOOKS if "_batch_" in name or name in ("on_report", "on_save_point")
    ]
    assert not [name for name in frequent if hooks.has(name)]


def test_bar_shows_the_start_up(rig: Rig):
    rig.clock.now += 0.5
    assert rig.shown() == ["preparing ... 0.5 s"]


def test_bar_shows_the_epoch(rig: Rig):
    rig.run.epoch = 1
    rig.bar.on_train_epoch_start(rig.run)
    assert rig.shown() == ["Epoch 2/5    0/235  0:00<-:--  -- steps/s"]
    rig.step(47, 1.0)
    rig.run.metrics["train/loss"] = 0.5
    assert rig.shown() == ["Epoch 2/5   47/235  0:01<0:04  47.0 steps/s  loss=0.5000"]


def test_bar_shows_what_was_logged_for_it(rig: Rig):
    rig.run.metrics.update({"train/loss": 1.0, "val/accuracy": 0.95, "train/f1": 0.5})
    rig.run.prog_bar.update({"val/accuracy", "train/f1", "not/yet"})
    rig.bar.on_train_epoch_start(rig.run)
    assert rig.shown()[0].endswith("val/accuracy=0.9500 f1=0.5000")


def test_bar_of_unknown_length_counts(rig: Rig):
    rig.run.num_batches = None
    rig.run.limits = Limits(max_steps=1000)
    rig.bar.on_train_epoch_start(rig.run)
    rig.step(47, 1.0)
    assert rig.shown() == ["Epoch 1  47  0:01  47.0 steps/s"]


def test_bar_of_accumulated_gradients_counts_batches(rig: Rig):
    rig.run.accumulate = 4
    rig.bar.on_train_epoch_start(rig.run)
    assert rig.shown()[0].endswith("-- batches/s")


def test_bar_of_a_resumed_epoch_starts_where_it_was(rig: Rig):
    rig.run.batch_idx = 200
    rig.bar.on_train_start(rig.run)
    rig.step(10, 1.0)
    assert rig.shown() == ["Epoch 1/5  210/235  0:01<0:02  10.0 steps/s"]


def test_bar_of_a_run_with_nothing_left_shows_no_epoch(log: Rig):
    log.run.epoch = 5
    log.bar.on_train_start(log.run)
    log.bar.on_train_end(log.run)
    log.bar.teardown(log.run)
    assert log.text() == ""


def test_bar_shows_a_compilation_and_leaves_a_line(rig: Rig):
    rig.bar.on_compile_start(rig.run, "train step")
    rig.clock.now += 1.24
    assert rig.shown() == ["compiling train step ... 1.2 s"]
    rig.bar.on_compile_end(rig.run, "train step", 1.24)
    assert "compiling" not in rig.shown()[0]
    assert "compiling train step ... 0.0 s" in rig.text()
    assert "compiled train step in 1.24 s\n" in rig.text()


def test_bar_does_not_count_compilation_as_slow_steps(rig: Rig):
    rig.bar.on_train_epoch_start(rig.run)
    rig.bar.on_compile_start(rig.run, "train step")
    rig.clock.now += 9.0
    rig.bar.on_compile_end(rig.run, "train step", 9.0)
    rig.step(47, 1.0)
    assert rig.shown() == ["Epoch 1/5   47/235  0:10<0:04  47.0 steps/s"]


def test_bar_shows_validation_below_the_epoch(rig: Rig):
    rig.bar.on_train_epoch_start(rig.run)
    rig.step(100, 1.0)
    rig.run.num_eval_batches, rig.run.eval_batch_idx = 40, 0
    rig.bar.on_validation_start(rig.run)
    rig.clock.now += 1.0
    rig.run.eval_batch_idx = 10
    epoch = "Epoch 1/5  100/235  0:02<0:01  100 steps/s"
    assert rig.shown() == [epoch, "Validation  10/40  0:01<0:03  10.0 batches/s"]
    rig.bar.on_validation_end(rig.run)
    assert rig.shown() == [epoch]


def test_bar_compiling_within_validation_pauses_both(rig: Rig):
    rig.bar.on_train_epoch_start(rig.run)
    rig.step(100, 1.0)
    rig.run.num_eval_batches = 40
    rig.bar.on_validation_start(rig.run)
    rig.bar.on_compile_start(rig.run, "validate step")
    rig.clock.now += 5.0
    assert rig.shown()[1:] == ["compiling validate step ... 5.0 s"]
    rig.bar.on_compile_end(rig.run, "validate step", 5.0)
    rig.clock.now += 1.0
    rig.run.eval_batch_idx = 10
    assert rig.shown()[1] == "Validation  10/40  0:06<0:03  10.0 batches/s"
    rig.bar.on_validation_end(rig.run)
    rig.step(100, 1.0)
    assert rig.shown() == ["Epoch 1/5  200/235  0:08<0:00  100 steps/s"]


@pytest.mark.parametrize(
    ("stage", "label"),
    [("sanity_check", "Sanity check"), ("test", "Test"), ("predict", "Predict")],
)
def test_bar_of_an_evaluation_goes_when_it_ends(rig: Rig, stage: str, label: str):
    getattr(rig.bar, f"on_{stage}_start")(rig.run)
    assert rig.shown() == [f"{label}  0  0:00  -- batches/s"]
    getattr(rig.bar, f"on_{stage}_end")(rig.run)
    assert rig.shown() == []


def test_bar_names_the_validation_of_a_sanity_check(rig: Rig):
    rig.run.stage = "sanity"
    rig.bar.on_sanity_check_start(rig.run)
    rig.bar.on_validation_start(rig.run)
    assert rig.shown()[0].startswith("Sanity check")


def test_bar_leaves_a_line_for_each_epoch(rig: Rig):
    rig.train_epoch()
    rig.train_epoch()
    rig.bar.teardown(rig.run)
    lines = [line for line in rig.text().splitlines() if "1.25 s" in line]
    assert [line.rpartition("\x1b[2K")[2] for line in lines] == [
        "Epoch 1/5  235/235  1.25 s  188 steps/s  loss=0.1234",
        "Epoch 2/5  235/235  1.25 s  188 steps/s  loss=0.1234",
    ]


def test_bar_without_leave_leaves_no_line():
    rig = Rig(leave=False)
    rig.bar.on_compile_end(rig.run, "train step", 1.0)
    rig.train_epoch()
    rig.bar.teardown(rig.run)
    assert "1.25 s" not in rig.text()
    assert "compiled" not in rig.text()


def test_bar_in_a_log_prints_whole_lines_only(log: Rig):
    log.bar.on_compile_start(log.run, "train step")
    log.bar.on_compile_end(log.run, "train step", 0.524)
    log.run.metrics["val/accuracy"] = 0.95
    log.run.prog_bar.update({"train/loss", "val/accuracy"})
    log.train_epoch()
    log.run.notice("a notice")
    log.bar.teardown(log.run)
    assert log.text() == (
        "compiled train step in 0.52 s\n"
        "Epoch 1/5  235/235  1.25 s  188 steps/s  val/accuracy=0.9500 loss=0.1234\n"
        "a notice\n"
    )


def test_bar_in_a_log_ignores_its_width():
    rig = Rig(in_log=True, width=20)
    rig.train_epoch()
    assert rig.text() == "Epoch 1/5  235/235  1.25 s  188 steps/s  loss=0.1234\n"


def test_bar_cut_short_leaves_the_unfinished_epoch(rig: Rig):
    rig.bar.on_train_epoch_start(rig.run)
    rig.step(47, 1.0)
    rig.bar.on_exception(rig.run, KeyboardInterrupt())
    text = rig.text()
    assert "Epoch 1/5   47/235  1.00 s  47.0 steps/s\n" in text
    assert text.endswith("\x1b[?25h\r")
    rig.bar.teardown(rig.run)
    assert rig.text() == text


def test_bar_of_a_stopped_run_leaves_the_epoch_when_training_ends(log: Rig):
    log.bar.on_train_epoch_start(log.run)
    log.step(47, 1.0)
    log.bar.on_train_end(log.run)
    log.clock.now += 9.0
    log.bar.teardown(log.run)
    assert log.text() == "Epoch 1/5   47/235  1.00 s  47.0 steps/s\n"


def test_bar_set_up_twice_takes_the_first_down(rig: Rig):
    rig.bar.setup(rig.run)
    rig.bar.teardown(rig.run)
    assert rig.text().count("\x1b[?25l") == rig.text().count("\x1b[?25h") == 2


def test_bar_hooks_after_teardown_draw_nothing(rig: Rig):
    rig.bar.teardown(rig.run)
    before = rig.text()
    rig.train_epoch()
    rig.bar.on_compile_end(rig.run, "train step", 1.0)
    assert rig.text() == before


def test_bar_draws_in_its_own_thread(monkeypatch: pytest.MonkeyPatch):
    console = Console(file=Terminal(), width=80, force_terminal=True, color_system=None)
    run, bar = Run(), ProgressBar(console=console, refresh_per_second=60)
    threads: set[str] = set()
    drawn = threading.Event()
    frames = bar.frames

    def watched():
        threads.add(threading.current_thread().name)
        if run.batch_idx == 7:
            drawn.set()
        return frames()

    monkeypatch.setattr(bar, "frames", watched)
    bar.setup(run)
    bar.on_train_start(run)
    run.batch_idx = 7
    assert drawn.wait(timeout=60)
    bar.teardown(run)
    assert "jaxtrainer-display" in threads


def test_bar_prints_go_through_the_console_of_rich(monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(rich, "_console", None)
    bar, run = ProgressBar(refresh_per_second=0), Run()
    bar.setup(run)
    run.notice("a notice")
    bar.teardown(run)
    assert file.getvalue() == "a notice\n"


@pytest.mark.parametrize(
    "options", [{"refresh_per_second": -1}, {"refresh_per_second": 100}, {"line_interval_s": 0}]
)
def test_bar_refuses_rates_it_cannot_draw(options: dict[str, float]):
    with pytest.raises(ConfigError, match="use"):
        ProgressBar(**options)  # pyright: ignore[reportArgumentType]


def test_bar_names_the_option_that_was_meant():
    with pytest.raises(OptionError, match="Did you mean 'refresh_per_second'"):
        ProgressBar(refresh_per_sec=4)  # pyright: ignore[reportCallIssue]
