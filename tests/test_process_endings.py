"""Two processes under the launcher that a signal or a NaN ends: one step, one checkpoint, one word.

All as a user sees it: the command line, its exit code, and what is on the terminal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer.callbacks import Checkpoint
from tests import divided
from tests.cluster import ROOT, run_cluster

pytestmark = pytest.mark.slow

PROGRAM = "tests.endings_program"
STEPS = 60


class Launched:
    """`jaxtrainer launch`, in a process group of its own as a shell starts it.

    Attributes:
        code: Exit code.
        out: What the terminal has got.
        err: The same of stderr.
        said: What each process has said.
    """

    def __init__(self, logs: Path, *args: Any, processes: int = 2) -> None:
        self._logs = logs
        options = ["--processes", processes, "--devices-per-process", 2, "--log-dir", logs]
        command = ["jaxtrainer.cli", "launch", *options, "-m", PROGRAM, *args]
        cleared = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            env={**cleared, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: Any) -> None:
        # It ends its processes with it.
        self.process.kill()
        self.process.wait()

    def until(self, line: str) -> None:
        """Read until process 0 has said that."""
        assert self.process.stdout is not None
        assert any(line in each for each in iter(self.process.stdout.readline, "")), self.end().err

    def end(self) -> Launched:
        self.out, self.err = self.process.communicate(timeout=300)
        self.code = self.process.returncode
        others = [path.read_text() for path in sorted(self._logs.glob("process_*.log"))]
        self.said = [list(said(text)) for text in (self.out, *others)]
        return self

    def same(self, key: str) -> Any:
        values = [[one[key] for one in each if key in one][-1] for each in self.said]
        assert len(values) == 2, self.err
        assert values[0] == values[1], values
        return values[0]


def said(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        _, found, value = line.partition("SAID ")
        if found:
            yield json.loads(value)


def to_launcher(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)


def to_group(process: subprocess.Popen[str], number: int) -> None:
    """As a terminal does with Ctrl-C."""
    os.killpg(process.pid, number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the weights at the end of a run that nothing has ended."""
    where = tmp_path_factory.mktemp("whole")
    return run_cluster(PROGRAM, "goes_on", where / "run", STEPS, devices=2).same("params")


@pytest.mark.parametrize("send", [to_launcher, to_group])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_one_step_and_the_run_goes_on(
    send: Callable[..., None], number: signal.Signals, tmp_path: Path, undisturbed: str
):
    run = tmp_path / "run"
    with Launched(tmp_path / "logs", "goes_on", run, STEPS) as launched:
        launched.until("PHASE training")
        send(launched.process, number)
        ended = launched.end()
    # As one process ends: `fit` returns after Ctrl-C, and SIGTERM leaves.
    assert ended.code == (0 if number == signal.SIGINT else 143), ended.err
    assert (ended.same("reason"), 4 <= ended.same("step") < STEPS) == ("interrupted", True)
    assert [path.name for path in run.iterdir()] == [f"step_{ended.same('step')}"]
    told = f"jaxtrainer: {number.name} received: stopping after this step; again to leave at once"
    assert ended.err.count(told) == ended.err.count("received") == 1
    assert "Traceback" not in ended.err
    again = run_cluster(PROGRAM, "goes_on", run, STEPS, devices=2)
    assert again.same("params") == undisturbed


def test_signal_before_the_first_step_has_one_traceback(tmp_path: Path):
    with Launched(tmp_path / "logs", "waits", tmp_path / "run") as launched:
        launched.until("PHASE training")
        time.sleep(1.0)
        to_group(launched.process, signal.SIGINT)
        ended = launched.end()
    assert ended.code == 130, ended.err
    assert ended.err.count("Traceback") == 1, ended.err
    assert "KeyboardInterrupt: SIGINT before the first step" in ended.err
    assert ended.err.rstrip().endswith("jaxtrainer launch: ended by SIGINT")


@pytest.mark.parametrize("kind", ["raise", "parts"])
def test_batch_that_is_not_finite_ends_all_with_one_report(kind: str, tmp_path: Path):
    with Launched(tmp_path / "logs", "not_finite", tmp_path, kind) as launched:
        ended = launched.end()
    assert ended.code == 1, ended.err
    assert "batch 5 in epoch 0 (optimiser step 6) are not finite" in ended.same("told")
    assert ended.same("step") in (6, 7)
    [report] = (tmp_path / "report").iterdir()
    assert report.name == "epoch_0_batch_5"
    assert f"to run it once more: python {report / 'run.py'}" in ended.same("notes")
    [found] = [note for note in ended.same("notes") if note.startswith("loss is not finite")]
    assert "first NaN from `dot_general`" in found
    assert "fed by batch/x, which is not finite" in found
    assert ended.err.count("Traceback") == 1, ended.err
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, report / "run.py"]
    replayed = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "loss []: 1 not finite" in replayed.stdout, replayed.stderr


def test_run_that_was_not_finite_goes_on_from_before_it(tmp_path: Path):
    where = tmp_path / "broken"
    run_cluster(PROGRAM, "not_finite", where, "raise", devices=2, expect=1)
    went_on = run_cluster(PROGRAM, "not_finite", where, "raise", "good", devices=2)
    whole = run_cluster(PROGRAM, "not_finite", tmp_path / "whole", "raise", "good", devices=2)
    assert went_on.same("params") == whole.same("params")


def test_all_go_back_and_leave_the_batch_out_as_one_process_does(tmp_path: Path):
    shape = {"processes": 2, "devices": 2}, {"processes": 1, "devices": 4}
    two, one = (
        run_cluster(PROGRAM, "not_finite", tmp_path / str(i), "restore", **options)
        for i, options in enumerate(shape)
    )
    assert two.same("params") == one.same("params")
    assert two.same("step") == one.same("step") == 16


def test_loss_that_is_no_number_stops_all_at_one_step(tmp_path: Path):
    outcome = run_cluster(PROGRAM, "not_finite", tmp_path, "stop", devices=2)
    assert outcome.same("reason").startswith("terminate_on_nan: train/loss is nan at step 6")
    assert 6 <= outcome.same("step") <= 8
    assert len([*(tmp_path / "run").iterdir()]) == 1


def test_weights_of_another_run_are_read_in_parts_by_all(tmp_path: Path):
    divided.train("mlp", "one", callbacks=[Checkpoint(tmp_path)])
    two = run_cluster(PROGRAM, "loads", tmp_path, processes=2, devices=4)
    one = run_cluster(PROGRAM, "loads", tmp_path, processes=1, devices=8)
    assert two.same("parts") == one.same("parts") == 8
    assert two.same("params") == one.same("params")
