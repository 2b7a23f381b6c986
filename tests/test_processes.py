"""Several processes train as one: the same bits, one decision, one checkpoint, one error."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import saved
from tests.cluster import Cluster, Outcome, run_cluster

PROGRAM = "tests.process_program"


def run(*args: Any, shape: tuple[int, int] = (2, 2), **options: Any) -> Outcome:
    processes, devices = shape
    return run_cluster(PROGRAM, *args, processes=processes, devices=devices, **options)


def params_by_run(outcome: Outcome) -> list[str]:
    """The digest of the parameters after each training, on which the processes agree."""
    by_process = [
        [said["params"] for said in of_one if "params" in said] for of_one in outcome.said
    ]
    assert all(digests == by_process[0] for digests in by_process)
    return by_process[0]


def test_two_processes_train_to_the_bits_of_one(tmp_path: Path):
    two = run("save", tmp_path / "two", 1, shape=(2, 4))
    one = run("save", tmp_path / "one", 1, shape=(1, 8))
    assert two.same("devices") == one.same("devices") == 8
    assert params_by_run(two) == params_by_run(one)
    assert two.same("losses") == one.same("losses")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["step_8"]


@pytest.mark.slow
def test_sigterm_to_one_process_saves_one_step_and_ends_all(tmp_path: Path):
    with Cluster(PROGRAM, "interrupted", tmp_path, processes=2, devices=1) as cluster:
        cluster.wait_until(lambda c: "[1] PHASE training" in c.out)
        cluster.processes.started[1].send_signal(signal.SIGTERM)
        outcome = cluster.wait()
    assert outcome.codes == [143, 143]
    assert outcome.same("reason") == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == [f"step_{outcome.same('step')}"]
    assert outcome.err.count("SIGTERM: fit left in epoch") == 1


def test_process_with_another_seed_is_named_on_all():
    outcome = run("differing", "seed", shape=(2, 1), expect=1)
    for index in (0, 1):
        assert f"[{index}]   process 1: Trainer's seed is 1, on process 0 it is 0" in outcome.err
    assert outcome.same("compiled") == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
def test_processes_train_to_the_bits_of_one_by_every_loader(shape: tuple[int, int]):
    kinds = "arrays", "grain", "list"
    assert params_by_run(run("train", *kinds, shape=shape)) == params_by_run(
        run("train", *kinds, shape=(1, 8))
    )


@pytest.mark.slow
def test_resumed_by_other_numbers_of_processes_ends_at_the_same_bits(tmp_path: Path):
    run("save", tmp_path / "parts", 1, shape=(2, 4))
    run("save", tmp_path / "parts", 2, "last", shape=(1, 8))
    parts = run("save", tmp_path / "parts", 3, "last", shape=(4, 2))
    whole = run("save", tmp_path / "whole", 3, shape=(2, 4))
    assert params_by_run(parts) == params_by_run(whole)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "hybrid"])
def test_divided_state_is_saved_by_all_and_goes_on_anywhere(mesh: str, tmp_path: Path):
    run("share", tmp_path / "parts", 1, mesh, shape=(2, 4))
    run("share", tmp_path / "parts", 2, mesh, "last", shape=(1, 8))
    parts = run("share", tmp_path / "parts", 3, mesh, "last", shape=(4, 2))
    whole = run("share", tmp_path / "whole", 3, mesh, shape=(2, 4))
    assert any(parts.same("parts"))
    assert parts.same("resumed") == 8
    assert params_by_run(parts) == params_by_run(whole)
    assert parts.same("tested") == whole.same("tested")


@pytest.mark.slow
def test_callbacks_that_all_ask_to_stop_stop_where_one_process_would():
    outcome = run("stopped", "all")
    assert (outcome.same("step"), outcome.same("reason")) == (5, "enough")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_callback_of_one_process_stops_all_after_the_same_step(index: int):
    outcome = run("stopped", index)
    # One of them is at most a few steps ahead of the other.
    assert 5 <= outcome.same("step") < 16
    assert outcome.same("reason") == "enough"
    params_by_run(outcome)


@pytest.mark.slow
def test_clock_of_the_first_process_decides_for_all(tmp_path: Path):
    outcome = run("limited", tmp_path)
    assert outcome.same("reason") == "max_time"
    # The clock of process 1 is a million times too fast, and would have been over at once.
    assert outcome.same("step") > 10
    assert len(outcome.same("validated")) > 2
    assert len(outcome.same("saved")) > 2


@pytest.mark.slow
def test_measured_number_of_steps_is_that_of_the_first_process(tmp_path: Path):
    outcome = run("automatic", tmp_path)
    chosen = outcome.same("dispatch")
    assert re.search(r"a dispatch \((.* us a step fused|a step takes)", chosen)
    assert "as measured before" in run("automatic", tmp_path).same("dispatch")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("hidden", "Different.hidden is 9, on process 0 it is 8"),
        ("callbacks", "callbacks is Probe, Stops, Watch, on process 0 it is Probe, Watch"),
        ("step", "traced step is "),
    ],
)
def test_other_program_of_one_process_is_named_on_all(what: str, text: str):
    outcome = run("differing", what, shape=(2, 1), expect=1)
    for index in (0, 1):
        assert f"[{index}]   process 1: {text}" in outcome.err
    assert outcome.same("compiled") == 0


@pytest.mark.slow
def test_failed_save_of_the_first_process_is_raised_on_all(tmp_path: Path):
    outcome = run("unsaved", tmp_path, expect=1)
    for index in (0, 1):
        assert f"[{index}] jaxtrainer.errors.CheckpointError: no more room" in outcome.err


@pytest.mark.slow
def test_damaged_checkpoint_is_passed_over_by_all(tmp_path: Path):
    run("save", tmp_path, 2, "--keep-all")
    saved.damage(tmp_path / "step_16")
    outcome = run("save", tmp_path, 2, "last")
    assert outcome.same("resumed") == 8
    assert "damaged_step_16" in [path.name for path in tmp_path.iterdir()]


@pytest.mark.slow
def test_model_of_a_run_is_used_by_each_process_alone():
    assert run("use").same("logits") == [16, 3]
