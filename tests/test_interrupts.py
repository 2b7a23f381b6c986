"""Signals: the first stops a fit and keeps its state, the second ends it at once."""

import os
import signal
import sys
import threading

import pytest

from jaxtrainer import Callback
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.interrupts import Interrupts
from jaxtrainer.run import Run
from jaxtrainer.watch import SignalWatch
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


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("stage", ["fit", "tune", "validate", "test", "predict"])
def test_handlers_are_there_during_the_call_only(stage):
    before = handlers()
    with Interrupts(Run(stage=stage)):
        is_new = [now is not then for now, then in zip(handlers(), before, strict=True)]
    # Ctrl-C does in an evaluation what it always does.
    assert is_new == [stage == "fit", True]
    assert handlers() == before


def test_handlers_are_left_alone_in_another_thread():
    before, seen = handlers(), []

    def work():
        with Interrupts(Run(stage="fit")):
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_call_inside_a_fit_leaves_its_handlers():
    with Interrupts(Run(stage="fit")):
        of_fit = handlers()
        with Interrupts(Run(stage="validate")):
            assert handlers() == of_fit
        assert handlers() == of_fit


def test_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts(Run(stage="fit")):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_wakeup_pipe_of_an_event_loop_still_gets_its_signals():
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        with Interrupts(Run(stage="train")) as interrupts:
            interrupts.run.stage = "train"
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGTERM)
            assert os.read(read, 1) == bytes([signal.SIGTERM])
    finally:
        assert signal.set_wakeup_fd(before) == write
        os.close(read)
        os.close(write)


def test_session_in_a_prompt_is_never_ended_by_ctrl_c(monkeypatch):
    watch = SignalWatch(SIGNALS, lambda number, count: None)
    left = []
    monkeypatch.setattr(watch, "_leave", lambda: left.append(watch._number))
    monkeypatch.setattr(sys, "ps1", "In: ", raising=False)
    for _ in range(3):
        watch._note(signal.SIGINT)
    watch._leave_if_stuck()
    assert left == []
    watch._note(signal.SIGTERM)
    assert left == [signal.SIGTERM]


def test_interrupted_module_predicts():
    module = tiny.Tiny()
    tiny.fit(module=module, callbacks=[PressCtrlC(3)], max_epochs=2)
    predictions = tiny.make_trainer().predict(module, tiny.make_batches(2))
    assert [p.shape for p in predictions] == [(8, tiny.CLASSES)] * 2


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
