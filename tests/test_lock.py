"""One writer to a run directory: who is refused, and whose lock is taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.errors import RunDirError
from jaxtrainer.lock import RunLock
from jaxtrainer.store import CheckpointStore
from tests import tiny
from tests.bad_input import refused

HOLD = """
import sys
from pathlib import Path
from jaxtrainer.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def owner_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ".lock").read_text())


def write_lock(folder: Path, **changes: Any) -> None:
    """A lock like the one that this process would write, but for some of it."""
    lock = RunLock(folder)
    lock.acquire()
    (folder / ".lock").write_text(json.dumps({**owner_of(folder), **changes}))


def test_lock_says_who_holds_it_and_is_given_back(tmp_path: Path):
    lock = RunLock(tmp_path)
    lock.acquire()
    owner = owner_of(tmp_path)
    assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_second_writer_is_refused_while_the_first_lives(
    tmp_path: Path, other: subprocess.Popen[str]
):
    with pytest.raises(RunDirError, match=f"is being written by process {other.pid} on"):
        RunLock(tmp_path).acquire()
    assert owner_of(tmp_path)["pid"] == other.pid


def test_run_in_a_directory_that_is_written_is_refused(
    tmp_path: Path, other: subprocess.Popen[str]
):
    parts = (f"process {other.pid} on", "Wait for it or end it")
    refused(RunDirError, *parts, callbacks=[Checkpoint(tmp_path)])


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path, other: subprocess.Popen[str]):
    other.kill()
    # Not waited for: until its parent takes notice it still has its number.
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    RunLock(tmp_path).acquire()
    assert owner_of(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize(
    "changes",
    [{"started": "1"}, {"boot": "another"}, {"pid": 2**22 + 1, "started": "1"}],
    ids=["number_used_again", "before_a_reboot", "no_such_process"],
)
def test_lock_of_a_process_that_is_gone_is_taken_over(tmp_path: Path, changes: dict[str, Any]):
    write_lock(tmp_path, **changes)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "1"}'])
def test_lock_that_says_nothing_is_taken_over(tmp_path: Path, text: str):
    (tmp_path / ".lock").write_text(text)
    RunLock(tmp_path).acquire()
    assert owner_of(tmp_path)["pid"] == os.getpid()


def test_lock_of_another_host_is_refused_saying_how_to_remove_it(tmp_path: Path):
    write_lock(tmp_path, host="elsewhere")
    part = rf"on elsewhere: .*If it has ended, delete {tmp_path}/\.lock"
    with pytest.raises(RunDirError, match=part):
        RunLock(tmp_path).acquire()


def test_two_stores_of_this_process_in_one_directory_are_refused(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(RunDirError, match="That is this process"):
        CheckpointStore(tmp_path)
    store.close()
    CheckpointStore(tmp_path).close()


def test_lock_that_another_has_taken_over_is_not_deleted(tmp_path: Path):
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / ".lock").write_text("another's")
    lock.release()
    assert (tmp_path / ".lock").read_text() == "another's"


def test_file_system_without_links_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def link(*_: Any) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", link)
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(RunDirError, match="is being written"):
        RunLock(tmp_path).acquire()


def test_run_leaves_no_lock(tmp_path: Path):
    tiny.fit(
        tiny.make_batches(2),
        module=tiny.Tiny(tiny.line),
        callbacks=[Checkpoint(tmp_path)],
        max_epochs=1,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_run_that_is_refused_leaves_no_lock(tmp_path: Path):
    saver = [Checkpoint(tmp_path)]
    tiny.fit(tiny.make_batches(2), module=tiny.Tiny(tiny.line), callbacks=saver, max_epochs=1)
    refused(RunDirError, "already has 1 checkpoint(s)", callbacks=[Checkpoint(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]
