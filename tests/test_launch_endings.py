"""What the launcher returns and says when its processes have ended, for each way of it."""

from __future__ import annotations

import collections
import io
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from jaxtrainer.launch import Processes


def ended(first: list[int | None], last: list[int], number: int | None = None) -> tuple[int, str]:
    """Exit code and stderr of a launcher that sees these codes, and then those."""
    err = io.StringIO()
    processes = Processes(["x"], num=len(last), streams=(io.StringIO(), err))
    codes = list(first)
    processes.started = [of(codes, i) for i in range(len(last))]
    processes._tails = {i: collections.deque([f"says {i}\n"]) for i in range(len(last))}
    if number is not None:
        processes.forward(number)
    assert processes.poll() is None
    codes[:] = last
    code = processes.poll()
    assert code is not None
    return code, err.getvalue()


def of(codes: list[int | None], index: int) -> Any:
    class Process(SimpleNamespace):
        returncode = property(lambda self: codes[index])

        def poll(self) -> int | None:
            return codes[index]

        def send_signal(self, number: int) -> None: ...

    return Process()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("others", [0, 75, 1000])
def test_signal_that_is_passed_on_is_told_once(number: signal.Signals, others: int):
    by_signal = -number if number == signal.SIGINT else 128 + number
    last = [by_signal, by_signal if others == 1000 else others]
    code, text = ended([None, last[1]], last, number)
    assert code == 128 + number
    assert text == f"jaxtrainer launch: ended by {number.name}\n"


def test_signal_after_which_all_end_well_is_not_told():
    assert ended([None, 0], [0, 0], signal.SIGINT) == (0, "")


def test_failure_after_a_signal_is_told():
    code, text = ended([None, 1], [143, 1], signal.SIGTERM)
    assert code == 1
    assert text.startswith("[1] says 1\njaxtrainer launch: process 1 ended first, with exit code 1")


@pytest.mark.parametrize(("first", "shown"), [(1, False), (75, True), (-9, True)])
def test_exception_that_all_raise_is_shown_of_process_0_alone(first: int, shown: bool):
    code, text = ended([None, 1], [first, 1])
    assert code == 1
    assert ("says 1" in text) == shown
    assert text.endswith("jaxtrainer launch: process 1 ended first, with exit code 1\n")
