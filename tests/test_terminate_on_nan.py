"""`TerminateOnNaN`: stops at the first report or epoch mean that is no number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jaxtrainer import FitResult, TrainModule
from jaxtrainer.callbacks import TerminateOnNaN
from jaxtrainer.errors import ConfigError
from jaxtrainer.hooks import CallbackList
from jaxtrainer.run import Run
from tests.tiny import Tiny, make_batches, make_trainer


def fit_with_bad_batch(index: int, value: float, **options: Any) -> FitResult:
    batches = make_batches(12)
    batches[index]["x"] = np.full_like(batches[index]["x"], value)
    trainer = make_trainer([TerminateOnNaN()], max_epochs=3, **options)
    return trainer.fit(Tiny(), batches)


def test_nan_stops_the_run_and_names_its_step():
    result = fit_with_bad_batch(2, math.nan, log_every_n_steps=1)
    assert result.stop_reason == "terminate_on_nan: train/loss is nan at step 3"
    assert 3 <= result.num_steps < 12


def test_nan_between_reports_is_seen_in_the_mean_of_the_epoch():
    result = fit_with_bad_batch(10, math.nan, log_every_n_steps=100)
    assert result.stop_reason == "terminate_on_nan: train/loss is nan in epoch 0"
    assert result.num_epochs == 1


def test_finite_run_is_left_alone():
    result = fit_with_bad_batch(0, 0.5, log_every_n_steps=1)
    assert result.stop_reason == "max_epochs"


def test_infinite_validation_value_stops_the_run():
    run = Run(global_step=40)
    run.log("val/loss", math.inf)
    TerminateOnNaN("val/loss").on_validation_epoch_end(run)
    assert run.stop_reason == "terminate_on_nan: val/loss is inf at step 40"


def test_nothing_is_asked_for_in_a_step():
    hooks = CallbackList([TerminateOnNaN()], TrainModule())
    each = ("on_train_batch_start", "on_train_batch_end", "on_save_point")
    assert not any(hooks.has(name) for name in each)


def test_misspelt_monitor_is_refused_before_compilation():
    trainer = make_trainer([TerminateOnNaN("train/los")], max_epochs=1)
    with pytest.raises(ConfigError, match="'train/loss'"):
        trainer.fit(Tiny(), make_batches(2))


def test_series_that_is_never_logged_leaves_a_notice():
    run = Run(metrics={"train/loss": 1.0})
    TerminateOnNaN("train/other").on_train_end(run)
    assert "'train/other'" in run.notices[0]
