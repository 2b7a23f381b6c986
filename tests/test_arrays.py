"""Arrays in memory as a Grain dataset: Grain's own methods work on it, and keep what it knows."""

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
