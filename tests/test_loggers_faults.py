"""Loggers that fail, block or are full: told once, tried again, left out; training goes on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrainer import Run
from jaxtrainer.errors import LoggerWarning
from jaxtrainer.loggers import CSVLogger, JSONLinesLogger, Logger, outbox
from jaxtrainer.loggers.logger import Call
from jaxtrainer.loggers.outbox import MAX_FAILURES, Outbox
from jaxtrainer.records import Axes, End, Record, Scalars, Text
from tests import tiny
from tests.bad_input import own_threads
from tests.logged import Keeps, columns_of, points_of, read_csv, read_lines

pytestmark = pytest.mark.usefixtures("compiled_once")

HERE = Axes(step=1, epoch=0, samples=8, elapsed_s=0.0)
FIT = Call(stage="fit")


def record(step: int = 1) -> Scalars:
    axes = Axes(step=step, epoch=0, samples=8 * step, elapsed_s=0.0)
    return Scalars(axes=axes, kind="step", values={"loss": 1.0})


class Fails(Keeps):
    """Raises at its first writes."""

    def __init__(self, times: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.left, self.error = times, error or OSError(errno.ENOSPC, "No space left on device")
        self.tries = 0

    def write(self, record: Record) -> None:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise self.error
        super().write(record)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def box() -> Iterator[Any]:
    """Makes outboxes of a call; ends them."""
    made: list[Outbox] = []

    def make(logger: Logger) -> Outbox:
        made.append(Outbox(logger))
        made[-1].begin(Path(), FIT)
        return made[-1]

    yield make
    for one in made:
        one.end()
        one.join(20.0)
    assert not own_threads()


def fit(*loggers: Logger, module: Any = None) -> Any:
    return tiny.fit(module=module or tiny.Tiny(tiny.line), logger=loggers, max_epochs=2)


def test_logger_that_raises_is_told_once_and_left_out():
    bad, good = Fails(10**6), Keeps()
    module = tiny.Tiny(tiny.line)
    with pytest.warns(LoggerWarning) as caught:
        result, _ = fit(bad, good, module=module)
    assert result.num_steps == 16
    assert [str(w.message) for w in caught] == [
        "Fails failed and is tried again (OSError: [Errno 28] No space left on device); training "
        "goes on."
    ]
    assert bad.tries == MAX_FAILURES
    assert good.points("step") == points_of(result.history, "step")
    assert module.run is not None
    notices = "\n".join(module.run.notices)
    assert "Fails is left out from here on (OSError" in notices
    assert f"Fails has not written {len(good.records)} records" in notices


def test_record_that_failed_is_written_at_a_later_try():
    keeps = Fails(MAX_FAILURES - 1)
    with pytest.warns(LoggerWarning, match="is tried again"):
        result, _ = fit(keeps)
    assert keeps.points("step") == points_of(result.history, "step")
    assert keeps.closed == 1


@pytest.mark.parametrize("error", [SystemExit(1), MemoryError()])
def test_nothing_that_a_logger_raises_ends_the_run(error: BaseException):
    with pytest.warns(LoggerWarning, match=type(error).__name__):
        result, _ = fit(Fails(10**6, error))
    assert result.stop_reason == "max_epochs"


def test_logger_that_cannot_open_is_left_out():
    class Closed(Keeps):
        def open(self, root: Path, call: Call) -> None:
            raise ConnectionError("no server")

    closed = Closed()
    with pytest.warns(LoggerWarning, match="no server"):
        fit(closed)
    assert not closed.records
    assert not own_threads()


class Waits(tiny.Tiny):
    """Opens the gate of a logger when training has ended."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__(tiny.line)
        self.gate = gate

    def on_train_end(self, run: Run) -> None:
        # Every step has run by now, and the logger has not written one of them.
        self.gate.set()


def test_logger_that_blocks_holds_no_step_back():
    keeps = Keeps()
    keeps.gate.clear()
    # It blocks until the last step has run: a step that waited for it would wait for ever.
    result, _ = fit(keeps, module=Waits(keeps.gate))
    assert result.num_steps == 16
    assert keeps.points("step") == points_of(result.history, "step")


def test_logger_that_blocks_for_good_is_left_behind_at_the_end():
    keeps = Keeps()
    keeps.flush_timeout_s = 0.05
    keeps.gate.clear()
    module = tiny.Tiny(tiny.line)
    with pytest.warns(LoggerWarning, match=r"Keeps has not ended within 0 s"):
        fit(keeps, module=module)
    assert module.run is not None
    assert any("has not written" in line for line in module.run.notices)
    [thread] = [t for t in threading.enumerate() if t.name == "jaxtrainer Keeps"]
    assert thread.daemon
    keeps.gate.set()
    thread.join(20.0)
    assert len(keeps.records) == 1


def test_call_after_one_that_is_stuck_goes_without_the_logger(box: Any):
    keeps = Keeps()
    keeps.gate.clear()
    one = box(keeps)
    one.put(record())
    one.end()
    one.join(0.01)
    one.begin(Path(), FIT)
    one.put(record(2))
    assert one.dropped == 1
    assert one.news() == ["Keeps is still busy with the call before: left out"]
    keeps.gate.set()


def test_full_queue_drops_what_comes_and_counts_it(box: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox, "MAX_RECORDS", 4)
    keeps = Keeps()
    keeps.gate.clear()
    one = box(keeps)
    for step in range(10):
        one.put(record(step))
    assert one.dropped == 6
    keeps.gate.set()
    one.end()
    one.join(20.0)
    assert [r.axes.step for r in keeps.records] == [0, 1, 2, 3]
    assert (one.written, one.dropped) == (4, 6)


def test_queue_is_bounded_in_bytes(box: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox, "MAX_BYTES", 100)
    keeps = Keeps()
    keeps.gate.clear()
    one = box(keeps)
    for _ in range(3):
        one.put(Text(axes=HERE, name="x", text="y" * 60))
    assert one.dropped == 2
    keeps.gate.set()


def test_queue_that_has_room_again_takes_what_comes(box: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox, "MAX_RECORDS", 1)
    keeps, written = Keeps(), threading.Event()
    one = box(keeps)
    one.put(record(0))
    while one.written < 1:
        written.wait(0.001)
    one.put(record(1))
    one.end()
    one.join(20.0)
    assert one.dropped == 0
    assert len(keeps.records) == 2


class Gathers(Keeps):
    """Keeps, for each flush, the steps that were written before it."""

    gather_s = 60.0

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.bursts: list[list[int]] = []
        self.failures = failures

    def flush(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("no connection")
        self.bursts.append([r.axes.step for r in self.records])


def test_records_wait_for_others_and_are_flushed_together(box: Any):
    gathers = Gathers()
    one = box(gathers)
    for step in range(10):
        one.put(record(step))
    assert not gathers.records
    one.end()
    one.join(20.0)
    assert gathers.bursts == [[*range(10)]]


def test_half_a_queue_is_written_at_once(box: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox, "MAX_RECORDS", 8)
    gathers, written = Gathers(), threading.Event()
    one = box(gathers)
    for step in range(5):
        one.put(record(step))
    while not gathers.bursts:
        written.wait(0.001)
    assert gathers.bursts == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("failures", "counts"), [(4, (3, 0)), (10**6, (0, 3))])
def test_flush_is_tried_again_and_what_it_loses_is_counted(
    failures: int, counts: tuple[int, int], box: Any
):
    one = box(Gathers(failures))
    for step in range(3):
        one.put(record(step))
    one.end()
    one.join(20.0)
    assert (one.written, one.dropped) == counts
    assert one.is_off == (counts == (0, 3))


class FullDisk:
    """Takes a part of the first write that comes after `count` others, and refuses the rest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, room: int = 7) -> None:
        self.real, self.count, self.room = os.pwrite, count, room
        self.is_full = True
        monkeypatch.setattr(os, "pwrite", self.write)

    def write(self, file: int, content: bytes, offset: int) -> int:
        before = os.fstat(file).st_size
        if not self.is_full or offset + len(content) <= before:
            return self.real(file, content, offset)
        if self.count:
            self.count -= 1
            return self.real(file, content, offset)
        if self.room:
            room, self.room = self.room, 0
            return self.real(file, content[:room], offset)
        raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_that_fills_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    FullDisk(monkeypatch, 3)
    with pytest.warns(LoggerWarning, match="No space left"):
        result, _ = fit(JSONLinesLogger(tmp_path))
    assert result.num_steps == 16
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_disk_that_has_room_again_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = FullDisk(monkeypatch, 2)
    written = outbox.Outbox._failed

    def make_room(box: Outbox, error: BaseException, *, is_last: bool) -> None:
        disk.is_full = False
        written(box, error, is_last=is_last)

    monkeypatch.setattr(outbox.Outbox, "_failed", make_room)
    with pytest.warns(LoggerWarning, match="No space left"):
        result, _ = fit(CSVLogger(tmp_path))
    for kind in ("step", "epoch"):
        found = columns_of(read_csv(tmp_path / f"{kind}s.csv"))
        assert found == points_of(result.history, kind)


def test_end_is_the_last_record(tmp_path: Path):
    keeps = Keeps()
    fit(keeps)
    assert isinstance(keeps.records[-1], End)
    assert np.isfinite(keeps.records[-1].metrics["train/loss"])
