"""Whatever happens to whichever file of a checkpoint: the same bits come back, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrainer import checkpoint as checkpoint_module
from jaxtrainer.checkpoint import read_record, restore_items, restore_state, verify
from jaxtrainer.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
)
from jaxtrainer.manifest import seal
from tests import saved, tiny

# Of a read that fails Orbax leaves others behind, which end after their event loop is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KERNEL = ".params['net']['kernel']"


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 3."""
    return saved.save(tmp_path_factory.mktemp("runs"), 3)


def outcome(path: Path) -> str:
    """What restoring does: `same` bits, or `refused`; anything else fails the test."""
    want = saved.make_state(3)
    try:
        restored = restore_state(path, saved.specs(want))
    except CheckpointError:
        return "refused"
    tiny.assert_same_bits(tiny.host_state(restored), tiny.host_state(want))
    return "same"


def outcome_of(step: Path, file: Path, damage: Callable[[Path], None], folder: Path) -> str:
    copy = saved.copy_of(step, folder)
    damage(copy / file)
    return outcome(copy)


def outcomes_of_flips(step: Path, files: Sequence[Path], seeds: range, folder: Path) -> list[str]:
    """What restoring does after the flip of one bit, for each file and seed."""
    return [
        outcome_of(step, file, partial(saved.flip, seed=seed), folder / f"{number}_{seed}")
        for number, file in enumerate(files)
        for seed in seeds
    ]


def test_checkpoint_that_is_whole_restores_every_bit(step: Path):
    assert outcome(step) == "same"
    verify(step)


@pytest.mark.parametrize("kind", saved.DAMAGE)
def test_damaged_file_is_never_restored_silently(step: Path, kind: str, tmp_path: Path):
    files, damage = saved.files_of(step), saved.DAMAGE[kind]
    found = {
        file: outcome_of(step, file, damage, tmp_path / f"{number}")
        for number, file in enumerate(files)
    }
    assert len(files) > 20
    assert found[Path("record/metadata")] == "refused"
    assert "refused" in {found[file] for file in saved.data_files(step)}


def test_flipped_bit_is_never_restored_silently(step: Path, tmp_path: Path):
    files = saved.files_of(step)
    found = outcomes_of_flips(step, files, range(3), tmp_path)
    assert {*found} == {"refused", "same"}


def test_flipped_bit_in_an_array_is_always_refused(step: Path, tmp_path: Path):
    files = saved.array_files(step)
    assert len(files) == 2
    assert outcomes_of_flips(step, files, range(18), tmp_path) == ["refused"] * 36


def test_flip_that_orbax_does_not_see_is_refused_by_name(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy, target = saved.copy_of(step, tmp_path), saved.specs(saved.make_state(3))
    (file,) = [f for f in saved.array_files(copy) if f.parts[0] == "params"]
    saved.flip(copy / file, 1)
    with monkeypatch.context() as without_digests:
        without_digests.setattr(checkpoint_module, "damaged", lambda *_: [])
        got = tiny.host_state(restore_state(copy, target))
    want = tiny.host_state(saved.make_state(3))
    assert np.count_nonzero(got[KERNEL] != want[KERNEL]) > 0
    part = "is damaged: the bytes of params/net/kernel are not those that were saved"
    with pytest.raises(CheckpointCorruptError, match=part):
        restore_state(copy, target)


def test_error_names_another_checkpoint(tmp_path: Path):
    last = saved.save(tmp_path, 3, 5)
    saved.damage(last)
    with pytest.raises(CheckpointCorruptError, match=r"There is another: `ckpt_path='.*/step_3'`"):
        restore_state(last, saved.specs(saved.make_state(5)))


def edit(step: Path, change: dict[str, Any], *, with_seal: bool) -> None:
    file = step / "record" / "metadata"
    record = {**json.loads(file.read_text()), **change}
    record.pop("digest")
    file.write_text(json.dumps(seal(record) if with_seal else record))


def test_record_that_was_edited_is_refused(step: Path, tmp_path: Path):
    copy = saved.copy_of(step, tmp_path)
    edit(copy, {"user": {"best": 1.0}}, with_seal=False)
    with pytest.raises(CheckpointCorruptError, match="its digest is not that of its content"):
        read_record(copy)


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 100_000, '{"a": NaN}', "\xff", ""])
def test_record_that_is_no_record_is_refused(step: Path, tmp_path: Path, text: str):
    copy = saved.copy_of(step, tmp_path)
    (copy / "record" / "metadata").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointCorruptError, match=r"reading the record of .*step_3 failed"):
        read_record(copy)


def test_newer_format_is_refused_as_that(step: Path, tmp_path: Path):
    copy = saved.copy_of(step, tmp_path)
    edit(copy, {"format_version": 99}, with_seal=True)
    with pytest.raises(CheckpointError, match="format 99; this version of jaxtrainer reads up to"):
        read_record(copy)


@pytest.mark.parametrize("dtype", [np.int32, np.float16, jax.numpy.bfloat16])
def test_other_dtype_is_refused_and_not_cast(step: Path, dtype: Any):
    target = saved.specs(saved.make_state(3))
    kernel = jax.ShapeDtypeStruct((64, 32), dtype, sharding=target.rng.sharding)
    wanted = {"params": {"net": {**target.params["net"], "kernel": kernel}}}
    part = rf"params/net/kernel: saved as float32\[64, 32\], here {np.dtype(dtype)}\[64, 32\]"
    with pytest.raises(CheckpointMismatchError, match=part):
        restore_items(step, wanted)


def test_every_difference_is_in_the_error(step: Path):
    one = jax.ShapeDtypeStruct((3,), np.float32)
    with pytest.raises(CheckpointMismatchError) as caught:
        restore_items(step, {"params": {"net": {"kernel": one, "bias": one}}})
    assert str(caught.value).splitlines()[1:] == [
        "  params/net/half: saved as bfloat16[32], not in this model",
        "  params/net/bias: float32[3] here, not saved",
        "  params/net/kernel: saved as float32[64, 32], here float32[3]",
    ]


def test_file_that_may_not_be_read_is_not_called_damaged(
    step: Path, monkeypatch: pytest.MonkeyPatch
):
    def read_bytes(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        read_record(step)
    assert type(caught.value) is CheckpointError
