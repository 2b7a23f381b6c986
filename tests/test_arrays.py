"""Arrays in memory as a Grain dataset: Grain's own methods work on it, and keep what it knows."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxtrainer import data
from jaxtrainer.data import device_transform_of
from jaxtrainer.errors import DataError


def numbers(count=6, **options):
    return data.from_arrays({"x": np.arange(count)}, batch_size=2, **options)


def test_from_arrays_keeps_grains_own_methods():
    loader = numbers().seed(1).shuffle()
    assert sorted(loader[i]["x"].tolist() for i in range(3)) == [[0, 1], [2, 3], [4, 5]]


def test_from_arrays_mapped_keeps_device_transform():
    def halve(batch):
        return {"x": batch["x"] / 2}

    loader = numbers(device_transform=halve).map(lambda batch: batch)
    assert device_transform_of(loader) is halve


def test_from_arrays_repeated_shuffles_each_epoch_anew():
    loader = numbers(16, shuffle=True, seed=3).repeat()
    first, second = (np.concatenate([loader[i + j]["x"] for j in range(8)]) for i in (0, 8))
    assert first.tolist() != second.tolist()
    assert sorted(first) == sorted(second) == list(range(16))


@pytest.mark.parametrize(
    "arrays",
    [{"x": np.zeros(3), "y": np.zeros(2)}, {"x": np.zeros(3), "y": np.zeros(())}],
    ids=["lengths", "scalar"],
)
def test_from_arrays_refuses_uneven_arrays(arrays):
    with pytest.raises(DataError, match=r"same number of rows; got x: 3, y: (2|None)"):
        data.from_arrays(arrays, batch_size=1)


def test_with_batch_size_changes_nothing_else():
    options: Any = {"shuffle": True, "seed": 3, "drop_remainder": True, "device_resident": False}
    arrays = {"x": np.arange(10)}
    made = data.from_arrays(arrays, batch_size=2, **options).with_batch_size(3)
    expected = data.from_arrays(arrays, batch_size=3, **options)
    assert [b["x"].tolist() for b in made] == [b["x"].tolist() for b in expected]
    assert (made.device_resident, made.drop_remainder) == (False, True)


def test_transform_on_the_device_comes_after_the_loaders_own():
    options: Any = {"batch_size": 1, "device_transform": lambda batch: batch["x"] * 9}
    loader = data.from_arrays({"x": np.ones(2)}, **options)
    twice = data.on_device(data.on_device(loader, lambda x: x + 1), lambda x: x * 2)
    transform: Any = device_transform_of(twice)
    assert transform({"x": 1.0}) == 20.0
    assert twice.loader is loader


def test_numbers_stay_as_wide_as_jax_computes():
    batch = {"x": np.ones(2), "i": np.arange(2), "u": np.ones(2, np.uint8)}
    dtypes = {k: str(a.dtype) for k, a in data.as_host_batch(batch).items()}
    assert dtypes == {"x": "float32", "i": "int32", "u": "uint8"}
    with jax.enable_x64(True):
        wide = {k: str(a.dtype) for k, a in data.as_host_batch(batch).items()}
    assert wide == {"x": "float64", "i": "int64", "u": "uint8"}
