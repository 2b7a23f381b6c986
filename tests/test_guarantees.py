"""The table of guarantees: every fault has a row, and every test that a row names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.places import missing_tests

TABLE = Path(__file__).parents[1] / "docs" / "guarantees.md"
NUM_FAULTS = 37


def rows() -> dict[int, list[str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line]
    return {int(row[0]): row[1:] for row in cells if row[0].isdigit()}


def places(cell: str) -> list[str]:
    return re.findall(r"`(test_\w+\.py::test_\w+)`", cell)


def test_every_fault_has_a_row():
    assert [*rows()] == [*range(1, NUM_FAULTS + 1)]
    assert {len(row) for row in rows().values()} == {3}


@pytest.mark.parametrize("number", range(1, NUM_FAULTS + 1))
def test_row_names_tests_that_exist_or_says_not_yet(number: int):
    _, _, shown = rows()[number]
    named = places(shown)
    assert named or "not yet" in shown
    assert missing_tests(named) == []


def test_test_that_does_not_exist_is_found():
    here = "test_guarantees.py::test_every_fault_has_a_row"
    wrong = ["test_guarantees.py::test_nothing", "test_none.py::test_x"]
    assert missing_tests([here, *wrong]) == wrong
