"""When training ends: each limit at exactly its count, in each of its forms, with its reason."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import EarlyStopping
from jaxtrainer.errors import ConfigError
from tests import tiny
from tests.bad_input import refused

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCH = 8


class Ticks:
    """A clock that stands still until a batch ends: 30 s for each."""

    def __init__(self) -> None:
        self.now = 7.0

    def __call__(self) -> float:
        return self.now


class Batches(Callback):
    """Lets the time of each batch pass, and asks to stop at one step."""

    def __init__(self, clock: Ticks | None = None, stop_at: int | None = None) -> None:
        self.clock, self.stop_at = clock, stop_at

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.clock is not None:
            self.clock.now += 30.0
        if run.global_step == self.stop_at:
            run.stop("enough")


@pytest.mark.parametrize(
    "max_time",
    [
        "00:00:05:00",
        timedelta(minutes=5),
        {"minutes": 5},
        {"minutes": 4, "seconds": 60},
        300,
        300.0,
    ],
    ids=str,
)
def test_max_time_ends_the_run_in_each_of_its_forms(max_time: Any):
    clock = Ticks()
    options: Any = {"max_time": max_time, "clock": clock, "steps_per_dispatch": 1}
    result, _ = tiny.fit(callbacks=[Batches(clock)], **options)
    assert (result.stop_reason, result.num_steps, result.elapsed_s) == ("max_time", 10, 300.0)


def test_max_time_counts_what_was_used_before_a_resume(tmp_path):
    from jaxtrainer.callbacks import Checkpoint

    def train(**options: Any) -> Any:
        clock = Ticks()
        callbacks = [Batches(clock), Checkpoint(tmp_path)]
        return tiny.fit(callbacks=callbacks, clock=clock, steps_per_dispatch=1, **options)[0]

    train(max_steps=6)
    result = train(max_time=300, ckpt_path="last")
    assert (result.stop_reason, result.num_steps, result.elapsed_s) == ("max_time", 10, 300.0)


@pytest.mark.parametrize(
    ("options", "reason", "steps", "epochs"),
    [
        ({"max_steps": 11}, "max_steps", 11, 1),
        ({"max_epochs": 2}, "max_epochs", 16, 2),
        ({"max_epochs": 2, "max_steps": 16}, "max_steps", 16, 2),
        ({"max_epochs": -1, "max_steps": 11}, "max_steps", 11, 1),
        ({"max_epochs": 1, "max_steps": -1}, "max_epochs", 8, 1),
        ({"max_epochs": 0}, "max_epochs", 0, 0),
        ({"max_steps": 0}, "max_steps", 0, 0),
        ({"max_epochs": 2, "limit_train_batches": 3}, "max_epochs", 6, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, "max_epochs", 8, 2),
        ({"max_steps": 4, "accumulate_grad_batches": 3}, "max_steps", 4, 1),
    ],
    ids=str,
)
def test_result_says_what_ended_the_run(options: Any, reason: str, steps: int, epochs: int):
    result, _ = tiny.fit(**options)
    assert (result.stop_reason, result.num_steps, result.num_epochs) == (reason, steps, epochs)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
@pytest.mark.parametrize(
    ("least", "at"),
    [({}, 3), ({"min_steps": 6}, 6), ({"min_epochs": 1}, 8), ({"min_steps": 10}, 10)],
    ids=str,
)
def test_least_training_is_held_to_exactly(least: Any, at: int, steps: int):
    stop = Batches(stop_at=3)
    if steps == 4:
        # Fused, it is asked after the dispatch: control at that step makes both alike.
        stop.every_n_train_steps = 3
    result, _ = tiny.fit(callbacks=[stop], max_epochs=3, steps_per_dispatch=steps, **least)
    assert (result.stop_reason, result.num_steps) == ("enough", at)


def test_limit_of_minus_one_is_no_limit_where_a_callback_ends_the_run():
    stopping = EarlyStopping("train/loss", patience=2, min_delta=100.0)
    result, _ = tiny.fit(callbacks=[stopping], max_epochs=-1)
    assert result.stop_reason.startswith("early_stopping: train/loss did not improve")
    assert result.num_epochs == 3


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_epochs": None}, "To train until a callback or Ctrl-C ends it pass `max_epochs=-1`"),
        ({"max_epochs": -2}, "max_epochs must be an integer of at least 0"),
        ({"max_epochs": None, "max_steps": -3}, "max_steps must be an integer of at least 0"),
        ({"max_epochs": 2, "min_epochs": -1}, "min_epochs must be an integer of at least 0"),
    ],
    ids=str,
)
def test_limit_that_is_none_is_refused(options: Any, part: str):
    refused(ConfigError, part, **options)


def test_epoch_means_are_exact_where_batches_are_left_out():
    seen: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(float(outputs["loss"]))

    loader = tiny.make_batches(EPOCH, ragged=3)
    result, _ = tiny.fit(loader, callbacks=[Losses()], max_epochs=1)
    assert len(seen) == EPOCH
    # One float32 rounding of each batch's loss times its 8 rows, which is exact.
    assert result.metrics["train/loss"] == pytest.approx(sum(seen) / EPOCH, rel=1e-6)
