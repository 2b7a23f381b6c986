"""After an error: nothing is left behind, and the same trainer and module work again."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Accuracy, Checkpoint, Timer
from jaxtrainer.errors import DataError, StepError
from tests import tiny
from tests.bad_input import loss_of, module_with, own_threads


class Fails(Callback):
    """Raises once, in one of its hooks, at one call of it."""

    def __init__(self, hook: str, at: int = 1) -> None:
        self.left = at
        setattr(self, hook, self.count_down)

    def count_down(self, run: Run, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the hook fails")


HOOKS = {
    "setup": 1,
    "on_compile_start": 1,
    "on_fit_start": 1,
    "on_train_start": 1,
    "on_train_batch_start": 2,
    "on_train_batch_end": 2,
    "on_validation_batch_end": 1,
    "on_validation_end": 1,
    "on_train_epoch_end": 2,
    "on_fit_end": 1,
    "teardown": 1,
}


@pytest.mark.parametrize(("hook", "at"), HOOKS.items(), ids=HOOKS)
def test_trainer_works_again_after_an_error_in_a_hook(hook, at):
    timer, module = Timer(verbose=False), module_with()
    trainer = tiny.make_trainer([timer, Fails(hook, at), Accuracy()], max_epochs=2)
    with pytest.raises(RuntimeError, match="the hook fails"):
        trainer.fit(module, tiny.make_batches(3), tiny.make_batches(1))
    assert not own_threads()
    result = trainer.fit(module, tiny.make_batches(3), tiny.make_batches(1))
    assert result.num_steps == 6
    assert len(timer.epoch_times_s) == 2


def bad_rows() -> list[Any]:
    return [*tiny.make_batches(2), *tiny.make_batches(1, size=2), *tiny.make_batches(1)]


def bad_labels() -> list[Any]:
    first, second = tiny.make_batches(2)
    return [first, {**second, "label": np.full(8, 9, np.int32)}]


@pytest.mark.parametrize("loader", [[], [{}], bad_rows(), bad_labels()])
def test_trainer_works_again_after_bad_data(tmp_path, loader):
    module = module_with()
    trainer = tiny.make_trainer([Accuracy(), Checkpoint(tmp_path)], max_epochs=1)
    with pytest.raises(DataError):
        trainer.fit(module, loader)
    assert not own_threads()
    result = trainer.fit(module, tiny.make_batches(3))
    assert result.last_checkpoint == str(tmp_path / "step_3")


def test_module_works_again_after_an_error_while_tracing():
    def training_step(self, model, batch):
        return loss_of(model, batch) if self.is_right else None

    module, trainer = module_with(training_step=training_step), tiny.make_trainer(max_epochs=1)
    module.is_right = False
    with pytest.raises(StepError):
        trainer.fit(module, tiny.make_batches(3))
    module.is_right = True
    assert trainer.fit(module, tiny.make_batches(3)).num_steps == 3


def test_attributes_are_free_after_an_error():
    def training_step(self, model, batch):
        return loss_of(model, batch) * self.factors[0] * self.scale

    module = module_with(training_step=training_step, scale=1.0, factors=[1.0])
    trainer = tiny.make_trainer([Fails("on_train_epoch_end")], max_epochs=1)
    with pytest.raises(RuntimeError, match="the hook fails"):
        trainer.fit(module, tiny.make_batches(3))
    module.scale, module.factors = 2.0, [3.0]
    assert trainer.fit(module, tiny.make_batches(3)).num_steps == 3


def test_attributes_are_free_after_a_plan():
    module = module_with(training_step=lambda self, m, b: loss_of(m, b) * self.scale, scale=1.0)
    tiny.make_trainer().plan(module, tiny.make_batches(1)[0])
    module.scale = 2.0
    assert module.scale == 2.0


def test_run_goes_on_from_the_checkpoint_before_the_error(tmp_path):
    module = module_with()
    trainer = tiny.make_trainer(
        [Fails("on_train_epoch_end", 2), Checkpoint(tmp_path)], max_epochs=2
    )
    with pytest.raises(RuntimeError, match="the hook fails"):
        trainer.fit(module, tiny.make_batches(3))
    result = trainer.fit(module, tiny.make_batches(3), ckpt_path="last")
    assert result.num_steps == 6
    assert result.last_checkpoint == str(tmp_path / "step_6")


def test_checkpoint_forgets_an_earlier_run(tmp_path):
    checkpoint = Checkpoint(tmp_path / "first", monitor="train/loss")
    trainer = tiny.make_trainer([checkpoint], max_epochs=1)
    trainer.fit(module_with(), tiny.make_batches(3))
    checkpoint.dirpath = str(tmp_path / "second")
    result = trainer.fit(module_with(), tiny.make_batches(3))
    assert result.best_checkpoint == str(tmp_path / "second" / "step_3")
    assert (tmp_path / "second" / "step_3").is_dir()


class Ends(Callback):
    """Notes that it was told about an error, and the end."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_exception(self, run: Run, exception: BaseException) -> None:
        self.told.append(str(exception))

    def teardown(self, run: Run) -> None:
        self.told.append("teardown")


@pytest.mark.parametrize("hook", ["on_exception", "teardown"])
def test_callbacks_end_also_when_one_before_them_fails(hook):
    before, ends = signal.getsignal(signal.SIGINT), Ends()
    trainer = tiny.make_trainer([Fails(hook), Fails("on_train_start"), ends], max_epochs=1)
    with pytest.raises(RuntimeError, match="the hook fails"):
        trainer.fit(module_with(), tiny.make_batches(3))
    assert ends.told == ["the hook fails", "teardown"]
    assert signal.getsignal(signal.SIGINT) is before


def test_error_while_predictions_are_streamed_leaves_nothing():
    trainer, batches = tiny.make_trainer(), tiny.make_batches(4)
    stream = trainer.predict(module_with(), [*batches, {"x": batches[0]["x"]}], stream=True)
    with pytest.raises(DataError, match=r"label \(int32\[8\]\) is missing"):
        list(stream)
    assert not own_threads()
    assert len(trainer.predict(module_with(), batches)) == 4
