"""What is deleted in a run directory, what is not, and in which order it reaches the disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.errors import ConfigError, RunDirError
from jaxtrainer.rundir import check_space, remove_step, saved_steps
from jaxtrainer.store import CheckpointStore
from tests import saved, tiny
from tests.bad_input import module_with, refused

LEFTOVERS = ("step_7.orbax-checkpoint-tmp", ".deleted_step_3", ".deleted_step_3-2")
MINE = ("notes", "step_old", "step_1_backup", "damaged_step_4", "steps", "step_007")


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path: Path):
    make(tmp_path, *LEFTOVERS, *MINE)
    (tmp_path / ".write_probe_1").write_text("x")
    CheckpointStore(tmp_path).close()
    assert names_in(tmp_path) == {*MINE}


def test_leftover_that_is_a_link_is_not_followed_or_removed(tmp_path: Path):
    make(tmp_path, "data", "run")
    link = tmp_path / "run" / "step_7.orbax-checkpoint-tmp"
    link.symlink_to(tmp_path / "data")
    CheckpointStore(tmp_path / "run").close()
    assert link.is_symlink()
    assert names_in(tmp_path / "data") == {"file"}


def test_step_that_is_a_link_is_not_deleted(tmp_path: Path):
    make(tmp_path, "data", "run")
    (tmp_path / "run" / "step_7").symlink_to(tmp_path / "data")
    (line,) = remove_step(tmp_path / "run", 7)
    assert line.endswith("run/step_7 was not deleted: it is a symbolic link")
    assert names_in(tmp_path / "data") == {"file"}


def test_step_that_is_gone_is_deleted_without_a_word(tmp_path: Path):
    assert remove_step(tmp_path, 7) == []


def test_deletion_that_is_cut_short_leaves_no_half_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(tmp_path, "step_7", "step_8")

    def rmtree(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        remove_step(tmp_path, 7)
    assert saved_steps(tmp_path) == [8]
    assert names_in(tmp_path) == {".deleted_step_7", "step_8"}


@pytest.mark.parametrize("where", ["rename", "rmtree"])
def test_deletion_that_fails_is_a_notice_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    def fail(path: Any, *_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path if where == "rename" else shutil, where, fail)
    module = tiny.Tiny(tiny.line)
    loader = tiny.make_batches(2)
    tiny.fit(loader, module=module, callbacks=[Checkpoint(tmp_path)], max_epochs=3)
    assert module.run is not None
    lines = [line for line in module.run.notices if "could not be deleted" in line]
    assert len(lines) == 2
    assert "step_2" in lines[0]
    assert 6 in saved_steps(tmp_path)


def test_retention_deletes_what_the_run_has_written_only(tmp_path: Path):
    first = Checkpoint(tmp_path)
    module, loader = tiny.Tiny(tiny.line), tiny.make_batches(2)
    tiny.fit(loader, module=module, callbacks=[first], max_epochs=2)
    shutil.copytree(tmp_path / "step_4", tmp_path / "step_1")
    shutil.copytree(tmp_path / "step_4", tmp_path / "step_3")
    again = [Checkpoint(tmp_path)]
    tiny.fit(loader, module=tiny.Tiny(tiny.line), callbacks=again, ckpt_path="last", max_epochs=3)
    assert saved_steps(tmp_path) == [1, 3, 6]


class Disk:
    """Notes what is made sure to be on the disk, and what is renamed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        fsync, rename = os.fsync, Path.rename

        def noting_fsync(descriptor: int) -> None:
            self.calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def noting_rename(path: Path, target: Path) -> Path:
            self.calls.append(("rename", str(path)))
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", noting_fsync)
        monkeypatch.setattr(Path, "rename", noting_rename)


def test_durable_step_is_on_the_disk_before_an_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = Disk(monkeypatch)
    store = CheckpointStore(tmp_path, durable=True)
    store.save(1, saved.snapshot(1))
    store.save(2, saved.snapshot(2), replaces=[1])
    store.close()
    step = store.path(2)
    gone = disk.calls.index(("rename", str(store.path(1))))
    synced = [path for call, path in disk.calls[:gone] if call == "fsync"]
    files = [str(step / file) for file in saved.files_of(step)]
    folders = [str(path) for path in (step, *step.rglob("*")) if path.is_dir()]
    assert {*files, *folders} <= {*synced}
    # The directory that has the step's name comes last: then all it stands for is there.
    assert synced[-1] == str(tmp_path)


def test_step_that_is_not_made_durable_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = CheckpointStore(tmp_path, durable=True)
    store.save(1, saved.snapshot(1))
    store.wait()

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    store.save(2, saved.snapshot(2), replaces=[1])
    with pytest.raises(RuntimeError, match="Input/output error"):
        store.close()
    assert saved_steps(tmp_path) == [1]


def test_disk_that_is_too_small_is_refused_before_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    # Its compilation is announced: by then the size of the state is known.
    refused(
        RunDirError,
        "a checkpoint takes about 0.0 MB",
        "has 0.0 MB free",
        callbacks=[Checkpoint(tmp_path)],
        module=module_with(),
        compiled=["train step"],
    )


def test_space_is_compared_with_what_a_checkpoint_takes(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path, free // 2)
    with pytest.raises(RunDirError, match="Make room"):
        check_space(tmp_path, 2 * free)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"on_save_error": "ignore"}, "on_save_error='ignore': use 'raise' or 'warn'"),
        ({"on_corrupt": "warn"}, "on_corrupt='warn': use 'fall_back' or 'raise'"),
        ({"durable": "yes"}, "durable='yes': use True or False"),
    ],
)
def test_policy_that_does_not_exist_is_refused(options: dict[str, Any], part: str):
    with pytest.raises(ConfigError) as caught:
        Checkpoint("runs/x", **options)
    assert part in str(caught.value)


def test_directory_that_is_no_path_is_refused():
    with pytest.raises(ConfigError, match="is no path"):
        Checkpoint("runs/\0x")
