"""`OnExceptionCheckpoint`: a crash leaves a state to go on from, and success leaves nothing."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import OnExceptionCheckpoint
from jaxtrainer.errors import RunDirError
from tests.tiny import Probe, Tiny, assert_same_bits, make_batches, make_trainer


class FailAt(Callback):
    """Raises after this many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.total_batches >= self.batches and run.resumed_step is None:
            raise ZeroDivisionError("on purpose")


def fit(*callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Any:
    trainer = make_trainer(callbacks, **{"max_epochs": 2, "steps_per_dispatch": 2, **options})
    return trainer.fit(Tiny(), make_batches(6), ckpt_path=ckpt_path)


def crash(directory: Path, batches: int = 8, **options: Any) -> tuple[str, str]:
    """Return the path of the checkpoint and the note of the exception."""
    callback = OnExceptionCheckpoint(directory)
    with pytest.raises(ZeroDivisionError) as caught:
        fit(callback, FailAt(batches), **options)
    return str(callback.path), "\n".join(caught.value.__notes__)


def test_crashed_run_goes_on_as_if_uninterrupted(tmp_path: Path):
    whole, resumed = Probe(), Probe()
    fit(whole)
    path, note = crash(tmp_path)
    assert path == str(tmp_path / "step_8")
    assert f"fit(..., ckpt_path={path!r})" in note
    fit(resumed, ckpt_path=path)
    assert_same_bits(resumed.state, whole.state)


def test_success_leaves_nothing(tmp_path: Path):
    callback = OnExceptionCheckpoint(tmp_path / "crash")
    fit(callback)
    assert callback.path is None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_open_accumulation_window_is_saved(tmp_path: Path):
    whole, resumed = Probe(), Probe()
    fit(whole, accumulate_grad_batches=4)
    path, _ = crash(tmp_path, batches=2, accumulate_grad_batches=4)
    fit(resumed, ckpt_path=path, accumulate_grad_batches=4)
    assert_same_bits(resumed.state, whole.state)


@pytest.mark.slow
def test_second_crash_keeps_the_first_checkpoint(tmp_path: Path):
    first, _ = crash(tmp_path / "crash")
    second, _ = crash(tmp_path / "crash", batches=4)
    assert (first, second) == (
        str(tmp_path / "crash" / "step_8"),
        str(tmp_path / "crash-2" / "step_4"),
    )


def test_interrupted_run_is_saved(tmp_path: Path):
    class Interrupt(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                signal.raise_signal(signal.SIGINT)

    callback = OnExceptionCheckpoint(tmp_path)
    result = fit(callback, Interrupt())
    assert result.stop_reason == "interrupted"
    assert result.last_checkpoint == callback.path == str(tmp_path / "step_4")


def test_state_that_is_gone_is_not_saved_and_the_note_says_so(tmp_path: Path):
    callback = OnExceptionCheckpoint(tmp_path)
    run = Run(total_batches=1, capture=lambda: None)
    run.state = {"params": jax.numpy.zeros(2)}
    run.state["params"].delete()
    error = ZeroDivisionError()
    callback.on_exception(run, error)
    assert "no checkpoint: the exception came while" in error.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_failing_save_does_not_hide_the_exception(tmp_path: Path):
    class Unsaveable(FailAt):
        def state_dict(self) -> dict[str, Any]:
            return {"bad": object()} if self.armed else {}

        armed = False

        def on_train_start(self, run: Run) -> None:
            self.armed = True

    with pytest.raises(ZeroDivisionError) as caught:
        fit(OnExceptionCheckpoint(tmp_path), Unsaveable(2))
    assert "no checkpoint: a checkpoint record holds JSON data" in "\n".join(caught.value.__notes__)


def test_exception_before_the_first_step_leaves_nothing(tmp_path: Path):
    class Fail(Callback):
        def on_train_start(self, run: Run) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(OnExceptionCheckpoint(tmp_path), Fail())
    assert not list(tmp_path.iterdir())


def test_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="file is no directory"):
        fit(OnExceptionCheckpoint(tmp_path / "file" / "crash"))
