"""`EarlyStopping`: when it checks, what it takes for better, and how it says why it stopped."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Checkpoint, EarlyStopping
from jaxtrainer.errors import ConfigError, OptionError
from tests.tiny import Tiny, make_batches, make_trainer

NAN = math.nan


class Scores(Callback):
    """Logs these values of `val/score`, one each validation."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_validation_epoch_end(self, run: Run) -> None:
        if run.stage == "validate":
            run.log("val/score", self.values[run.epoch])


def check_all(stopping: EarlyStopping, values: list[float]) -> Run:
    """Give the callback one validation an epoch, until it stops the run."""
    run = Run()
    stopping.setup(run)
    for value in values:
        run.stage = "validate"
        run.log(stopping.monitor, value)
        stopping.on_validation_end(run)
        if run.should_stop:
            break
        run.next_epoch()
    return run


def fit(*callbacks: Callback, val: bool = True, ckpt_path: Any = None, **options: Any):
    trainer = make_trainer(callbacks, **{"max_epochs": 6, **options})
    loader = make_batches(4)
    return trainer.fit(Tiny(), loader, loader if val else None, ckpt_path=ckpt_path)


def test_patience_counts_checks_without_improvement():
    stopping = EarlyStopping("val/loss", patience=3)
    run = check_all(stopping, [0.5, 0.12, 0.2, 0.1, 0.3, 0.2, 0.11, 0.0])
    assert run.stop_reason == "early_stopping: val/loss did not improve for 3 checks (best 0.1)"
    assert (stopping.stopped_epoch, stopping.wait_count, stopping.best_score) == (6, 3, 0.1)


@pytest.mark.parametrize(
    ("options", "values", "epoch"),
    [
        ({"patience": 1, "min_delta": 0.1}, [1.0, 0.95], 1),
        ({"patience": 1, "min_delta": 0.1, "mode": "max"}, [1.0, 1.05], 1),
        ({"patience": 1, "mode": "max"}, [0.1, 0.2, 0.2], 2),
        ({"patience": 0}, [1.0, 0.5, 0.5], 2),
        ({"stopping_threshold": 0.3}, [0.5, 0.3, 0.2], 2),
        ({"stopping_threshold": 0.9, "mode": "max"}, [0.5, 0.95], 1),
        ({"divergence_threshold": 2.0}, [0.5, 2.0, 2.5], 2),
        ({"divergence_threshold": 0.1, "mode": "max"}, [0.5, 0.05], 1),
        ({}, [0.5, NAN], 1),
        ({}, [0.5, math.inf], 1),
        ({"check_finite": False, "patience": 2}, [0.5, NAN, 0.4, NAN, NAN], 4),
        ({"check_finite": False, "patience": 2}, [NAN, NAN], 1),
    ],
)
def test_run_stops_in_the_epoch(options: dict[str, Any], values: list[float], epoch: int):
    stopping = EarlyStopping("val/loss", **options)
    assert check_all(stopping, [*values, 0.0]).should_stop
    assert stopping.stopped_epoch == epoch


@pytest.mark.parametrize(
    ("options", "value", "reason"),
    [
        ({}, NAN, "is nan"),
        ({"stopping_threshold": 0.3}, 0.25, "is 0.25, better than stopping_threshold=0.3"),
        ({"divergence_threshold": 9.0}, 10.0, "is 10, worse than divergence_threshold=9"),
    ],
)
def test_stop_reason_says_which_test_it_was(options: dict[str, Any], value: float, reason: str):
    run = check_all(EarlyStopping("val/loss", **options), [value])
    assert run.stop_reason == f"early_stopping: val/loss {reason}"


def test_a_value_that_is_not_finite_outranks_the_other_tests():
    stopping = EarlyStopping("val/loss", stopping_threshold=0.0, divergence_threshold=1.0)
    run = check_all(stopping, [-math.inf])
    assert run.stop_reason == "early_stopping: val/loss is -inf"
    assert stopping.best_score == math.inf


def test_series_of_validation_is_checked_once_each_validation():
    stopping = EarlyStopping("val/score", patience=2)
    result = fit(Scores([0.5, 0.4, 0.6, 0.7, 0.1, 0.1]), User(), stopping)
    assert result.stop_reason.endswith("did not improve for 2 checks (best 0.4)")
    assert (result.num_epochs, stopping.stopped_epoch) == (4, 3)


class User(Callback):
    """A hook of the user's: monitored series may then be logged by it."""

    def on_train_epoch_start(self, run: Run) -> None:
        pass


def test_validation_within_an_epoch_counts_as_a_check():
    stopping = EarlyStopping("val/loss", patience=2, min_delta=100.0)
    result = fit(stopping, val_check_interval=1, num_sanity_val_steps=2)
    assert (result.num_steps, stopping.wait_count) == (3, 2)


def test_series_of_training_is_checked_at_epoch_ends_only():
    stopping = EarlyStopping("train/loss", patience=2, min_delta=100.0)
    result = fit(stopping, val_check_interval=1, log_every_n_steps=1)
    assert (result.num_epochs, stopping.stopped_epoch) == (3, 2)


def test_sparse_validation_is_waited_for():
    stopping = EarlyStopping("val/score", patience=1)
    result = fit(Scores([0.5] * 6), User(), stopping, check_val_every_n_epoch=2)
    assert (result.num_epochs, stopping.stopped_epoch) == (4, 3)


def test_min_epochs_holds_the_stop_back():
    stopping = EarlyStopping("train/loss", patience=1, min_delta=100.0)
    result = fit(stopping, val=False, min_epochs=4)
    assert (result.num_epochs, stopping.stopped_epoch) == (4, 1)
    assert result.stop_reason.startswith("early_stopping: train/loss did not improve for 1 check ")


def test_series_that_nothing_logs_is_named_with_those_that_exist():
    with pytest.raises(ConfigError, match=r"'val/score'.*epoch 0; logged: .*train/loss.*val/loss"):
        fit(User(), EarlyStopping("val/score"))
    with pytest.raises(ConfigError, match=r"'valid/f1'.*epoch 0; logged: train/loss\."):
        fit(User(), EarlyStopping("valid/f1"), val=False)


@pytest.mark.slow
def test_resumed_run_goes_on_counting(tmp_path):
    values = [0.5, 0.4, 0.6, 0.7, 0.8, 0.9]
    whole = EarlyStopping("val/score", patience=4)
    fit(Scores(values), User(), whole)
    fit(Scores(values), User(), EarlyStopping("val/score", patience=4),
        Checkpoint(tmp_path), max_epochs=3)  # fmt: skip
    stopping = EarlyStopping("val/score", patience=4)
    fit(Scores(values), User(), stopping, Checkpoint(tmp_path), ckpt_path="last")
    assert stopping.state_dict() == whole.state_dict()
    assert stopping.stopped_epoch == 5


def test_epoch_cut_short_is_no_check():
    stopping = EarlyStopping("train/loss", patience=1, min_delta=100.0)
    result = fit(stopping, val=False, max_steps=6)
    assert (result.stop_reason, stopping.wait_count) == ("max_steps", 0)


def test_second_fit_starts_afresh():
    stopping = EarlyStopping("train/loss", patience=1, min_delta=100.0)
    assert fit(stopping, val=False).num_epochs == 2
    assert fit(stopping, val=False).num_epochs == 2


def test_validate_alone_is_no_check():
    stopping = EarlyStopping("val/loss", patience=0, divergence_threshold=-1.0)
    make_trainer([stopping], max_epochs=1).validate(Tiny(), make_batches(1), verbose=False)
    assert (stopping.wait_count, stopping.stopped_epoch) == (0, None)


def test_verbose_keeps_notices_of_improvements():
    run = check_all(EarlyStopping("val/loss", verbose=True), [0.5, 0.25, 0.3])
    assert run.notices == [
        "early_stopping: val/loss improved from inf to 0.5 in epoch 0",
        "early_stopping: val/loss improved from 0.5 to 0.25 in epoch 1",
    ]


@pytest.mark.parametrize(
    "options", [{"mode": "auto"}, {"patience": -1}, {"patience": 2.5}, {"min_delta": -0.1}]
)
def test_option_that_cannot_work_is_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EarlyStopping("val/loss", **options)


def test_option_of_lightning_says_what_takes_its_place():
    with pytest.raises(OptionError, match="always an error"):
        EarlyStopping("val/loss", strict=False)  # pyright: ignore[reportCallIssue]
