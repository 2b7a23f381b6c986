"""One writer to a run directory in an object store: who is refused, and when it is given up."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from jaxtrainer import lease
from jaxtrainer.errors import RunDirError
from jaxtrainer.lease import Lease
from jaxtrainer.places import place
from jaxtrainer.store import CheckpointStore
from tests import saved
from tests.buckets import URL, Store, breaking, run_dir, use

LOCK = "bucket/runs/a/.lock"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store in which a lease that does not beat is given up at once."""
    monkeypatch.setattr(lease, "PATIENCE_S", 0.2)
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    return use(monkeypatch)


def write_lock(store: Store, **changes: Any) -> dict[str, Any]:
    """A lock like the one that this process would write, but for some of it."""
    held = Lease(run_dir())
    held.acquire()
    owner = {**json.loads(store.cat_file(LOCK)), **changes}
    held.release()
    store.pipe_file(LOCK, json.dumps(owner).encode())
    return owner


def test_lease_is_given_back(store: Store):
    held = Lease(run_dir())
    held.acquire()
    assert store.names() == ["a/.lock"]
    held.release()
    held.release()
    assert store.names() == []
    assert "jaxtrainer-lease" not in {thread.name for thread in threading.enumerate()}


def test_two_stores_of_this_process_are_refused(store: Store):
    first = CheckpointStore(URL)
    with pytest.raises(RunDirError, match="That is this process"):
        CheckpointStore(URL)
    first.close()
    CheckpointStore(URL).close()


def test_lease_of_another_host_that_lives_is_refused(store: Store):
    owner = write_lock(store, host="elsewhere", lease="other")
    beats = iter(range(1, 100))

    def beat(name: str, path: Any) -> None:
        if name == "cat_file":
            store.before = lambda name, path: None
            store.pipe_file(LOCK, json.dumps({**owner, "beat": next(beats)}).encode())
            store.before = beat

    store.before = beat
    with pytest.raises(RunDirError, match=r"on elsewhere: .*delete s3://bucket/runs/a/\.lock"):
        Lease(run_dir()).acquire()
    assert json.loads(store.cat_file(LOCK))["host"] == "elsewhere"


@pytest.mark.parametrize(
    "changes",
    [{"host": "elsewhere"}, {"started": "1"}, {"boot": "another"}],
    ids=["silent_host", "number_used_again", "before_a_reboot"],
)
def test_lease_of_a_process_that_is_gone_is_taken_over(store: Store, changes: dict[str, Any]):
    write_lock(store, lease="other", **changes)
    held = Lease(run_dir())
    held.acquire()
    assert json.loads(store.cat_file(LOCK))["lease"] != "other"
    held.release()
    assert store.names() == []


@pytest.mark.parametrize("text", [b"", b"{", b"[]"])
def test_lease_that_says_nothing_is_taken_over(store: Store, text: bytes):
    store.pipe_file(LOCK, text)
    held = Lease(run_dir())
    held.acquire()
    held.release()
    assert store.names() == []


def test_of_two_that_take_it_at_once_one_has_it(store: Store, monkeypatch: pytest.MonkeyPatch):
    other = write_lock(store, lease="other", host="elsewhere")
    store.rm([LOCK])

    def late(path: str, value: bytes, **_: Any) -> None:
        Store.pipe_file(store, path, json.dumps(other).encode())

    monkeypatch.setattr(store, "pipe_file", late)
    with pytest.raises(RunDirError, match="on elsewhere"):
        Lease(run_dir()).acquire()


def test_lease_says_that_it_lives(store: Store):
    held = Lease(run_dir())
    held.acquire()
    seen = threading.Event()

    def look(name: str, path: Any) -> None:
        if name == "pipe_file":
            seen.set()

    store.before = look
    assert seen.wait(30)
    held.release()


def test_lease_outlives_a_store_that_does_not_answer(store: Store):
    held = Lease(run_dir())
    held.acquire()
    asked = threading.Event()

    def offline(name: str, path: Any) -> None:
        asked.set()
        raise ConnectionError("no route")

    store.before = offline
    assert asked.wait(30)
    store.before = breaking("none", "", ConnectionError())
    held.check()
    held.release()
    assert store.names() == []


def test_run_whose_lease_was_taken_over_saves_nothing_more(store: Store):
    saver = CheckpointStore(URL)
    saver.save(1, saved.snapshot(1))
    saver.wait()
    store.pipe_file(LOCK, json.dumps({"pid": 1, "lease": "other"}).encode())
    beater = next(t for t in threading.enumerate() if t.name == "jaxtrainer-lease")
    beater.join(30)
    with pytest.raises(RunDirError, match="was taken over by another run"):
        saver.save(2, saved.snapshot(2))
    saver.close()
    assert place(URL).is_dir()
    assert json.loads(store.cat_file(LOCK))["lease"] == "other"
