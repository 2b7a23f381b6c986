"""Each signal in each phase: what is trained is saved, what is not is left, nothing hangs.

A program lingers in a phase, gets the signal there from outside, and says how the call ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer.checkpoint import read_record

ROOT = Path(__file__).parents[1]
LEFT = {signal.SIGINT: "KeyboardInterrupt", signal.SIGTERM: "SystemExit 143"}
DONE = {signal.SIGINT: "returned interrupted", signal.SIGTERM: "SystemExit 143"}

BEFORE = ("setup", "tuning", "initialisation", "compilation", "sanity")
"""Nothing is trained yet: the call is left at once, and there is nothing to save."""

TRAINED = {"training": 3, "validation": 4, "saving": 4, "data": 6}
"""It stops, and saves this step."""

EVALUATIONS = ("validate", "test", "predict")
PHASES = (*BEFORE, "restore", "start", *TRAINED, "writing", "ending", "hook", *EVALUATIONS)


def start(directory: Path, *phases: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.signal_program", str(directory), *phases],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def play(program: subprocess.Popen[str], number: int) -> Iterator[dict[str, Any]]:
    """Send the signal wherever the program lingers, and yield how its calls ended."""
    assert program.stdout is not None
    for line in program.stdout:
        word, _, rest = line.partition(" ")
        if word == "PHASE":
            program.send_signal(number)
        elif word == "ENDED":
            yield json.loads(rest)


def left(directory: Path, phase: str, number: int) -> tuple[int, str]:
    """Run one phase in a program of its own; return its exit code and what it told."""
    with start(directory, phase, LEAVE="1") as program:
        list(play(program, number))
        assert program.stderr is not None
        text = program.stderr.read()
    return program.returncode, text


@pytest.fixture(scope="module", params=[*LEFT], ids=lambda number: number.name)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The signal, how each phase ended, and where the checkpoints are."""
    directory = tmp_path_factory.mktemp(request.param.name)
    with start(directory, *PHASES) as program:
        ends = {end["phase"]: end for end in play(program, request.param)}
        assert program.stderr is not None
        text = program.stderr.read()
    assert program.returncode == 0, text
    return request.param, ends, directory


@pytest.mark.parametrize("phase", BEFORE)
def test_signal_before_the_first_step_leaves_at_once(row: Any, phase: str):
    number, ends, _ = row
    assert ends[phase]["how"].startswith(LEFT[number])
    assert ends[phase]["saved"] == []


def test_signal_while_restoring_leaves_at_once_and_keeps_the_checkpoint(row: Any):
    number, ends, _ = row
    assert ends["restore"]["how"].startswith(LEFT[number])
    assert ends["restore"]["saved"] == [2]


def test_signal_as_training_starts_ends_it_without_a_checkpoint(row: Any):
    number, ends, _ = row
    assert ends["start"]["how"] == DONE[number]
    assert ends["start"]["saved"] == []


@pytest.mark.parametrize("phase", TRAINED)
def test_signal_in_training_saves_what_was_trained(row: Any, phase: str):
    number, ends, directory = row
    step = TRAINED[phase]
    assert ends[phase]["how"] == DONE[number]
    assert ends[phase]["saved"] == [step]
    record = read_record(directory / phase / f"step_{step}")
    assert record["loop"]["global_step"] == step


def test_signal_while_a_save_is_written_saves_after_it(row: Any):
    number, ends, directory = row
    assert ends["writing"]["how"] == DONE[number]
    (step,) = ends["writing"]["saved"]
    assert step >= 4
    assert read_record(directory / "writing" / f"step_{step}")["loop"]["global_step"] == step


def test_signal_after_the_last_step_changes_no_result(row: Any):
    number, ends, _ = row
    how = {signal.SIGINT: "returned max_epochs", signal.SIGTERM: "SystemExit 143"}
    assert (ends["ending"]["how"], ends["ending"]["saved"]) == (how[number], [8])


def test_second_signal_ends_a_hook_that_blocks(row: Any):
    number, ends, _ = row
    assert ends["hook"]["how"].startswith(LEFT[number])
    assert ends["hook"]["teardowns"] == 1


@pytest.mark.parametrize("phase", EVALUATIONS)
def test_signal_ends_an_evaluation_after_its_clean_up(row: Any, phase: str):
    number, ends, _ = row
    assert ends[phase]["how"].startswith(LEFT[number])
    assert ends[phase]["teardowns"] == 1


def test_signals_are_as_before_after_each_call(row: Any):
    _, ends, _ = row
    assert [*ends] == [*PHASES]
    assert all(end["is_restored"] for end in ends.values())
    assert not any(end["children"] for end in ends.values())
    # A thread that is stuck in a loader cannot be ended, and keeps nobody waiting.
    stuck = "jaxtrainer-train-feed"
    assert not [name for end in ends.values() for name in end["threads"] if name != stuck]


def test_sigterm_ends_the_program_and_tells_what_is_saved(tmp_path: Path):
    code, text = left(tmp_path, "training", signal.SIGTERM)
    assert code == 143
    assert "SIGTERM received: stopping after this step" in text
    assert f"at step 3; saved: {tmp_path / 'training' / 'step_3'}; go on with" in text


def test_sigterm_ends_a_program_in_compiled_code(tmp_path: Path):
    code, text = left(tmp_path, "compiler", signal.SIGTERM)
    assert code == 143
    assert "SIGTERM: the process does not come to an end" in text


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_second_signal_does_not_wait_for_a_save(tmp_path: Path, number: signal.Signals):
    code, text = left(tmp_path, "stuck_save", number)
    assert code == 128 + number
    assert f"{number.name} received again: leaving now" in text
    assert read_record(tmp_path / "stuck_save" / "step_2")["loop"]["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [*LEFT])
def test_program_of_its_own_ends_by_the_signal(tmp_path: Path, phase: str, number: signal.Signals):
    code, text = left(tmp_path, phase, number)
    returns = number == signal.SIGINT and phase in {*TRAINED, "start", "writing", "ending"}
    expected = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[number]
    assert code == (0 if returns else expected), text
