"""Two processes in one: who leaves, and with what reason, over a table in memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxtrainer import Callback, Run, peers
from jaxtrainer.aborts import DelayedAbort
from jaxtrainer.ending import EXIT_RESTART
from jaxtrainer.errors import DistributedTimeoutError
from jaxtrainer.peers import NoPeers, Peers, peers_of
from jaxtrainer.whereabouts import Place, place_of
from tests import tiny

GLOO = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")


class Memory:
    """A table in memory."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.reasons: list[str] = []
        self.is_accused = threading.Event()

    def put(self, process: int, text: str) -> None:
        self.texts[process] = text

    def rows(self) -> dict[int, str]:
        return dict(self.texts)

    def accuse(self, reason: str) -> None:
        self.reasons.append(reason)
        self.is_accused.set()

    def reason(self, timeout_s: float) -> str | None:
        return self.reasons[0] if self.is_accused.wait(timeout_s) else None


class One:
    """One of two processes: what it was left with, and how often it was torn down."""

    def __init__(self, index: int, table: Any, timeout_s: float | None = None) -> None:
        self.codes: list[int] = []
        self.has_left = threading.Event()
        self.teardowns = 0
        self.run = Run()
        at = {"index": index, "count": 2, "table": table, "leave": self.leave}
        self.peers = Peers(self.run, self.tear_down, timeout_s=timeout_s, every=10, **at)

    def leave(self, code: int) -> None:
        self.codes.append(code)
        self.has_left.set()

    def tear_down(self) -> None:
        self.teardowns += 1


class Ending:
    """What a test must not do to the process it runs in."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.failures = 0

    def watch(self, tells: Callable[..., Any]) -> None: ...

    def has_failed(self) -> None:
        self.failures += 1


@pytest.fixture(autouse=True)
def ending(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ending]:
    stub = Ending()
    monkeypatch.setattr(peers, "ENDING", stub)
    monkeypatch.setattr(peers, "LINGER_S", 0.0)
    monkeypatch.setattr(peers, "TICK_S", 0.02)
    monkeypatch.setattr(peers, "_OWN_ERROR_S", 0.3)
    yield stub
    for thread in stub.threads:
        thread.join(5.0)
    assert not [thread.name for thread in stub.threads if thread.is_alive()]


@pytest.fixture
def two() -> Iterator[tuple[One, One]]:
    table = Memory()
    both = One(0, table), One(1, table)
    for one in both:
        one.peers.start()
    yield both
    for one in both:
        one.peers.close(None)


def test_exception_of_one_makes_the_other_leave(two: tuple[One, One], ending: Ending, capfd: Any):
    first, second = two
    second.run.global_step = 40
    second.peers.fail(KeyError("x"))
    assert first.has_left.wait(5.0)
    assert (first.codes, first.teardowns) == ([EXIT_RESTART], 1)
    line = "process 0 of 2 leaves with code 75: process 1 of 2 failed in step 40 of fit: KeyError"
    assert line in capfd.readouterr().err
    second.peers.close(KeyError("x"))
    assert (second.codes, ending.failures) == ([], 1)


def test_exception_that_all_raise_ends_no_process(two: tuple[One, One]):
    for one in two:
        one.peers.fail(KeyError("x"))
    for one in two:
        one.peers.teardown()
        one.peers.close(KeyError("x"))
    assert [(one.codes, one.teardowns) for one in two] == [([], 1), ([], 1)]


@pytest.mark.parametrize("error", [GLOO, DistributedTimeoutError("late")], ids=["gloo", "barrier"])
def test_error_that_follows_from_another_leaves_with_its_reason(
    two: tuple[One, One], error: Exception, capfd: Any
):
    first, second = two
    second.peers.fail(KeyError("x"))
    first.peers.fail(error)
    first.peers.close(error)
    assert first.codes == [EXIT_RESTART]
    assert "process 0 of 2 leaves with code 75: process 1 of 2 failed" in capfd.readouterr().err


def test_error_of_the_network_without_a_culprit_is_its_own(
    two: tuple[One, One], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "_SEEK_S", 0.3)
    first, second = two
    first.peers.fail(GLOO)
    first.peers.close(GLOO)
    assert first.codes == []
    assert second.has_left.wait(5.0)


def test_process_that_is_stuck_accuses_itself(capfd: Any):
    table = Memory()
    one = One(1, table, timeout_s=0.2)
    one.peers.start()
    # The first step has run, and the main thread is in a hook.
    one.run.total_batches = 8

    class Stuck(Callback):
        def on_save_point(self, run: Run) -> None:
            one.run.total_batches += 1
            assert one.has_left.wait(10.0)

    Stuck().on_save_point(one.run)
    one.peers.close(None)
    assert one.codes == [EXIT_RESTART]
    assert "has been in phase hook (Stuck.on_save_point) of step 0" in table.reasons[0]
    assert "in on_save_point" in capfd.readouterr().err


def test_outage_of_the_service_ends_when_it_is_too_long(monkeypatch: pytest.MonkeyPatch):
    class Dead(Memory):
        def put(self, process: int, text: str) -> None:
            raise ConnectionError

    one = One(1, Dead())
    monkeypatch.setattr(peers.distributed, "heartbeat_s", lambda: 0.2)
    one.peers.start()
    assert one.has_left.wait(10.0)
    one.peers.close(None)
    assert "process 0 of 2, which coordinates the others, has not answered" in str(
        one.peers.verdict
    )


def test_clean_up_that_hangs_is_cut_short(
    two: tuple[One, One], monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    monkeypatch.setattr(peers, "CLEAN_UP_S", 0.2)
    two[1].peers.fail(KeyError("lost"))
    assert two[1].has_left.wait(5.0)
    assert two[1].codes[0] == 1
    assert "KeyError: 'lost'" in capfd.readouterr().err
    two[1].peers.close(KeyError("lost"))


def test_single_process_has_no_peers():
    torn_down = []
    stand_in = peers_of(Run(), lambda: torn_down.append(1), None, 10)
    assert type(stand_in) is NoPeers
    before = threading.active_count()
    stand_in.start()
    stand_in.fail(KeyError("x"))
    stand_in.teardown()
    stand_in.close(KeyError("x"))
    assert (threading.active_count(), torn_down) == (before, [1])


class Where(Callback):
    """Asks another thread where this one is."""

    def __init__(self) -> None:
        self.places: list[Place] = []

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ask()

    def ask(self) -> None:
        other = threading.Thread(target=self.note, args=(threading.get_ident(),))
        other.start()
        other.join()

    def note(self, ident: int) -> None:
        self.places.append(place_of(ident))


def test_place_of_the_trainer_is_seen_from_another_thread():
    where, main = Where(), threading.get_ident()

    def slow() -> Iterator[Any]:
        for i, batch in enumerate(tiny.make_batches(4)):
            if i == 3:
                # By then the loop waits for this.
                time.sleep(0.3)
                where.note(main)
            yield batch

    options = {"max_epochs": 1, "steps_per_dispatch": 1}
    tiny.fit(slow(), module=tiny.Tiny(make=tiny.line), callbacks=[where], **options)
    assert {str(place) for place in where.places} == {"hook Where.on_train_batch_end", "data"}
    where.places.clear()
    where.ask()
    assert where.places == [Place("outside")]


ABORTS = """
import ctypes, os, threading, time
from jaxtrainer.aborts import DelayedAbort
delay = DelayedAbort().start()
assert delay.is_on and not delay.is_waiting()
threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
time.sleep(0.3)
assert delay.is_waiting()
if {leaves}:
    os._exit(75)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the delay is Linux only")
@pytest.mark.parametrize(("leaves", "code"), [(True, 75), (False, -signal.SIGABRT)])
def test_abort_leaves_time_to_say_why_and_comes_all_the_same(leaves: bool, code: int):
    program = [sys.executable, "-c", ABORTS.format(leaves=leaves)]
    assert subprocess.run(program, stderr=subprocess.DEVNULL, check=False).returncode == code


def test_abort_that_somebody_handles_is_left_alone():
    # `faulthandler` does, in a test.
    delay = DelayedAbort().start()
    assert not delay.is_on
    assert not delay.is_waiting()
