"""When validation runs: each unit of `Every`, the older forms, the end of training, and resumes.

An epoch is eight batches; each test lists the optimiser steps at which validation reported.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer import Callback, Every, Run, Trainer
from jaxtrainer.callbacks import Checkpoint, EarlyStopping
from jaxtrainer.checkpoint import find_checkpoint, read_record
from jaxtrainer.errors import ConfigError, OptionError
from tests import tiny
from tests.bad_input import assert_says, refused

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCH = 8
VAL = tiny.make_batches(2)


class ManualClock:
    """A clock that stands still until it is told the time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Minutes(Callback):
    """Lets so many minutes pass with each training batch, and with each validation."""

    def __init__(self, clock: ManualClock, batch: float = 1.0, validation: float = 0.0) -> None:
        self.clock, self.batch, self.validation = clock, batch, validation

    def on_fit_start(self, run: Run) -> None:
        self.clock.now += 60 * 1000.0  # a long compilation

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.now += 60 * self.batch

    def on_validation_start(self, run: Run) -> None:
        self.clock.now += 60 * self.validation


class StopAt(Callback):
    """Asks to stop in one hook, at one step, for a reason."""

    def __init__(self, hook: str, step: int, reason: str = "enough") -> None:
        self.step, self.reason = step, reason
        setattr(self, hook, self._stop)

    def _stop(self, run: Run, *_: Any) -> None:
        if run.global_step == self.step:
            run.stop(self.reason)


def train(interval: Any = None, *callbacks: Callback, **options: Any) -> Any:
    result, _ = tiny.fit(
        val_loader=VAL, callbacks=callbacks, val_check_interval=interval, **options
    )
    return result


def validated_at(interval: Any = None, *callbacks: Callback, **options: Any) -> list[int]:
    history = train(interval, *callbacks, **options).history
    return history["val/loss"].steps if "val/loss" in history else []


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
@pytest.mark.parametrize(
    ("interval", "at"),
    [
        (Every(steps=3), [3, 6, 9, 12, 15, 16]),
        (Every(steps=3, at_end=False), [3, 6, 9, 12, 15]),
        (Every(steps=12), [12, 16]),
        (Every(steps=16), [16]),
        (Every(batches=5), [5, 10, 15, 16]),
        (Every(epochs=1), [8, 16]),
        (Every(epochs=2), [16]),
        (Every(epochs=3), [16]),
        (Every(epochs=3, at_end=False), []),
        (None, [8, 16]),
        (1.0, [8, 16]),
        (3, [3, 6, 11, 14]),
        (0.5, [4, 8, 12, 16]),
    ],
    ids=str,
)
def test_interval_says_when(interval: Any, at: list[int], steps: int):
    assert validated_at(interval, max_epochs=2, steps_per_dispatch=steps) == at


def test_steps_and_batches_are_counted_apart_under_accumulation():
    # Windows of three batches, the last of an epoch has two: three steps an epoch.
    options: Any = {"accumulate_grad_batches": 3, "max_epochs": 2}
    assert validated_at(Every(steps=2), **options) == [2, 4, 6]
    assert validated_at(Every(batches=4), **options) == [1, 3, 4, 6]


@pytest.mark.parametrize("interval", [Every(steps=3), Every(batches=5)], ids=str)
def test_interval_does_not_change_a_bit_of_training(interval: Any):
    _, plain = tiny.fit(max_epochs=2)
    _, state = tiny.fit(val_loader=VAL, val_check_interval=interval, max_epochs=2)
    tiny.assert_same_bits(state, plain)


@pytest.mark.parametrize(
    ("interval", "every", "at"),
    [(None, 2, [16, 32]), (0.5, 2, [12, 16, 28, 32]), (3, 3, [19, 22])],
    ids=str,
)
def test_check_val_every_n_epoch_chooses_the_epochs(interval: Any, every: int, at: list[int]):
    assert validated_at(interval, check_val_every_n_epoch=every, max_epochs=4) == at


@pytest.mark.parametrize(
    "interval",
    [Every(minutes=3), timedelta(minutes=3), "00:00:03:00", {"minutes": 3}],
    ids=["every", "timedelta", "text", "dict"],
)
def test_minutes_count_from_the_end_of_the_last_validation(interval: Any):
    clock = ManualClock()
    passing = Minutes(clock, validation=50.0)
    at = validated_at(interval, passing, clock=clock, max_epochs=1, steps_per_dispatch=1)
    # Neither the compilation nor the validations themselves bring the next one nearer.
    assert at == [3, 6, 8]


def test_minutes_are_looked_at_after_each_dispatch():
    clock = ManualClock()
    at = validated_at(Every(minutes=3, at_end=False), Minutes(clock), clock=clock, max_epochs=2)
    # Four batches a dispatch, which time does not cut short.
    assert at == [4, 8, 12, 16]


@pytest.mark.parametrize("interval", [Every(steps=5), Every(batches=7), Every(epochs=2)], ids=str)
def test_resume_keeps_the_schedule(interval: Any, tmp_path: Path):
    saver = Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole = train(interval, saver, max_epochs=4)
    resumed = train(interval, ckpt_path=tmp_path / "step_9", max_epochs=4)
    series, rest = whole.history["val/loss"], resumed.history["val/loss"]
    late = [p for p in zip(series.steps, series.epochs, series.values, strict=True) if p[0] > 9]
    assert list(zip(rest.steps, rest.epochs, rest.values, strict=True)) == late
    assert late


def test_resume_counts_the_minutes_before_it(tmp_path: Path):
    # Saved two minutes after a validation: at a minute a batch the next is three batches later.
    options: Any = {"max_epochs": 2, "steps_per_dispatch": 1}
    clock = ManualClock()
    saver = Checkpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
    interval = Every(minutes=5, at_end=False)
    assert validated_at(interval, Minutes(clock), saver, clock=clock, **options) == [5, 10, 15]
    clock.now = 5.0
    path = tmp_path / "step_7"
    at = validated_at(interval, Minutes(clock), clock=clock, ckpt_path=path, **options)
    assert at == [10, 15]


@pytest.mark.parametrize(
    ("interval", "trigger", "step"),
    [
        (Every(steps=3), {"every_n_train_steps": 3}, 3),
        (Every(batches=3), {"every_n_train_steps": 3}, 3),
        (3, {"every_n_train_steps": 3}, 3),
        (Every(epochs=1), {"every_n_epochs": 1}, 6),
        (Every(minutes=3), {"train_time_interval": 180.0}, 3),
    ],
    ids=str,
)
def test_checkpoint_is_decided_after_the_validation(
    interval: Any, trigger: Any, step: int, tmp_path: Path
):
    clock = ManualClock()
    saver = Checkpoint(tmp_path, monitor="val/loss", save_top_k=-1, **trigger)
    options: Any = {"max_steps": 6, "limit_train_batches": 6, "steps_per_dispatch": 1}
    series = train(interval, Minutes(clock), saver, clock=clock, **options).history["val/loss"]
    assert step in saver.scores
    assert saver.scores == dict(zip(series.steps, series.values, strict=True))


@pytest.mark.parametrize("interval", [None, 3, Every(epochs=2)], ids=str)
@pytest.mark.parametrize(
    "stop",
    [
        {"max_steps": 13},
        {"callbacks": [StopAt("on_train_batch_end", 13)], "max_epochs": 4},
        {"callbacks": [StopAt("on_save_point", 13)], "max_epochs": 4},
    ],
    ids=["max_steps", "callback", "save_point"],
)
def test_stop_within_an_epoch_validates_the_last_state(interval: Any, stop: Any):
    options = {"steps_per_dispatch": 1, **stop}
    result = train(interval, *options.pop("callbacks", ()), **options)
    assert result.num_steps == 13
    assert result.history["val/loss"].steps.count(13) == 1
    assert result.history["val/loss"].epochs[-1] == 1


def test_max_time_validates_the_last_state():
    clock = ManualClock()
    options: Any = {"clock": clock, "max_time": {"minutes": 1005}, "steps_per_dispatch": 1}
    result = train(None, Minutes(clock), **options)
    assert (result.stop_reason, result.history["val/loss"].steps) == ("max_time", [5])


@pytest.mark.parametrize(
    ("interval", "at"), [(3, [3, 6]), (Every(steps=3), [3, 6, 8]), (Every(epochs=2), [8])], ids=str
)
def test_stop_at_the_end_of_an_epoch_validates_if_asked_for(interval: Any, at: list[int]):
    assert validated_at(interval, max_steps=EPOCH) == at
    stop = StopAt("on_train_epoch_end", EPOCH)
    assert validated_at(interval, stop, max_epochs=4) == at


def test_stop_by_a_hook_at_the_epochs_end_validates_before_the_checkpoint(tmp_path: Path):
    saver = Checkpoint(tmp_path, monitor="val/loss")
    stop = StopAt("on_train_epoch_end", EPOCH)
    result = train(Every(epochs=3), stop, saver, max_epochs=9)
    assert result.stop_reason == "enough"
    assert saver.scores == {EPOCH: result.history["val/loss"].values[0]}


def test_early_stopping_within_an_epoch_validates_no_state_twice():
    stopping = EarlyStopping("val/loss", patience=2, min_delta=100.0)
    assert validated_at(Every(steps=3), stopping, max_epochs=4) == [3, 6, 9]


def test_interrupted_run_does_not_wait_for_a_validation():
    stop = StopAt("on_train_batch_end", 5, "interrupted")
    assert validated_at(Every(steps=100), stop, max_epochs=2, steps_per_dispatch=1) == []


@pytest.mark.parametrize("step", [6, EPOCH], ids=["mid_epoch", "epoch_end"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
def test_validation_that_was_cut_short_is_made_up_after_a_resume(
    hook: str, step: int, tmp_path: Path
):
    options: Any = {"max_epochs": 2, "val_check_interval": 2, "steps_per_dispatch": 2}
    whole, state = tiny.fit(val_loader=VAL, **options)
    stop, saver = StopAt(hook, step, "interrupted"), Checkpoint(tmp_path)
    cut, _ = tiny.fit(val_loader=VAL, callbacks=[stop, saver], **options)
    assert read_record(find_checkpoint(tmp_path))["validation"]["owes_validation"]
    rest, same = tiny.fit(
        val_loader=VAL, callbacks=[Checkpoint(tmp_path)], ckpt_path="last", **options
    )
    tiny.assert_same_bits(same, state)
    for part in ("steps", "epochs", "values"):
        parts = [getattr(run.history["val/loss"], part) for run in (cut, rest, whole)]
        assert parts[0] + parts[1] == parts[2]


def test_state_that_was_validated_owes_nothing(tmp_path: Path):
    train(Every(steps=3), Checkpoint(tmp_path), max_epochs=1)
    record = read_record(find_checkpoint(tmp_path))["validation"]
    assert (record["owes_validation"], record["validated_batches"]) == (False, EPOCH)


class LogsInHooks(tiny.Tiny):
    """Logs from the hooks of validation, and keeps at which stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def on_validation_epoch_end(self, run: Run) -> None:
        self.stages.append(run.stage)
        self.log("val/extra", 1.0, prog_bar=True)
        if run.stage == "sanity":
            assert not run.metrics
            assert not run.prog_bar


def test_sanity_check_leaves_nothing_behind():
    module = LogsInHooks()
    result, _ = tiny.fit(
        val_loader={"a": VAL, "b": VAL}, module=module, max_epochs=1, num_sanity_val_steps=1
    )
    assert module.stages == ["sanity", "validate"]
    assert len(result.history["val/extra"]) == len(result.history["val/a/loss"]) == 1


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Every(), "Every(): pass one unit, e.g. `Every(steps=500)`"),
        (lambda: Every(steps=2, epochs=1), "Every(steps=2, epochs=1): pass one unit"),
        (lambda: Every(steps=0), "Every(steps=0): pass an integer above 0"),
        (lambda: Every(epochs=1.5), "Every(epochs=1.5): pass an integer"),  # pyright: ignore
        (lambda: Every(steps=True), "Every(steps=True): pass an integer"),
        (lambda: Every(minutes=-1), "Every(minutes=-1): pass a number above 0"),
        (lambda: Every(minutes=float("nan")), "Every(minutes=nan): pass a number"),
    ],
)
def test_every_refuses_what_is_no_interval(make: Any, part: str):
    with pytest.raises(ConfigError) as caught:
        make()
    assert_says(caught.value, part)


def test_every_names_the_close_match():
    with pytest.raises(OptionError, match=r"unknown option 'step'\. Did you mean 'steps'"):
        Every(step=3)  # pyright: ignore[reportCallIssue]
    assert repr(Every(minutes=2.5, at_end=False)) == "Every(minutes=2.5, at_end=False)"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (
            {"val_check_interval": Every(steps=3), "check_val_every_n_epoch": 2},
            "`val_check_interval=Every(epochs=2)`",
        ),
        (
            {"val_check_interval": 50, "check_val_every_n_epoch": None},
            "`val_check_interval=Every(batches=50)`",
        ),
        ({"val_check_interval": "3 minutes"}, "write `'DD:HH:MM:SS'`"),
    ],
)
def test_trainer_refuses_two_answers_to_when(options: Any, part: str):
    with pytest.raises(ConfigError) as caught:
        Trainer(max_epochs=1, enable_progress_bar=False, **options)
    assert_says(caught.value, part)


def test_interval_above_an_epoch_names_every():
    refused(ConfigError, "pass `Every(batches=9)`", val_loader=VAL, val_check_interval=9)
