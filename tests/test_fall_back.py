"""A damaged last checkpoint: `fit` goes on from the one before and says so, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.errors import CheckpointCorruptError, CheckpointError, CheckpointWarning
from jaxtrainer.rundir import saved_steps
from tests import saved, tiny
from tests.bad_input import module_with, refused

pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    # Of a read that fails Orbax leaves others behind, which end after their event loop is closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EPOCH = 3


def fit(folder: Path, epochs: int, **options: Any) -> Any:
    policy = options.pop("policy", {})
    saver = Checkpoint(folder, save_top_k=-1, **policy)
    loader = tiny.make_batches(EPOCH)
    return tiny.fit(loader, module=module_with(), callbacks=[saver], max_epochs=epochs, **options)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run directory with steps 3, 6 and 9, and the state after 9."""
    folder = tmp_path_factory.mktemp("runs") / "line"
    return folder, fit(folder, 3)


@pytest.fixture
def folder(three: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that directory."""
    return Path(shutil.copytree(three[0], tmp_path / "line"))


def empty_record(step: Path) -> None:
    (step / "record" / "metadata").write_text("")


def remove_arrays(step: Path) -> None:
    shutil.rmtree(step / "params")


@pytest.mark.parametrize("damage", [saved.damage, empty_record, remove_arrays])
def test_fit_goes_on_from_the_checkpoint_before(folder: Path, three: Any, damage: Any):
    damage(folder / "step_9")
    with pytest.warns(CheckpointWarning, match="step_9.*Going on from step 6"):
        result, state = fit(folder, 3, ckpt_path="last")
    tiny.assert_same_bits(state, three[1][1])
    assert result.num_steps == 9
    assert saved_steps(folder) == [3, 6, 9]
    assert (folder / "damaged_step_9").is_dir()
    saved_again, _ = fit(folder, 3, ckpt_path="last")
    assert saved_again.last_checkpoint == str(folder / "step_9")


def test_fit_goes_back_as_far_as_it_must(folder: Path, three: Any):
    for step in (6, 9):
        saved.damage(folder / f"step_{step}")
    with pytest.warns(CheckpointWarning) as caught:
        _, state = fit(folder, 3, ckpt_path="last")
    tiny.assert_same_bits(state, three[1][1])
    texts = [str(w.message) for w in caught]
    assert [f"step_{step}" in text for step, text in zip((9, 6), texts, strict=True)] == [True] * 2


def test_fit_with_nothing_to_fall_back_on_is_refused(folder: Path):
    for step in (3, 6, 9):
        saved.damage(folder / f"step_{step}")
    callbacks = [Checkpoint(folder)]
    refused(CheckpointCorruptError, "step_9", "step_3", callbacks=callbacks, ckpt_path="last")
    assert saved_steps(folder) == [3, 6, 9]


def test_policy_may_be_to_raise(folder: Path):
    saved.damage(folder / "step_9")
    callbacks = [Checkpoint(folder, on_corrupt="raise")]
    parts = ("step_9", "There is another: `ckpt_path=", "step_6'`")
    compiled = ["train step"]
    refused(
        CheckpointCorruptError, *parts, callbacks=callbacks, ckpt_path="last", compiled=compiled
    )


@pytest.mark.parametrize("name", ["", "step_9"])
def test_path_that_was_given_is_not_another(folder: Path, name: str):
    saved.damage(folder / "step_9")
    options: Any = {"ckpt_path": folder / name, "compiled": ["train step"]}
    refused(CheckpointCorruptError, "step_9", callbacks=[Checkpoint(folder)], **options)


@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_damaged_checkpoint_is_not_evaluated(folder: Path, stage: str, which: str):
    saved.damage(folder / "step_9")
    options: Any = {"stage": stage, "ckpt_path": which}
    refused(CheckpointCorruptError, "step_9", callbacks=[Checkpoint(folder)], **options)


def test_newer_format_is_not_fallen_back_from(folder: Path):
    file = folder / "step_9" / "record" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    callbacks = [Checkpoint(folder)]
    refused(CheckpointError, "checkpoint format 99", callbacks=callbacks, ckpt_path="last")


def test_checkpoint_that_is_whole_is_gone_on_from_without_a_word(folder: Path, three: Any):
    result, _ = fit(folder, 3, ckpt_path="last")
    assert result.num_steps == 9
    assert saved_steps(folder) == [3, 6, 9]
