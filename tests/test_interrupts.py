"""Signals: the first stops a fit and keeps its state, the second ends it; elsewhere untouched."""

import signal

import pytest

from jaxtrainer import Callback
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.interrupts import Interrupts
from jaxtrainer.run import Run
from tests import tiny


class PressCtrlC(Callback):
    """Raises SIGINT after the given step, as many times as asked."""

    every_n_train_steps = 1

    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_train_batch_end(self, run, outputs, batch, batch_idx):
        if run.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def test_first_ctrl_c_stops_the_fit_and_keeps_the_model():
    module = tiny.Tiny()
    result, _ = tiny.fit(module=module, callbacks=[PressCtrlC(3)], max_epochs=2)
    assert (result.stop_reason, result.num_steps) == ("interrupted", 3)
    assert tiny.params_of(module)["last/kernel"].shape == (8, tiny.CLASSES)


def test_second_ctrl_c_ends_the_fit_and_keeps_the_model():
    module = tiny.Tiny()
    with pytest.raises(KeyboardInterrupt):
        tiny.fit(module=module, callbacks=[PressCtrlC(3, times=2)], max_epochs=2)
    assert tiny.params_of(module)["last/kernel"].shape == (8, tiny.CLASSES)


def test_signals_are_handled_in_fit_only():
    before = signal.getsignal(signal.SIGINT)
    for stage, is_handled in (("fit", True), ("validate", False), ("test", False)):
        with Interrupts(Run(stage=stage)):
            assert (signal.getsignal(signal.SIGINT) is not before) == is_handled
        assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_monitored_series_is_logged_saves(tmp_path):
    saver = Checkpoint(tmp_path, monitor="val/loss")
    result, _ = tiny.fit(
        val_loader=tiny.make_loader(), callbacks=[PressCtrlC(3), saver], max_epochs=2
    )
    assert result.last_checkpoint == str(tmp_path / "step_3")
    assert saver.best_model_score is None


def test_saving_less_often_than_validating_takes_the_values_there_are(tmp_path):
    saver = Checkpoint(tmp_path, monitor="val/loss")
    result, _ = tiny.fit(
        val_loader=tiny.make_loader(), callbacks=[saver], max_epochs=3, check_val_every_n_epoch=2
    )
    assert result.best_checkpoint == str(tmp_path / "step_16")
    assert saver.best_model_score == result.metrics["val/loss"]
