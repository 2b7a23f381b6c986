"""A checkpoint of format 1, written on jax 0.10 and kept: this version reads it on any jax."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxtrainer.checkpoint import read_record, verify
from jaxtrainer.errors import CheckpointError
from jaxtrainer.manifest import seal
from jaxtrainer.record import FORMAT_VERSION
from tests import golden

FOLDER = Path(__file__).parent / "data" / "golden_1"
STEP = FOLDER / f"step_{golden.STEP}"


def test_golden_checkpoint_is_whole():
    verify(STEP)
    record = read_record(STEP)
    assert record["format_version"] == 1
    assert record["versions"]["jax"].startswith("0.10.")
    assert record["loop"]["global_step"] == golden.STEP


def test_golden_checkpoint_gives_what_it_gave_then():
    want = json.loads((FOLDER / "expected.json").read_text())
    got = golden.expected(STEP)
    # Another compiler orders the sums of 8 float32 anew: a few units of 6e-8 of values near 1.
    np.testing.assert_allclose(got["predictions"], want["predictions"], rtol=1e-5, atol=1e-6)
    # The same over five more steps of Adam, which divides by roots of small numbers.
    np.testing.assert_allclose(got["train/loss"], want["train/loss"], rtol=1e-4)


def test_newer_format_is_refused_clearly(tmp_path: Path):
    copy = Path(shutil.copytree(STEP, tmp_path / STEP.name))
    file = copy / "record" / "metadata"
    record = json.loads(file.read_text())
    del record["digest"]
    file.write_text(json.dumps(seal({**record, "format_version": FORMAT_VERSION + 1})))
    part = f"format {FORMAT_VERSION + 1}; this version of jaxtrainer reads up to {FORMAT_VERSION}"
    with pytest.raises(CheckpointError, match=f"{part}. Upgrade it") as caught:
        golden.trainer().fit(golden.Golden(), golden.loader(), ckpt_path=copy)
    assert type(caught.value) is CheckpointError
