"""One of two processes fails, dies, hangs or is cut off: both leave, with a code and a reason.

The bounds on the time are those of the heartbeat, 30 s, and of the limits that a test sets.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from jaxtrainer.rundir import saved_steps
from tests import network
from tests.cluster import ROOT, Cluster, Outcome, run_cluster

PROGRAM = "tests.peers_program"
HEARTBEAT_S = 30.0
IN_TRAINING = '"phase": "train"'


def play(*args: object, devices: int = 1) -> Outcome:
    return run_cluster(PROGRAM, *args, devices=devices, expect=None)


def disturb(number: int, victim: int, devices: int = 1) -> tuple[int, str, float]:
    """Send a signal to a process that trains; code and stderr of the other one, and its time."""
    with Cluster(PROGRAM, "train", devices=devices) as cluster:
        cluster.wait_until(lambda c: c.out.count(IN_TRAINING) == 2)
        began, processes = time.monotonic(), cluster.processes.started
        processes[victim].send_signal(number)
        code = processes[1 - victim].wait(3 * HEARTBEAT_S)
        spent_s = time.monotonic() - began
        # One that is stopped does not end by itself.
        processes[victim].kill()
        return code, cluster.wait().err, spent_s


def assert_reason(text: str, who: int, *parts: str) -> None:
    """Process `who` must say why it leaves, in one line that has the parts."""
    head = f"[{who}] jaxtrainer: process {who} of 2 leaves with code 75: "
    lines = [line for line in text.splitlines() if line.startswith(head)]
    assert len(lines) == 1, text
    assert all(part in lines[0] for part in parts), lines


def test_exception_of_one_process_ends_the_other_with_its_reason():
    outcome = play("raises", 1)
    assert outcome.codes == [75, 1], outcome.err
    why = "process 1 of 2 failed in step 8 of train: ValueError: this sample is cursed"
    assert_reason(outcome.err, 0, why)
    assert "[1] ValueError: this sample is cursed" in outcome.err
    torn_down = [sum("torn_down" in one for one in said) for said in outcome.said]
    assert torn_down == [1, 1]


@pytest.mark.slow
def test_exception_of_the_coordinator_ends_the_other_with_its_reason():
    outcome = play("raises", 0)
    assert outcome.codes == [1, 75], outcome.err
    assert_reason(outcome.err, 1, "process 0 of 2 failed in step 8 of train: ValueError: this")


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_program_that_catches_the_exception_ends_as_it_likes(culprit: int):
    outcome = play("caught", culprit)
    assert outcome.codes[culprit] == 0, outcome.err
    assert outcome.codes[1 - culprit] == 75
    assert outcome.said[culprit][-1] == {"caught": "this sample is cursed"}


@pytest.mark.slow
def test_exception_that_all_raise_is_raised_in_all_and_the_next_call_runs():
    outcome = play("all_raise")
    assert outcome.codes == [0, 0], outcome.err
    assert outcome.same("caught") == "this sample is cursed"
    assert outcome.same("steps") == 16


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_exception_between_two_calls_ends_the_other_process(culprit: int):
    outcome = play("after", culprit)
    assert outcome.codes[culprit] == 1, outcome.err
    assert outcome.codes[1 - culprit] == 75
    why = f"process {culprit} of 2 has ended: ValueError: this sample is cursed"
    assert_reason(outcome.err, 1 - culprit, why)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_process_that_dies_or_stops_is_left_within_the_heartbeat(
    number: signal.Signals, victim: int, devices: int
):
    code, text, spent_s = disturb(number, victim, devices)
    assert code == 75, text
    assert_reason(text, 1 - victim, f"process {victim} of 2")
    # What JAX needs beside, and the time to say why.
    assert spent_s < HEARTBEAT_S + 15.0


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_process_that_hangs_in_a_hook_is_named(culprit: int):
    outcome = play("hook", culprit)
    assert outcome.codes == [75, 75], outcome.err
    for who in (0, 1):
        where = "has been in phase hook (At.on_train_batch_end) of step 8 for"
        assert_reason(outcome.err, who, f"process {culprit} of 2 {where}")


@pytest.mark.slow
def test_process_whose_loader_hangs_is_named():
    outcome = play("loader", 1)
    assert outcome.codes == [75, 1], outcome.err
    assert_reason(outcome.err, 0, "process 1 of 2 failed in step", "DataTimeoutError", "data phase")


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_slow_process_is_named_once(culprit: int):
    outcome = run_cluster(PROGRAM, "slow", culprit, devices=1)
    notices = [said[-1]["notices"] for said in outcome.said]
    assert notices[1] == []
    (told,) = notices[0]
    assert told.startswith(f"process {culprit} of 2 holds the others up: a batch takes it ")


@pytest.mark.slow
@pytest.mark.skipif(not network.is_possible(), reason="takes root and network namespaces")
@pytest.mark.parametrize("cut_s", [5.0, 2 * HEARTBEAT_S], ids=["blip", "partition"])
def test_network_may_be_away_for_less_than_the_heartbeat(cut_s: float, tmp_path: Path):
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "HOME": str(tmp_path)}
    with network.Hosts() as hosts:
        processes = hosts.start(PROGRAM, "train", "12", **env)
        for process in processes:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            assert any(IN_TRAINING in line for line in lines), process.communicate()
        hosts.cut()
        time.sleep(cut_s)
        hosts.join()
        ends = [process.communicate(timeout=120.0)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == ([0, 0] if cut_s < HEARTBEAT_S else [75, 75]), "\n".join(ends)


def saved(directory: Path) -> list[int]:
    return saved_steps(directory) if directory.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_run_that_is_started_again_ends_on_the_same_bits(tmp_path: Path, victim: int):
    undisturbed = run_cluster(PROGRAM, "goes_on", tmp_path / "a", 60, devices=1).same("params")
    directory, rng = tmp_path / "b", random.Random(victim)
    for _ in range(2):
        with Cluster(PROGRAM, "goes_on", directory, 60, devices=1) as cluster:
            least = max(saved(directory), default=0)
            cluster.wait_until(lambda _, n=least: max(saved(directory), default=0) > n)
            time.sleep(rng.random() * 0.5)
            cluster.processes.started[victim].kill()
            assert {*cluster.wait().codes} <= {75, -signal.SIGKILL}
    last = run_cluster(PROGRAM, "goes_on", directory, 60, devices=1)
    assert last.same("params") == undisturbed
