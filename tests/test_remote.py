"""Checkpoints in an object store: complete or not there, out of reach is not damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer import Trainer, load_params
from jaxtrainer.callbacks import (
    Checkpoint,
    NonFinite,
    OnExceptionCheckpoint,
    PredictionWriter,
    Profiler,
)
from jaxtrainer.checkpoint import find_checkpoint
from jaxtrainer.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWarning,
    ConfigError,
    MissingExtraError,
    RunDirError,
)
from jaxtrainer.places import place
from jaxtrainer.remote import STORES
from jaxtrainer.rundir import check_space, remove_step, saved_steps
from jaxtrainer.store import CheckpointStore
from tests import saved, tiny
from tests.bad_input import refused
from tests.buckets import URL, Store, breaking, run_dir, use

pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    # Of a read that fails Orbax leaves others behind, which end after their event loop is closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return use(monkeypatch)


def fit(callbacks: list[Any], epochs: int, **options: Any) -> dict[str, Any]:
    """Train a linear model, two steps an epoch, and return its state."""
    module, loader = tiny.Tiny(tiny.line), tiny.make_batches(2)
    return tiny.fit(loader, module=module, callbacks=callbacks, max_epochs=epochs, **options)[1]


def damage(store: Store, step: int) -> None:
    """Flip bits in all files of a step that arrays are in."""
    for key, file in store.store.items():
        if f"step_{step}/params/" in key and "/d/" in key:
            content = file.getvalue()
            store.pipe_file(key, content[:-64] + bytes(b ^ 1 for b in content[-64:]))


@pytest.mark.parametrize("which", ["last", "best", f"{URL}/step_4", URL])
def test_run_goes_on_from_a_store_as_if_uninterrupted(store: Store, which: str):
    want = fit([], 3)
    fit([Checkpoint(URL, save_top_k=-1)], 2)
    fresh = [] if "://" in which else [Checkpoint(URL, save_top_k=-1)]
    tiny.assert_same_bits(fit(fresh, 3, ckpt_path=which), want)


def test_steps_that_are_replaced_are_deleted_whole(store: Store):
    checkpoint = Checkpoint(f"{URL}/", durable=True)
    fit([checkpoint], 3)
    assert saved_steps(place(URL)) == [6]
    assert {name.split("/")[1] for name in store.names()} == {"step_6"}
    assert checkpoint.best_model_path == f"{URL}/step_6"
    assert checkpoint.state_key == "Checkpoint[a]"


def test_marker_of_a_step_is_written_last(store: Store):
    written: list[str] = []
    store.before = lambda name, path: written.append(path) if "p" in name[:2] else None
    saved.save(place(URL), 1)
    of_step = [path for path in written if "/step_1/" in path]
    assert of_step[-1].endswith("a/step_1/commit_success.txt")
    assert len(of_step) == len({*of_step}) > 10


@pytest.mark.parametrize("where", ["params", "commit_success.txt"])
def test_save_that_is_killed_is_not_there_and_is_cleaned_up(store: Store, where: str):
    saved.save(place(URL), 1)
    kept = store.names()
    call = "pipe_file" if where == "commit_success.txt" else "put_file"
    store.before = breaking(call, f"step_2/{where}", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        saved.save(place(URL), 2, resumed_step=1)
    store.before = lambda name, path: None
    assert saved_steps(place(URL)) == [1]
    assert "a/.unfinished_step_2" in store.names()
    saved.save(place(URL), 3, resumed_step=1)
    assert {*kept} < {*store.names()}
    assert not [name for name in store.names() if "step_2" in name]


def test_deletion_that_is_killed_leaves_no_half_step(store: Store):
    saved.save(place(URL), 1, 2)
    store.before = breaking("rm", "params", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        remove_step(place(URL), 1)
    store.before = lambda name, path: None
    assert saved_steps(place(URL)) == [2]
    assert [name for name in store.names() if "step_1/" in name]
    CheckpointStore(URL, resumed_step=2).close()
    assert not [name for name in store.names() if "step_1" in name]


def test_note_of_a_step_that_is_complete_deletes_nothing(store: Store):
    saved.save(place(URL), 1)
    kept = store.names()
    store.pipe_file("bucket/runs/a/.unfinished_step_1", b"")
    CheckpointStore(URL, resumed_step=1).close()
    assert store.names() == kept


def test_files_that_the_run_has_not_written_stay(store: Store):
    mine = ["a/notes", "a/step_7/mine", "a/step_old/x", "a/damaged_step_3/x", "b/step_1/x"]
    for name in mine:
        store.pipe_file(f"bucket/runs/{name}", b"x")
    saved.save(place(URL), 1)
    assert {*mine} < {*store.names()}
    assert saved_steps(place(URL)) == [1]
    with pytest.raises(CheckpointError, match="step_7 has files already, such as mine"):
        saved.save(place(URL), 7, resumed_step=1)
    assert {*mine} < {*store.names()}


def test_damaged_array_is_named(store: Store):
    saved.save(place(URL), 1)
    damage(store, 1)
    with pytest.raises(CheckpointCorruptError, match=r"s3://bucket/runs/a/step_1 .*params/"):
        saved.assert_is_step(place(f"{URL}/step_1"), 1)


def test_damaged_step_is_passed_over_and_kept(store: Store):
    want = fit([], 3)
    fit([Checkpoint(URL, save_top_k=-1)], 2)
    damage(store, 4)
    count = len([name for name in store.names() if "/step_4/" in name])
    with pytest.warns(CheckpointWarning, match="Going on from step 2"):
        state = fit([Checkpoint(URL, save_top_k=-1)], 3, ckpt_path="last")
    tiny.assert_same_bits(state, want)
    assert saved_steps(place(URL)) == [2, 4, 6]
    assert len([name for name in store.names() if "/damaged_step_4/" in name]) == count


@pytest.mark.parametrize("call", ["find", "cat_file", "get_file"])
def test_store_that_cannot_be_reached_is_no_damage(store: Store, call: str):
    fit([Checkpoint(URL, save_top_k=-1)], 2)
    kept = store.names()
    store.before = breaking(call, "", ConnectionError("no route"))
    with pytest.raises(
        RunDirError, match=r"cannot be reached \(ConnectionError: no route"
    ) as caught:
        fit([Checkpoint(URL, save_top_k=-1)], 3, ckpt_path="last")
    assert "credentials there? AWS_ACCESS_KEY_ID" in str(caught.value)
    assert store.names() == kept


@pytest.mark.parametrize("saver", [Checkpoint, OnExceptionCheckpoint])
def test_store_that_takes_nothing_is_refused_before_compilation(store: Store, saver: Any):
    store.before = breaking("pipe_file", "", PermissionError("Access Denied"))
    refused(
        RunDirError, "cannot be reached (PermissionError: Access Denied)", callbacks=[saver(URL)]
    )


def test_bucket_that_does_not_exist_is_refused_before_compilation(store: Store):
    store.before = breaking("pipe_file", "", FileNotFoundError("bucket"))
    refused(RunDirError, "cannot write in s3://", "is there a bucket?", callbacks=[Checkpoint(URL)])


def test_store_that_fails_later_is_warned_of_and_the_last_good_one_stays(store: Store):
    def offline(name: str, path: Any) -> None:
        if "step_4" in str(path) or "a/.unfinished_step_4" in store.names():
            raise ConnectionError("no route")

    store.before = offline
    with pytest.warns(CheckpointWarning, match="Training goes on"):
        fit([Checkpoint(URL, on_save_error="warn")], 2)
    store.before = lambda name, path: None
    assert saved_steps(place(URL)) == [2]


def test_object_that_arrives_cut_is_sent_again(store: Store, monkeypatch: pytest.MonkeyPatch):
    def cutting(lpath: str, rpath: str, **_: Any) -> None:
        store.pipe_file(rpath, Path(lpath).read_bytes()[:-1])

    monkeypatch.setattr(store, "put_file", cutting)
    saved.save(place(URL), 1)
    saved.assert_is_step(place(f"{URL}/step_1"), 1)


def test_object_that_arrives_cut_twice_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "put_file", lambda lpath, rpath, **_: store.pipe_file(rpath, b"x"))
    monkeypatch.setattr(store, "pipe_file", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match="has another size there than it was sent with"):
        run_dir().upload(Path(__file__).parent, [Path(__file__).name])


def test_object_whose_name_leads_out_of_the_folder_is_refused(store: Store, tmp_path: Path):
    with pytest.raises(CheckpointCorruptError, match=r"object of the name 'params/\.\./x'"):
        run_dir().download(["params/../x"], tmp_path)


def test_copies_on_the_disk_are_removed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxtrainer.places._staging", lambda: tmp_path)
    fit([Checkpoint(URL, save_top_k=-1)], 2)
    fit([Checkpoint(URL, save_top_k=-1)], 3, ckpt_path="last")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_space_for_the_copy_on_the_disk_is_looked_at(store: Store):
    free = shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free
    check_space(place(URL), free // 2)
    with pytest.raises(RunDirError, match="set TMPDIR to a directory on another disk"):
        check_space(place(URL), 2 * free)


class Breaking:
    """Batches, and an error at the third."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        yield from self.batches[:2]
        raise KeyError("third")


def test_crashed_run_is_saved_in_a_store(store: Store):
    saver = OnExceptionCheckpoint(URL)
    loader = Breaking(tiny.make_batches(3))
    with pytest.raises(KeyError):
        tiny.fit(loader, module=tiny.Tiny(tiny.line), callbacks=[saver], max_epochs=1)
    assert saver.path == f"{URL}/step_2"
    assert saved_steps(place(URL)) == [2]


def test_weights_are_loaded_from_a_store(store: Store):
    module = tiny.Tiny(tiny.line)
    fit([Checkpoint(URL)], 1)
    report = load_params(module, URL, verbose=False)
    assert str(report.path) == f"{URL}/step_2"
    assert len(report.loaded) == 2


def test_url_without_a_checkpoint_says_what_is_there(store: Store):
    store.pipe_file("bucket/runs/other/x", b"")
    with pytest.raises(CheckpointNotFoundError, match="s3://bucket/runs has other"):
        find_checkpoint(URL)


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("http://host/run", "go to a directory, also of a mounted disk, or to `gs://` and `s3://`"),
        ("s3://bucket", "names no directory in a bucket; write e.g. `s3://bucket/runs/mnist`"),
        ("s3://bucket/a/../b", "names no directory in a bucket"),
        ("s3://bucket/a*", "names no directory in a bucket"),
        (Path("s3://bucket/run"), "'s3:/bucket/run' has lost a slash"),
    ],
)
@pytest.mark.parametrize("saver", [Checkpoint, OnExceptionCheckpoint])
def test_url_of_no_run_directory_is_refused(store: Store, saver: Any, url: Any, part: str):
    with pytest.raises(ConfigError) as caught:
        saver(url)
    assert part in str(caught.value)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_store_whose_package_is_missing_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, scheme: str
):
    extra = STORES[scheme][1]
    monkeypatch.setitem(STORES, scheme, ("no_such_package", *STORES[scheme][1:]))
    with pytest.raises(MissingExtraError, match=rf"pip install 'jaxtrainer\[{extra}\]'"):
        Checkpoint(f"{scheme}://bucket/run")


@pytest.mark.parametrize(
    "make",
    [
        lambda url: PredictionWriter(url),
        lambda url: Profiler(url, steps=(1, 2)),
        lambda url: NonFinite(dirpath=url),
        lambda url: Trainer(default_root_dir=url, max_epochs=1),
        lambda url: Trainer(compilation_cache=url, max_epochs=1),
    ],
    ids=["PredictionWriter", "Profiler", "NonFinite", "default_root_dir", "compilation_cache"],
)
def test_url_where_a_disk_is_needed_is_refused(make: Any):
    with pytest.raises(ConfigError, match="only checkpoints can be kept in an object store"):
        make("gs://bucket/run")


def test_default_root_dir_is_not_put_before_a_url(store: Store, tmp_path: Path):
    checkpoint = Checkpoint(URL)
    fit([checkpoint], 1, default_root_dir=tmp_path)
    assert checkpoint.best_model_path == f"{URL}/step_2"
    assert not list(tmp_path.iterdir())
