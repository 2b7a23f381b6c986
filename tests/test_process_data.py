"""Data in several processes: the same samples in the same batch, none twice and none left out.

The programs of `data_program` run in two processes of four devices here, in four of two and one of
eight where it says so. Orders are compared with NumPy's exactly, being sums of integers.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrainer.callbacks.prediction_writer import read_predictions
from tests.cluster import Outcome, run_cluster
from tests.data_program import ROWS, SIZE, arrays, loader

pytestmark = pytest.mark.slow
PROGRAM = "tests.data_program"
KINDS = ("resident", "gathered", "list", "records", "iter", "stream", "own")
RAGGED = (1, 9)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """What two processes say of everything that fits into one start."""
    folder = tmp_path_factory.mktemp("two")
    calls = [
        "trained resident records own stream shuffled",
        f"evaluated records {RAGGED[0]} {RAGGED[1]}",
        "several",
        "seen",
        "looked",
        f"written {folder / 'predictions'}",
        f"prepared {folder / 'prepared'}",
        "refused",
    ]
    return run_cluster(PROGRAM, ",".join(calls)), folder


def expected_order(order: Any) -> list[float]:
    places = np.arange(1, SIZE + 1)
    return [float((ids * places).sum()) for ids in np.asarray(order).reshape(-1, SIZE)]


def shuffled_order() -> list[float]:
    batches = loader("shuffled")
    return expected_order([batches[i]["id"] for i in range(2 * len(batches))])


def assert_exact(outcome: Outcome, ragged: int) -> None:
    rows = 2 * SIZE + ragged
    metrics = outcome.same(f"metrics_{ragged}")
    least = (arrays(rows)["x"] ** 2).sum(1).min()
    # The mean of a batch is rounded to float32; a sample too many or too few is 1 in 50.
    assert metrics["val/mean_id"] == pytest.approx(np.arange(rows).mean(), rel=1e-6)
    assert metrics["val/least"] == pytest.approx(least, rel=1e-6)
    predicted = outcome.same(f"rows_{ragged}")
    assert [len(part) for part in predicted] == [SIZE, SIZE, ragged]
    assert [*itertools.chain(*predicted)] == [*range(rows)]


@pytest.mark.parametrize("kind", ["resident", "records", "own", "stream"])
def test_order_of_samples_is_that_of_one_process(two: Any, kind: str):
    assert two[0].same(kind) == expected_order([np.arange(ROWS)] * 2)


def test_shuffled_order_is_that_of_one_process(two: Any):
    assert two[0].same("shuffled") == shuffled_order()


@pytest.mark.parametrize("ragged", RAGGED)
def test_evaluation_and_predictions_are_exact(two: Any, ragged: int):
    assert_exact(two[0], ragged)


def test_several_loaders_are_evaluated_as_far_as_their_limit(two: Any):
    metrics = two[0].same("several")
    assert metrics["val/short/mean_id"] == np.arange(SIZE + 3).mean()
    assert metrics["val/long/mean_id"] == np.arange(2 * SIZE).mean()


def test_process_reads_no_records_of_others(two: Any):
    first, second = two[0].last("read")
    # The first record of all is what the processes compare.
    assert set(first) & set(second) <= {0}
    assert sorted({*first, *second}) == [*range(ROWS)]


@pytest.mark.parametrize("kind", ["resident", "list"])
def test_callback_sees_the_rows_of_its_process(two: Any, kind: str):
    seen = [np.concatenate(parts) for parts in zip(*two[0].last(f"{kind}_rows"), strict=True)]
    want = [*np.arange(ROWS).reshape(-1, SIZE), np.arange(SIZE), np.arange(SIZE, SIZE + 5)]
    assert [part.tolist() for part in seen] == [part.tolist() for part in want]
    assert len(two[0].same(f"{kind}_losses")) == ROWS // SIZE


def test_predictions_are_written_once_and_in_order(two: Any):
    outcome, folder = two
    written = [batch["id"] for batch in read_predictions(folder / "predictions")]
    assert [len(part) for part in written] == [SIZE, SIZE, 5]
    np.testing.assert_array_equal(np.concatenate(written), np.arange(2 * SIZE + 5))
    assert outcome.same("returned") is None
    refusal = outcome.same("again")
    assert refusal.startswith("RunDirError: ")
    assert "has predictions already" in refusal


def test_data_is_prepared_once_on_a_host_before_any_setup(two: Any):
    assert two[0].same("prepared") == ["0"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("other_seed", "gives process 1 another first batch than process 0"),
        ("own_unmarked", "say so: `data.process_local(loader)`"),
        ("shorter_list", "batches an epoch: 4 in process 0, 3 in process 1"),
        ("shorter_stream", "batches of the next chunk: 3, there 4"),
        ("later_change", "does not give all processes the same batches in epoch 0"),
        ("marked_twice", "processes 0 and 1 read the same rows. Divide what each reads"),
        ("no_device", "has no device of process 1, and each process must have one in it"),
        ("one_is_empty", "the train loader has no batches"),
        ("one_fails", "train batch 2 of epoch 0 has another structure"),
    ],
)
def test_loader_that_differs_between_processes_is_refused(two: Any, name: str, part: str):
    said = two[0].last(name)
    assert all(part in text for text in said), said


@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 4), (4, 2)])
def test_every_loader_on_every_division_is_exact(processes: int, devices: int):
    division: dict[str, Any] = {"processes": processes, "devices": devices, "timeout_s": 600}
    outcome = run_cluster(PROGRAM, f"trained {' '.join(KINDS)} shuffled", **division)
    for kind in KINDS:
        assert outcome.same(kind) == expected_order([np.arange(ROWS)] * 2), kind
    assert outcome.same("shuffled") == shuffled_order()
    for kind in KINDS[:-1]:
        outcome = run_cluster(PROGRAM, f"evaluated {kind} 1 5 8 9 13 15", **division)
        for ragged in (1, 5, 8, 9, 13, 15):
            assert_exact(outcome, ragged)


@pytest.mark.parametrize("kind", ["shuffled", "records", "iter", "stream", "own"])
def test_resume_in_other_processes_goes_on_with_the_same_samples(kind: str, tmp_path: Path):
    order: list[float] = []
    # Within an epoch, and over its end.
    for processes, devices, until in [(2, 4, 3), (1, 8, 6), (4, 2, 7), (2, 4, 8)]:
        call = f"resumed {tmp_path / 'run'} {kind} {until}"
        outcome = run_cluster(PROGRAM, call, processes=processes, devices=devices, timeout_s=600)
        order += outcome.same("order")
    plain = expected_order([np.arange(ROWS)] * 2)
    assert order == (shuffled_order() if kind == "shuffled" else plain)
