"""Loaders that raise, end, or never answer: an error that says where, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from jaxtrainer import Callback, Run, data, waiting
from jaxtrainer.callbacks import OnExceptionCheckpoint
from jaxtrainer.errors import DataError, DataTimeoutError
from jaxtrainer.waiting import Patience
from tests import tiny
from tests.bad_input import assert_says, own_threads, refused

ROOT = Path(__file__).parents[1]
ROWS = 4


class Failing:
    """Six batches, before one of which it does something else."""

    def __init__(self, at: int, act: Callable[[], Any]) -> None:
        self.at, self.act = at, act

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(tiny.make_batches(6)):
            if i == self.at:
                self.act()
            yield batch


def fail() -> None:
    raise OSError("the disk is gone")


def test_error_of_a_loader_names_batch_epoch_and_step():
    loader = Failing(5, fail)
    error = refused(OSError, "the disk is gone", loader=loader, compiled=["train step"])
    assert_says(error, "while reading train batch 5 of epoch 0", "in train, epoch 0, step 5")


def test_error_of_the_first_batch_names_it():
    refused(OSError, "while reading train batch 0 of epoch 0", loader=Failing(0, fail))


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_run_goes_on_at_the_batch_that_failed(tmp_path: Path, steps: int):
    options: Any = {"max_epochs": 2, "steps_per_dispatch": steps}
    _, whole = tiny.fit(tiny.make_batches(6), **options)
    crash = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(OSError, match="the disk is gone"):
        tiny.fit(Failing(5, fail), callbacks=[crash], **options)
    assert crash.path == str(tmp_path / "step_5")
    _, resumed = tiny.fit(tiny.make_batches(6), ckpt_path=crash.path, **options)
    tiny.assert_same_bits(resumed, whole)


def read_record(row: int) -> dict[str, Any]:
    if row == 13:
        raise OSError("the disk is gone")
    return {"x": np.ones(tiny.FEATURES, np.float32), "label": np.int32(row % 3)}


def test_error_of_a_grain_dataset_names_the_record():
    loader = grain.MapDataset.range(24).map(read_record).batch(ROWS)
    error = refused(OSError, "the disk is gone", loader=loader, compiled=["train step"])
    assert_says(error, "train batch 3 of epoch 0", "of samples 12 to 15 of the epoch, 13 cannot")


@pytest.mark.parametrize("at", [0, 3], ids=["first", "later"])
def test_loader_that_never_answers_ends_with_where_it_is(at: int):
    release = threading.Event()
    parts = [f"in the data phase: train batch {at} of epoch 0 was not read within 0.5 s"]
    parts += ["release.wait", "Trainer(data_timeout='00:01:00:00')"]
    trainer = tiny.make_trainer(max_epochs=1, data_timeout=0.5)
    with pytest.raises(DataTimeoutError) as caught:
        trainer.fit(tiny.Tiny(make=tiny.line), Failing(at, lambda: release.wait()))
    assert_says(caught.value, *parts)
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("jaxtrainer"):
            thread.join(10)
    assert not own_threads()


def test_validation_loader_that_never_answers_ends_too():
    release = threading.Event()
    trainer = tiny.make_trainer(max_epochs=1, data_timeout=0.5)
    loader = Failing(3, lambda: release.wait())
    with pytest.raises(DataTimeoutError, match="validate batch 3 of epoch 0"):
        trainer.fit(tiny.Tiny(make=tiny.line), tiny.make_batches(2), loader)
    release.set()


def test_loader_that_is_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "_POLL_S", 0.01)
    items: queue.SimpleQueue[str] = queue.SimpleQueue()
    names = iter(["batch 0", "batch 1", "batch 1", None, None, "batch 2", "batch 3"])

    def reading() -> str | None:
        name = next(names)
        if name == "batch 3":
            items.put("chunk")
        return name

    patience = Patience(limit_s=0.02)
    assert patience.take(items, threading.current_thread(), reading) == "chunk"


def test_no_time_limit_is_an_option():
    result = tiny.make_trainer(max_epochs=1, data_timeout=None).fit(
        tiny.Tiny(make=tiny.line), tiny.make_batches(2)
    )
    assert result.num_steps == 2


class DataLoader:
    """What a PyTorch loader looks like from outside."""

    __module__ = "torch.utils.data.dataloader"

    def __init__(self, context: Any, num_workers: int = 2) -> None:
        self.multiprocessing_context, self.num_workers = context, num_workers

    def __iter__(self) -> Iterator[Any]:
        return iter(tiny.make_batches(2))

    def __len__(self) -> int:
        return 2


def test_loader_that_forks_is_refused():
    hint = "`DataLoader(..., multiprocessing_context='spawn')`"
    context = multiprocessing.get_context("fork")
    refused(DataError, "a PyTorch DataLoader with num_workers=2", hint, loader=DataLoader(context))
    loader = data.on_device(DataLoader(context), lambda batch: batch)
    refused(DataError, hint, loader=loader)


def test_loader_that_forks_by_default_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["fork", "spawn"])
    refused(DataError, "num_workers=0", loader=DataLoader(None))


@pytest.mark.parametrize("loader", [("spawn", 2), ("forkserver", 2), ("fork", 0)])
def test_loader_that_does_not_fork_is_read(loader: Any):
    method, workers = loader
    loader = DataLoader(multiprocessing.get_context(method), workers)
    result, _ = tiny.fit(loader, max_epochs=1)
    assert result.num_steps == 2


class Sized:
    """A PyTorch loader that drops its remainder."""

    dataset = range(3)
    batch_size = 8

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize(
    "loader",
    [
        grain.MapDataset.range(3).batch(8, drop_remainder=True),
        grain.MapDataset.range(3).to_iter_dataset().batch(8, drop_remainder=True),
        Sized(),
    ],
    ids=["grain-map", "grain-iter", "torch"],
)
@pytest.mark.parametrize("place", ["loader", "val_loader"])
def test_loader_smaller_than_a_batch_is_refused_with_its_sizes(place: str, loader: Any):
    parts = ("It reads 3 samples in batches of 8.", "use a smaller batch size, 3 at most")
    refused(DataError, *parts, **{place: loader})


class Closing:
    """A generator of batches that notes when it is closed."""

    def __init__(self, bad: bool) -> None:
        self.bad, self.closed = bad, 0

    def __iter__(self) -> Iterator[Any]:
        try:
            for i, batch in enumerate(tiny.make_batches(9)):
                yield {**batch, "x": np.ones((8, 5), np.float32)} if self.bad and i == 5 else batch
        finally:
            self.closed += 1


@pytest.mark.parametrize("bad", [True, False])
def test_iterator_of_a_loader_is_closed_while_the_error_is_kept(bad: bool):
    class Fail(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise ZeroDivisionError

    loader = Closing(bad)
    with pytest.raises((DataError, ZeroDivisionError)) as caught:
        tiny.fit(loader, callbacks=[] if bad else [Fail()], max_epochs=1)
    assert loader.closed == 1, caught


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.loader_program", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_stuck_thread_of_an_executor_does_not_keep_the_program_alive():
    done = run_program("executor")
    assert "DataTimeoutError" in done.stderr
    assert "it is left as it is" in done.stderr
    assert done.returncode == waiting.EXIT_STUCK


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("raise", "ZeroDivisionError: on purpose"),
        ("kill", "terminated unexpectedly with exit code -9"),
        ("stop", "DataTimeoutError: in the data phase: train batch"),
    ],
)
def test_worker_process_that_fails_ends_the_run_and_leaves_nobody(fault: str, error: str):
    done = run_program(fault)
    assert error in done.stderr
    assert "children: 0" in done.stdout
    seconds = float(done.stdout.partition("seconds: ")[2].split()[0])
    assert seconds < 10
    assert done.returncode == 1
