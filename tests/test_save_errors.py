"""Saves that fail: known at the next step, nothing good lost, and training does what it is told."""

from __future__ import annotations

import concurrent.futures
import errno
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.checkpoint import verify
from jaxtrainer.errors import CheckpointError, CheckpointWarning
from jaxtrainer.rundir import saved_steps
from jaxtrainer.store import CheckpointStore
from tests import saved, tiny
from tests.bad_input import loss_of, module_with

pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    # Of a write that fails Orbax leaves others behind, which end after their event loop is closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EPOCH = 3


class FailingDisk:
    """Lets the first so many tries of saving a step fail, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **tries: int) -> None:
        self.tries, self.seen = tries, []
        save = ocp.Checkpointer.save

        def failing_save(saver: Any, path: Path, **options: Any) -> None:
            self.seen.append(path.name)
            if self.tries.get(path.name, 0) > 0:
                self.tries[path.name] -= 1
                (path.parent / f"{path.name}.orbax-checkpoint-tmp").mkdir()
                raise OSError(errno.ENOSPC, "No space left on device")
            save(saver, path, **options)

        monkeypatch.setattr(ocp.Checkpointer, "save", failing_save)


class Awaits(Callback):
    """After each batch it waits for the save in flight, so that the next poll knows its end."""

    def __init__(self, saver: Checkpoint) -> None:
        self.saver = saver
        self.steps: list[int] = []

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(run.global_step)
        store = self.saver._store
        if store is not None and store._write is not None:
            concurrent.futures.wait([store._write])


def fit(saver: Checkpoint, *callbacks: Callback, module: Any = None, **options: Any) -> Any:
    options = {"max_epochs": 3, "steps_per_dispatch": 1, **options}
    loader = tiny.make_batches(EPOCH)
    return tiny.fit(
        loader, module=module or module_with(), callbacks=[*callbacks, saver], **options
    )


def test_save_that_works_at_the_second_try_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = FailingDisk(monkeypatch, step_6=1)
    result, _ = fit(Checkpoint(tmp_path))
    assert disk.seen == ["step_3", "step_6", "step_6", "step_9"]
    assert result.last_checkpoint == str(tmp_path / "step_9")
    assert [path.name for path in tmp_path.iterdir()] == ["step_9"]


def test_failed_save_ends_training_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    FailingDisk(monkeypatch, step_6=2)
    saver = Checkpoint(tmp_path)
    watch = Awaits(saver)
    with pytest.raises(CheckpointError, match=r"saving step 6 in .* failed: .*No space left"):
        fit(saver, watch)
    assert watch.steps[-1] == 7
    verify(tmp_path / "step_3")
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]


def test_run_that_a_failed_save_has_ended_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, want = fit(Checkpoint(tmp_path / "whole"))
    FailingDisk(monkeypatch, step_6=2)
    with pytest.raises(CheckpointError):
        fit(Checkpoint(tmp_path / "cut"))
    _, state = fit(Checkpoint(tmp_path / "cut"), ckpt_path="last")
    tiny.assert_same_bits(state, want)


def test_training_goes_on_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, want = fit(Checkpoint(tmp_path / "whole"))
    FailingDisk(monkeypatch, step_6=2)
    saver = Checkpoint(tmp_path / "run", on_save_error="warn")
    with pytest.warns(CheckpointWarning, match="saving step 6 .* the last checkpoint is .*step_3"):
        result, state = fit(saver, Awaits(saver))
    tiny.assert_same_bits(state, want)
    assert result.last_checkpoint == str(tmp_path / "run" / "step_9")
    assert saved_steps(tmp_path / "run") == [9]


def test_last_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    FailingDisk(monkeypatch, step_9=4)
    saver = Checkpoint(tmp_path, on_save_error="warn")
    with pytest.warns(CheckpointWarning, match="step 9"):
        result, _ = fit(saver)
    assert result.stop_reason == "max_epochs"
    assert result.last_checkpoint == result.best_checkpoint == str(tmp_path / "step_6")
    assert saver.last_step == 6
    assert saved_steps(tmp_path) == [6]


class Scores(Callback):
    """Logs a score that falls from epoch to epoch: the first is the best."""

    def on_train_epoch_end(self, run: Run) -> None:
        run.log("score", -float(run.epoch))


def test_room_is_made_by_what_is_replaced_but_for_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Step 9 is the third best of two, so that it replaces step 6; step 6 is the newest there is.
    FailingDisk(monkeypatch, step_9=2)
    saver = Checkpoint(tmp_path, monitor="score", mode="max", save_top_k=1, on_save_error="warn")
    with pytest.warns(CheckpointWarning, match="step 9"):
        fit(saver, Scores(), max_epochs=4)
    assert saved_steps(tmp_path) == [3, 12]
    assert saver.scores.keys() == {3, 12}
    assert (saver.best_step, saver.last_step) == (3, 12)


def test_what_is_replaced_makes_room_before_the_second_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    FailingDisk(monkeypatch, step_5=1)
    store, seen = CheckpointStore(tmp_path), []
    for step in (1, 2, 3):
        store.save(step, saved.snapshot(step))
    store.wait()
    start = store._start
    monkeypatch.setattr(
        store, "_start", lambda *args: (seen.append(saved_steps(tmp_path)), start(*args))
    )
    store.save(5, saved.snapshot(5), replaces=[1, 3])
    store.close()
    assert seen == [[1, 2, 3], [2, 3]]
    assert saved_steps(tmp_path) == [2, 5]


def test_state_that_cannot_be_saved_is_such_a_failure(tmp_path: Path):
    class Unsaveable(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"bad": object()} if self.armed else {}

        armed = False

        def on_train_start(self, run: Run) -> None:
            self.armed = True

    saver = Checkpoint(tmp_path, on_save_error="warn")
    with pytest.warns(CheckpointWarning, match="holds JSON data"):
        result, _ = fit(saver, Unsaveable())
    assert (result.num_steps, result.last_checkpoint) == (9, None)


def test_slow_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, want = fit(Checkpoint(tmp_path / "quick"))
    save = ocp.Checkpointer.save

    def slow_save(*args: Any, **options: Any) -> None:
        time.sleep(0.1)
        save(*args, **options)

    monkeypatch.setattr(ocp.Checkpointer, "save", slow_save)
    saver = Checkpoint(tmp_path / "slow", every_n_train_steps=1, save_top_k=-1)
    _, state = fit(saver)
    tiny.assert_same_bits(state, want)
    assert saved_steps(tmp_path / "slow") == [*range(1, 10)]
    for step in range(1, 10):
        verify(tmp_path / "slow" / f"step_{step}")


def mount(*args: str) -> None:
    done = subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs root and mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Heavy(nnx.Module):
    """A line with half a million parameters more: with Adam's moments 6 MB."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.line = tiny.line(rngs)
        self.ballast = nnx.Param(jax.random.normal(rngs.params(), (500_000,)))

    def __call__(self, x: Any) -> Any:
        return self.line(x) + (self.ballast[...] ** 2).mean()


def heavy() -> Any:
    step = lambda self, model, batch: loss_of(model, batch)  # noqa: E731
    return module_with(configure_model=lambda self, rngs: Heavy(rngs), training_step=step)


def test_full_disk_ends_training_and_keeps_what_was_saved(small_disk: Path):
    folder = small_disk / "run"
    saver = Checkpoint(folder, save_top_k=-1)
    with pytest.raises(CheckpointError, match=r"saving step \d+ in .* failed"):
        fit(saver, Awaits(saver), module=heavy(), max_epochs=6)
    steps = saved_steps(folder)
    assert steps[:2] == [3, 6]
    for step in steps:
        verify(folder / f"step_{step}")
    assert not (folder / ".lock").exists()


class Frees(Callback):
    """Deletes a file at the end of an epoch."""

    def __init__(self, file: Path, epoch: int) -> None:
        self.file = file
        self.epoch = epoch

    def on_train_epoch_start(self, run: Run) -> None:
        if run.epoch == self.epoch:
            self.file.unlink()


class Fills(Callback):
    """Fills the disk at the end of the first epoch."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, run: Run) -> None:
        if run.epoch == 1:
            self.file.write_bytes(bytes(shutil.disk_usage(self.file.parent).free - 500_000))


def test_run_on_a_full_disk_goes_on_and_saves_again_when_it_can(small_disk: Path):
    folder, filler = small_disk / "run", small_disk / "filler"
    saver = Checkpoint(folder, on_save_error="warn")
    others = [Fills(filler), Awaits(saver), Frees(filler, 3)]
    with pytest.warns(CheckpointWarning, match=r"step 6 .*the last checkpoint is .*step_3"):
        result, _ = fit(saver, *others, module=heavy(), max_epochs=5)
    assert result.num_steps == 15
    assert result.last_checkpoint == str(folder / "step_15")
    verify(folder / "step_15")
    assert [path.name for path in folder.iterdir()] == ["step_15"]


class Remounts(Callback):
    """Makes the disk read-only after so many batches."""

    def __init__(self, saver: Checkpoint, folder: Path, batches: int) -> None:
        self.saver = saver
        self.folder = folder
        self.batches = batches

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.total_batches == self.batches:
            assert self.saver._store is not None
            self.saver._store.wait()
            mount("-o", "remount,ro", str(self.folder))


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_disk_that_becomes_read_only_loses_nothing(small_disk: Path, policy: Any):
    folder = small_disk / "run"
    saver = Checkpoint(folder, on_save_error=policy)
    remounts = Remounts(saver, small_disk, 4)
    if policy == "raise":
        with pytest.raises(CheckpointError, match=r"saving step 6 .*[Rr]ead-only"):
            fit(saver, remounts)
    else:
        with pytest.warns(CheckpointWarning, match=r"saving step [69] .*[Rr]ead-only"):
            assert fit(saver, remounts)[0].num_steps == 9
    verify(folder / "step_3")


def test_read_only_disk_is_refused_before_compilation(small_disk: Path):
    mount("-o", "remount,ro", str(small_disk))
    compiled: list[str] = []

    class Watch(Callback):
        def on_compile_start(self, run: Run, name: str) -> None:
            compiled.append(name)

    with pytest.raises(CheckpointError, match=r"cannot write in .*Read-only file system"):
        fit(Checkpoint(small_disk / "run"), Watch())
    assert compiled == []


def test_large_state_that_fails_is_known_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxtrainer.store.HOST_COPY_BYTES", 0)
    wait = ocp.AsyncCheckpointer.wait_until_finished

    def failing_wait(saver: Any) -> None:
        wait(saver)
        if (tmp_path / "step_6").is_dir():
            shutil.rmtree(tmp_path / "step_6")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", failing_wait)
    saver = Checkpoint(tmp_path)
    watch = Awaits(saver)
    with pytest.raises(CheckpointError, match=r"saving step 6 .*No space left"):
        fit(saver, watch)
    assert watch.steps[-1] == 7
    verify(tmp_path / "step_3")


def test_large_state_is_saved_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxtrainer.store.HOST_COPY_BYTES", 0)
    _, whole = fit(Checkpoint(tmp_path / "whole"))
    fit(Checkpoint(tmp_path / "cut"), max_epochs=1)
    _, state = fit(Checkpoint(tmp_path / "cut"), ckpt_path="last")
    tiny.assert_same_bits(state, whole)
    assert np.any(state[".params['kernel']"])
