"""Batches to an update by epoch: counted by hand, resumed, and against one batch of all samples.

Tolerance: as in `test_accumulation`, float32 sums of the same gradients in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from jaxtrainer import Callback, Run, Trainer
from jaxtrainer.callbacks import Checkpoint, GradientAccumulationScheduler
from jaxtrainer.checkpoint import find_checkpoint, read_record
from jaxtrainer.errors import ConfigError
from tests import tiny
from tests.bad_input import refused
from tests.test_accumulation import RATE, Regression, assert_close, cut, descend, make_rows, trained

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCH = 8
SCHEDULE = {0: 1, 1: 3, 3: 2}
STEPS = [8, 3, 3, 4, 4]
"""Updates of each of five epochs of 8 batches under SCHEDULE; the last window of three is cut."""


class Steps(Callback):
    """The optimiser step and the factor at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.factors: list[int] = []

    def on_train_epoch_end(self, run: Run) -> None:
        self.seen.append(run.global_step)
        self.factors.append(run.accumulate)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_schedule_counts_updates_as_by_hand(steps: int):
    seen = Steps()
    result, state = tiny.fit(
        callbacks=[seen],
        max_epochs=5,
        accumulate_grad_batches=SCHEDULE,
        steps_per_dispatch=steps,
    )
    assert seen.seen == np.cumsum(STEPS).tolist()
    assert seen.factors == [1, 3, 3, 2, 2]
    assert result.num_steps == state[".opt_state['default'][0].count"] == sum(STEPS)


def test_schedule_begins_with_single_batches():
    seen = Steps()
    tiny.fit(callbacks=[seen], max_epochs=2, accumulate_grad_batches={1: 4})
    assert seen.seen == [8, 10]


def test_schedule_is_plain_descent_on_the_windows():
    rows = make_rows(56)
    _, params = trained(cut(rows, 8), accumulate_grad_batches={0: 1, 1: 3}, max_epochs=2)
    assert_close(params, descend([*cut(rows, 8), *cut(rows, 24)]))


def test_schedule_of_one_number_is_that_number():
    rows = cut(make_rows(56), 8)
    _, plain = trained(rows, accumulate_grad_batches=3, max_epochs=2)
    _, scheduled = trained(rows, accumulate_grad_batches={0: 3}, max_epochs=2)
    tiny.assert_same_bits(scheduled, plain)


def test_scheduler_is_the_option():
    rows = cut(make_rows(56), 8)
    _, plain = trained(rows, accumulate_grad_batches=SCHEDULE, max_epochs=4)
    scheduler = GradientAccumulationScheduler(SCHEDULE)
    _, scheduled = trained(rows, callbacks=[scheduler], max_epochs=4)
    tiny.assert_same_bits(scheduled, plain)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_schedule_stops_at_exactly_max_steps(steps: int):
    result, _ = tiny.fit(max_steps=10, accumulate_grad_batches=SCHEDULE, steps_per_dispatch=steps)
    # 8 updates of single batches, then two of three.
    assert (result.num_steps, result.num_samples) == (10, (8 + 6) * 8)


def test_schedule_gives_control_at_multiples_of_a_period():
    seen: list[tuple[int, int]] = []

    class Every(Callback):
        every_n_train_steps = 2

        def on_save_point(self, run: Run) -> None:
            seen.append((run.global_step, run.total_batches))

    tiny.fit(callbacks=[Every()], max_epochs=2, accumulate_grad_batches={1: 3})
    # Dispatches end at full chunks too: after batches 12 of the second epoch's windows of three.
    assert [s for s in seen if s[0] % 2 == 0] == [(2, 2), (4, 4), (6, 6), (8, 8), (10, 14)]
    assert seen[-1] == (11, 16)


@pytest.mark.parametrize("batches", [10, 13, 17], ids=["open_window", "cut_window", "next_epoch"])
def test_resume_goes_on_inside_a_scheduled_window(batches: int, tmp_path: Path):
    class StopAt(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            if run.total_batches >= batches:
                run.stop("interrupted")

    options: Any = {"max_epochs": 4, "accumulate_grad_batches": SCHEDULE, "steps_per_dispatch": 1}
    _, whole = tiny.fit(**options)
    # No earlier checkpoint: that of the same update would stand for the open window.
    tiny.fit(callbacks=[StopAt(), Checkpoint(tmp_path, every_n_epochs=9)], **options)
    assert read_record(find_checkpoint(tmp_path))["loop"]["total_batches"] == batches
    _, resumed = tiny.fit(ckpt_path=tmp_path, **options)
    tiny.assert_same_bits(resumed, whole)


@pytest.mark.parametrize(
    ("accumulate", "epochs", "steps"),
    [
        (1, 2, 16),
        (3, 2, 6),
        (SCHEDULE, 5, 22),
        (SCHEDULE, 2, 11),
        (SCHEDULE, 1, 8),
        ({9: 4}, 3, 24),
    ],
)
def test_estimated_steps_are_updates(accumulate: Any, epochs: int, steps: int):
    class Module(tiny.Tiny):
        def configure_optimizers(self) -> Any:
            self.estimate = self.run.estimated_steps if self.run else None
            return optax.sgd(optax.linear_schedule(0.1, 0.0, self.estimate or 1))

    module = Module(tiny.line)
    trainer = tiny.make_trainer(max_epochs=epochs, accumulate_grad_batches=accumulate)
    result = trainer.fit(module, tiny.make_loader())
    assert module.estimate == result.num_steps == steps


def test_estimated_schedule_ends_with_the_last_update():
    class Rated(Regression):
        def configure_optimizers(self) -> Any:
            assert self.run is not None
            assert self.run.estimated_steps == 6
            # The rate of the last update alone is not zero.
            return optax.sgd(lambda count: RATE * (count == 5))

    rows, module = make_rows(56), Rated()
    tiny.fit(cut(rows, 8), module=module, accumulate_grad_batches=3, max_epochs=2)
    assert_close(tiny.params_of(module), descend([cut(rows, 24)[2]]))


class Tokens(Regression):
    """The loss of a batch is a mean over its tokens, of which each batch has another number."""

    def training_step(self, model: Any, batch: Any) -> dict[str, Any]:
        errors = (model(batch["x"])[:, 0] - batch["y"]) ** 2
        count = batch["mask"].sum()
        return {"loss": (errors * batch["mask"]).sum() / count, "weight": count}


def test_windows_with_uneven_tokens_are_one_batch_of_all_tokens():
    rows = make_rows(40)
    mask = np.zeros(40, np.float32)
    for start, count in zip(range(0, 40, 8), (8, 1, 3, 2, 5), strict=True):
        mask[start : start + count] = 1.0
    batches = cut({"x": rows["x"], "y": rows["y"], "mask": mask}, 8)
    module = Tokens()
    # Two windows: three batches of 12 tokens, and one cut short, of 7.
    tiny.fit(batches, module=module, accumulate_grad_batches=3, max_epochs=1)
    weighted = cut({"x": rows["x"], "y": rows["y"], "w": mask}, 24)
    assert_close(tiny.params_of(module), descend(weighted))


def test_window_without_weight_changes_nothing():
    class Silent(Regression):
        def training_step(self, model: Any, batch: Any) -> dict[str, Any]:
            loss = ((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean()
            return {"loss": loss, "weight": 0.0 * batch["w"].sum()}

    module = Silent()
    tiny.fit(cut(make_rows(32), 8), module=module, accumulate_grad_batches=2, max_epochs=1)
    params = tiny.params_of(module)
    assert {name: array.tolist() for name, array in params.items()} == {
        "bias": [0.0],
        "kernel": [[0.0]] * tiny.FEATURES,
    }


def test_window_that_is_open_when_an_epoch_is_skipped_goes_on():
    class Skip(Callback):
        def on_train_batch_start(self, run: Run, batch: Any, batch_idx: int) -> int | None:
            return -1 if (run.epoch, batch_idx) == (0, 4) else None

    rows, module = make_rows(48), Regression()
    options: Any = {"accumulate_grad_batches": 3, "max_epochs": 2}
    result, _ = tiny.fit(cut(rows, 8), module=module, callbacks=[Skip()], **options)
    b = cut(rows, 8)
    joined = {k: np.concatenate([b[i][k] for i in (3, 0, 1, 2)]) for k in rows}
    assert result.num_steps == 3
    assert_close(tiny.params_of(module), descend([*cut(rows, 24)[:1], joined, cut(rows, 24)[1]]))


def test_logged_loss_is_that_of_the_batch():
    rows = cut(make_rows(32), 8)
    frozen = optax.set_to_zero()
    options: Any = {"max_epochs": 1, "log_every_n_steps": 1}
    plain, _ = trained(rows, frozen, **options)
    accumulated, _ = trained(rows, frozen, accumulate_grad_batches=4, **options)
    for kind in ("step", "epoch"):
        got = getattr(accumulated.history, kind)["train/loss"].values
        np.testing.assert_allclose(
            got, getattr(plain.history, kind)["train/loss"].values, rtol=1e-6
        )


def test_window_of_bfloat16_gradients_is_added_up_in_float32():
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 2, "precision": "bf16-true"}
    _, state = tiny.fit(module=tiny.Tiny(tiny.line), **options)
    sums = {k: v for k, v in state.items() if k.startswith(".accumulated['grads']")}
    assert {v.dtype for v in sums.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({}, "accumulate_grad_batches={} has no epoch; pass e.g. `{0: 1, 4: 2}`"),
        ({-1: 2}, "an epoch in accumulate_grad_batches={-1: 2} must be an integer of at least 0"),
        ({0: 0}, "the number of batches in accumulate_grad_batches={0: 0} must be an integer"),
        ({0: 1.5}, "must be an integer of at least 1, got 1.5"),
        (0, "accumulate_grad_batches must be an integer of at least 1, got 0"),
    ],
)
def test_schedule_refuses_a_value(value: Any, part: str):
    with pytest.raises(ConfigError) as caught:
        Trainer(max_epochs=1, accumulate_grad_batches=value)
    assert part in str(caught.value)


@pytest.mark.parametrize("value", [{}, 4, {0: 0}])
def test_scheduler_refuses_a_value(value: Any):
    with pytest.raises(ConfigError, match="scheduling"):
        GradientAccumulationScheduler(value)


def test_scheduler_and_option_are_refused_together():
    parts = ("accumulate_grad_batches=2 and a GradientAccumulationScheduler", "{0: 4}")
    scheduler = GradientAccumulationScheduler({0: 4})
    refused(ConfigError, *parts, callbacks=[scheduler], accumulate_grad_batches=2)


def test_two_schedulers_are_refused():
    schedulers = [GradientAccumulationScheduler({0: 4}), GradientAccumulationScheduler({0: 2})]
    refused(ConfigError, "keep one `GradientAccumulationScheduler`", callbacks=schedulers)
