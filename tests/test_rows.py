"""Which rows of a batch a process holds: those of its devices, together the batch, none twice.

Processes are played by groups of the eight devices, so that every division can be tried.
"""

from __future__ import annotations

import itertools
from typing import Any

import grain
import jax
import numpy as np
import pytest
from flax import nnx

from jaxtrainer import data
from jaxtrainer.chunks import ReadOptions
from jaxtrainer.data import open_source
from jaxtrainer.grain_source import MapSource
from jaxtrainer.indexed import IndexedChunks
from jaxtrainer.rows import held_rows, padded_rows, place_chunk
from jaxtrainer.sharding import batch_sharding, build_mesh
from tests import tiny

DIVISIONS = (1, 2, 4, 8)


def groups(count: int, order: Any = None) -> list[tuple[Any, ...]]:
    """The devices of each of so many processes."""
    devices = jax.devices() if order is None else [jax.devices()[i] for i in order]
    size = len(devices) // count
    return [tuple(devices[i * size : (i + 1) * size]) for i in range(count)]


@pytest.mark.parametrize(("count", "rows"), [*itertools.product(DIVISIONS, [1, 5, 8, 13, 16, 24])])
def test_rows_of_all_processes_are_the_batch(count: int, rows: int):
    mesh = build_mesh({"data": 8})
    parts = [held_rows(mesh, rows, group) for group in groups(count)]
    np.testing.assert_array_equal(np.concatenate([p.rows for p in parts]), np.arange(rows))
    assert {len(p.rows) + p.padding for p in parts} == {padded_rows(mesh, rows) // count}


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_the_devices_in_any_order(seed: int):
    order = np.random.default_rng(seed).permutation(8)
    mesh = jax.sharding.Mesh(np.array(jax.devices())[order].reshape(4, 2), ("data", "model"))
    where = batch_sharding(mesh, 12, stacked=False).devices_indices_map((12,))
    for group in groups(4):
        want = {i for device in group for i in range(12)[where[device][0]]}
        assert {*held_rows(mesh, 12, group).rows.tolist()} == want


def test_processes_of_one_replica_hold_the_same_rows():
    mesh = build_mesh({"data": 2, "model": 4})
    parts = [held_rows(mesh, 10, group).rows.tolist() for group in groups(4)]
    assert parts == [[0, 1, 2, 3, 4]] * 2 + [[5, 6, 7, 8, 9]] * 2


def test_part_of_a_batch_is_its_rows_and_then_zeros():
    mesh, batch = build_mesh({"data": 8}), np.arange(1, 14)[:, None]
    parts = [held_rows(mesh, 13, group).of(batch)[:, 0].tolist() for group in groups(4)]
    assert parts == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 0, 0, 0]]


def test_scattered_rows_are_taken_in_order():
    devices = np.array(jax.devices())[[0, 4, 1, 5, 2, 6, 3, 7]]
    mesh = jax.sharding.Mesh(devices, ("data",))
    held = held_rows(mesh, 8, groups(2)[0])
    assert held.rows.tolist() == [0, 2, 4, 6]
    assert held.of(np.arange(10, 18)).tolist() == [10, 12, 14, 16]


@pytest.mark.parametrize("rows", [3, 8, 13])
def test_placed_chunk_is_divided_and_padded(rows: int):
    mesh = build_mesh({"data": 8})
    padded, held = padded_rows(mesh, rows), held_rows(mesh, rows)
    chunk = np.stack([held.of(np.arange(1, rows + 1)) for _ in range(2)])
    placed = place_chunk(chunk, mesh, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, padded // 8)}
    assert np.asarray(placed)[1].tolist() == [*range(1, rows + 1)] + [0] * (padded - rows)


@pytest.mark.parametrize(
    ("count", "samples", "size", "start"),
    [*itertools.product([1, 2, 4, 8], [21, 48], [8, 16], [0, 1])],
)
@pytest.mark.parametrize("gathers", [False, True], ids=["indices", "rows"])
def test_chunks_of_all_processes_are_the_epoch(
    count: int, samples: int, size: int, start: int, gathers: bool
):
    mesh, epoch = build_mesh({"data": 8}), 3

    loader = data.from_arrays(np.arange(samples), batch_size=size, shuffle=True, seed=7)
    of_all: list[list[np.ndarray]] = []
    for group in groups(count):
        options = ReadOptions(
            stage="test", keep_ragged=True, held=lambda n, g=group: held_rows(mesh, n, g)
        )
        source: Any = open_source(loader, "test")
        chunks = IndexedChunks(source, options, gathers=gathers).read(epoch, start, None, 2)
        read = [(c.tree[i], held_rows(mesh, c.rows, group)) for c in chunks for i in range(c.size)]
        of_all.append([tree[: len(held.rows)] for tree, held in read])
    got = np.concatenate([np.concatenate(parts) for parts in zip(*of_all, strict=True)])
    np.testing.assert_array_equal(got, loader.batch_indices(epoch)[start * size :])


class Numbers:
    def __init__(self, count: int) -> None:
        self.count, self.read = count, set()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.read.add(index)
        return {"x": np.array([index])}


@pytest.mark.parametrize(("count", "start"), [*itertools.product([2, 4, 8], [0, 1])])
def test_grain_batches_of_all_processes_are_those_of_one(count: int, start: int):
    mesh, epoch = build_mesh({"data": 8}), 2
    of_all = []
    for group in [None, *groups(count)]:
        dataset = grain.MapDataset.source(Numbers(19)).seed(1).shuffle().batch(8)
        source = MapSource(dataset)
        if group is not None:
            source = source.of_rows(lambda n, g=group: held_rows(mesh, n, g))
            assert source.is_partial
        batches = [batch["x"][:, 0].tolist() for batch, _ in source.open(epoch, start)]
        assert [source.rows_of(start + i, len(b)) for i, b in enumerate(batches)] == [
            *[8] * (2 - start),
            3,
        ]
        of_all.append(batches)
    whole, *parts = of_all
    joined = [[*itertools.chain(*together)] for together in zip(*parts, strict=True)]
    assert joined == whole


@pytest.mark.parametrize("last", ["map", "batch_fn", "endless"])
def test_grain_dataset_whose_rows_are_not_known_is_read_whole(last: str):
    records = grain.MapDataset.source(Numbers(16))
    dataset = {
        "map": records.batch(8).map(lambda batch: batch),
        "batch_fn": records.batch(8, batch_fn=lambda rows: {"x": np.stack([r["x"] for r in rows])}),
        "endless": records.batch(8).repeat(),
    }[last]
    source = MapSource(dataset)
    assert source.of_rows(lambda rows: pytest.fail("asked for rows")) is source
    assert next(source.open(0, 0))[0]["x"].shape == (8, 1)


class Pictures(nnx.Module):
    """Convolution, BatchNorm and a softmax over rows: what a division could get wrong."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = self.norm(self.conv(x)).reshape(len(x), -1, 4)
        return jax.nn.softmax(self.attention(rows).mean(1), axis=0)


class Look(tiny.Tiny):
    def validation_step(self, model: Any, batch: Any) -> Any:
        self.log("mean", model(batch["x"]).max(1).mean())

    def predict_step(self, model: Any, batch: Any) -> Any:
        return model(batch["x"])


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [1, 5, 9, 15])
def test_ragged_batch_is_that_of_one_device_in_any_operation(ragged: int):
    x = np.random.default_rng(0).normal(size=(16 + ragged, 6, 6, 1)).astype(np.float32)
    batches = [{"x": x[:16]}, {"x": x[16:]}]
    values, predictions = [], []
    for mesh in ({"data": 8}, {"data": 1}):
        trainer, module = tiny.make_trainer(mesh=mesh), Look(Pictures)
        values.append(trainer.validate(module, batches, verbose=False)["val/mean"])
        predictions.append(np.concatenate(trainer.predict(module, batches)))
    # Float32 sums in another order.
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    np.testing.assert_allclose(*predictions, rtol=1e-4, atol=1e-6)
