"""`PredictionWriter`: what is written is what `predict` returns, and nothing of it is kept."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer import Callback, Run, read_predictions
from jaxtrainer.callbacks import PredictionWriter
from jaxtrainer.errors import ConfigError, DataError, RunDirError
from tests import tiny
from tests.bad_input import module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")


class Pair(NamedTuple):
    x: Any
    y: Any


STRUCTURES: dict[str, Callable[[Any], Any]] = {
    "array": lambda x: x,
    "dict": lambda x: {"logits": x, "file": x.argmax(-1), "allow_pickle": x > 0},
    "nested": lambda x: {"a": [x, (x + 1, {"b": x[:, 0]})], "c/d": x, "none": None},
    "bfloat16": lambda x: {"small": x.astype(jnp.bfloat16), "halves": x.astype(jnp.float16)},
}


def module_returning(make: Callable[[Any], Any]) -> Any:
    return module_with(predict_step=lambda self, model, batch: make(model(batch["x"])))


def write(
    directory: Path, module: Any, loader: Any, interval: Any = "batch", **options: Any
) -> Any:
    writer = PredictionWriter(directory, write_interval=interval)
    return tiny.make_trainer(writer).predict(module, loader, **options)


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)
def test_what_is_read_is_what_predict_returns(make: Any, tmp_path: Path):
    module, batches = module_returning(make), tiny.make_batches(3, ragged=5)
    want = tiny.make_trainer().predict(module, batches)
    assert write(tmp_path, module, batches) is None
    got = list(read_predictions(tmp_path))
    assert len(got) == 4
    for one, other in zip(got, want, strict=True):
        tiny.assert_same_bits(tiny.host_state(one), tiny.host_state(other))


def test_other_nodes_come_back_as_their_leaves_by_name(tmp_path: Path):
    write(tmp_path, module_returning(lambda x: {"pair": Pair(x, -x)}), tiny.make_batches(1))
    (batch,) = read_predictions(tmp_path)
    assert set(batch["pair"]) == {"pair/x", "pair/y"}
    np.testing.assert_array_equal(batch["pair"]["pair/x"], -batch["pair"]["pair/y"])


def test_files_are_archives_that_numpy_reads_without_pickle(tmp_path: Path):
    write(tmp_path, module_returning(lambda x: {"y": x}), tiny.make_batches(2, ragged=5))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"batch_{i:06d}.npz" for i in range(3)), "index.json"]
    assert json.loads((tmp_path / "index.json").read_text())["rows"] == [8, 8, 5]
    with np.load(tmp_path / "batch_000002.npz", allow_pickle=False) as archive:
        assert archive["y"].shape == (5, 3)


def test_interval_of_an_epoch_writes_one_file_of_all_rows(tmp_path: Path):
    module, batches = module_returning(lambda x: {"y": x}), tiny.make_batches(2, ragged=5)
    write(tmp_path / "batches", module, batches)
    write(tmp_path / "epoch", module, batches, "epoch")
    (whole,) = read_predictions(tmp_path / "epoch")
    parts = [batch["y"] for batch in read_predictions(tmp_path / "batches")]
    np.testing.assert_array_equal(whole["y"], np.concatenate(parts))


def test_loaders_with_names_have_directories_of_their_own(tmp_path: Path):
    loaders = {"clean": tiny.make_batches(2), "noisy": tiny.make_batches(1)}
    write(tmp_path, module_with(), loaders)
    sizes = {name: [len(x) for x in read_predictions(tmp_path / name)] for name in loaders}
    assert sizes == {"clean": [8, 8], "noisy": [8]}
    with pytest.raises(RunDirError, match="has predictions already"):
        write(tmp_path, module_with(), loaders)


def test_predictions_are_returned_too_where_asked_for(tmp_path: Path):
    module, batches = module_with(), tiny.make_batches(2)
    kept = write(tmp_path / "a", module, batches, return_predictions=True)
    streamed = list(write(tmp_path / "b", module, batches, stream=True))
    for one, other, third in zip(kept, streamed, read_predictions(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, third)


def test_predict_without_a_writer_returns_unless_told_not_to():
    trainer, batches = tiny.make_trainer(), tiny.make_batches(2)
    assert len(trainer.predict(module_with(), batches)) == 2
    assert trainer.predict(module_with(), batches, return_predictions=False) is None


class Alive(Callback):
    """At each batch, how many batches of predictions are still held by anyone."""

    order = 3

    def __init__(self) -> None:
        self.refs: list[weakref.ref[Any]] = []
        self.counts: list[int] = []

    def on_predict_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.refs.append(weakref.ref(outputs))
        self.counts.append(sum(ref() is not None for ref in self.refs))


@pytest.mark.parametrize("way", ["writer", "stream", "nothing"])
def test_predictions_held_do_not_grow_with_the_batches(way: str, tmp_path: Path):
    alive, batches = Alive(), tiny.make_batches(40)
    callbacks = [alive, PredictionWriter(tmp_path)] if way == "writer" else [alive]
    trainer = tiny.make_trainer(callbacks)
    if way == "stream":
        for _ in trainer.predict(module_with(), batches, stream=True):
            pass
    else:
        assert trainer.predict(module_with(), batches, return_predictions=False) is None
    # This batch, and at most the one before it, which the loop's variable still names.
    assert len(alive.counts) == 40
    assert max(alive.counts) <= 2


def test_predictions_that_are_returned_are_all_held():
    alive = Alive()
    kept = tiny.make_trainer(alive).predict(module_with(), tiny.make_batches(5))
    assert alive.counts == [1, 2, 3, 4, 5] == [len(kept) - i for i in range(4, -1, -1)]


def test_directory_with_predictions_is_refused_and_left_alone(tmp_path: Path):
    write(tmp_path, module_with(), tiny.make_batches(2))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    writer = PredictionWriter(tmp_path)
    refused(RunDirError, "another directory", stage="predict", callbacks=[writer])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_directory_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    writer = PredictionWriter(tmp_path / "file" / "inside")
    refused(RunDirError, "cannot write in", stage="predict", callbacks=[writer])


def test_relative_directory_is_in_the_root_of_the_trainer(tmp_path: Path):
    trainer = tiny.make_trainer(PredictionWriter("predicted"), default_root_dir=tmp_path)
    trainer.predict(module_with(), tiny.make_batches(1))
    assert len(list(read_predictions(tmp_path / "predicted"))) == 1


def test_dev_run_writes_nothing_and_returns_predictions(tmp_path: Path):
    trainer = tiny.make_trainer(PredictionWriter(tmp_path / "none"), fast_dev_run=True)
    assert len(trainer.predict(module_with(), tiny.make_batches(3))) == 1
    assert not list(tmp_path.iterdir())


def test_prediction_that_did_not_end_has_no_index(tmp_path: Path):
    class Fails(Callback):
        def on_predict_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise ZeroDivisionError

    trainer = tiny.make_trainer([Fails(), PredictionWriter(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        trainer.predict(module_with(), tiny.make_batches(4))
    with pytest.raises(DataError, match="has 2 files of predictions that did not end; expected an"):
        read_predictions(tmp_path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "is damaged or missing": lambda d: (d / "batch_000001.npz").write_bytes(b"PK"),
    "batch_000001.npz is damaged or missing": lambda d: (d / "batch_000001.npz").unlink(),
    "has 8 rows; index.json says 8000": lambda d: _replace(d, "8", "8000"),
    "no index of predictions in format 1": lambda d: _replace(d, '"format_version": 1', '"v": 2'),
    "is no JSON": lambda d: (d / "index.json").write_text("{"),
    "has no predictions": lambda d: [path.unlink() for path in d.iterdir()],
}


def _replace(directory: Path, old: str, new: str) -> None:
    index = directory / "index.json"
    index.write_text(index.read_text().replace(old, new))


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=DAMAGES)
def test_damaged_predictions_are_named(message: str, damage: Any, tmp_path: Path):
    write(tmp_path, module_with(), tiny.make_batches(2))
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        list(read_predictions(tmp_path))


def test_leaves_that_no_file_can_hold_are_refused(tmp_path: Path):
    module = module_returning(lambda x: {"a": {"b": x}, "a/b": x})
    with pytest.raises(DataError, match="two leaves of the name 'a/b'"):
        write(tmp_path / "names", module, tiny.make_batches(1))
    module = module_returning(lambda x: {"logits": x, "mean": x.mean()})
    for interval in ("batch", "epoch"):
        with pytest.raises(DataError, match=r"share their first axis.*mean: float32\[\]"):
            write(tmp_path / interval, module, tiny.make_batches(2), interval)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3,), {}), "needs a directory, got 3"),
        ((("x",), {"write_interval": "step"}), "write_interval='step': use 'batch' or 'epoch'."),
    ],
)
def test_options_that_cannot_work_are_refused(arguments: Any, message: str):
    positional, named = arguments
    with pytest.raises(ConfigError, match=message):
        PredictionWriter(*positional, **named)


def test_stream_of_no_predictions_is_refused():
    with pytest.raises(ConfigError, match="leave out `return_predictions=False`"):
        tiny.make_trainer().predict(module_with(), [], stream=True, return_predictions=False)
