"""Runs killed at random moments end on the bits of one that nobody disturbed; see `chaos.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chaos


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module", params=chaos.MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def digest(model: str, root: Path) -> str:
    return chaos.undisturbed(model, root / model / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_run_ends_on_the_same_bits(model: str, seed: int, digest: str, root: Path):
    outcome = chaos.disturbed(model, seed, root / model / f"seed_{seed}")
    print(outcome)
    assert outcome.digest == digest
    assert outcome.kills


@pytest.mark.slow
def test_run_killed_in_training_ends_on_the_same_bits(tmp_path: Path):
    digest = chaos.undisturbed("norm", tmp_path / "undisturbed")
    outcome = chaos.disturbed("norm", 0, tmp_path / "killed", kills=1)
    assert outcome.digest == digest
    assert outcome.kills == ["training"]
