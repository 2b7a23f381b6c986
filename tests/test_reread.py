"""A loader read ahead before training: nothing is lost, nothing is read twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
import pytest

from jaxtrainer import data
from jaxtrainer.errors import DataError
from jaxtrainer.reread import Reread, rereadable, rewind
from tests import tiny


def numbers(count: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches in one buffer that is filled again and again."""
    buffer = np.zeros(1)
    for i in range(count):
        buffer[:] = i
        yield {"x": buffer}


def read(loader: Any, count: int | None = None) -> list[int]:
    found = []
    for batch in loader:
        found.append(int(batch["x"][0]))
        if len(found) == count:
            break
    return found


def test_reread_begins_at_the_first_batch_until_it_is_rewound():
    loader = Reread(numbers(5))
    assert read(loader, 3) == [0, 1, 2]
    assert read(loader, 2) == [0, 1]
    loader.rewind()
    assert read(loader) == [0, 1, 2, 3, 4]


def test_reread_begins_again_after_the_last_batch():
    loader = Reread(numbers(3))
    assert read(loader) == read(loader) == [0, 1, 2]


def test_reread_passes_on_later_epochs():
    class Epochs:
        epoch = 0

        def __iter__(self) -> Iterator[Any]:
            self.epoch += 1
            return iter([{"x": np.array([10 * self.epoch + i])} for i in range(2)])

    loader = Reread(Epochs())
    assert read(loader, 1) == [10]
    loader.rewind()
    assert [read(loader) for _ in range(3)] == [[10, 11], [20, 21], [30, 31]]


def test_reread_forgets_what_is_trained_on():
    loader = Reread(numbers(5))
    read(loader)
    loader.rewind()
    assert len(loader._kept) == 5
    read(loader)
    assert not loader._kept


def test_loaders_that_begin_where_they_began_stay_as_they_are():
    dataset = grain.MapDataset.source([{"x": np.zeros(1)}] * 4).batch(2)
    loaders = [tiny.make_loader(), tiny.make_batches(2), dataset, dataset.to_iter_dataset()]
    assert all(rereadable(loader) is loader for loader in loaders)


def test_other_loaders_are_wrapped_once_with_their_transform():
    loader = rereadable(data.on_device(numbers(3), lambda batch: {"x": batch["x"] + 1}))
    assert rereadable(loader) is loader
    assert loader.device_transform({"x": 1}) == {"x": 2}
    assert read(loader, 2) == [0, 1]
    rewind(loader)
    assert read(loader) == [0, 1, 2]


def test_wrapped_loader_has_the_length_and_attributes_of_its_own():
    class Sized:
        num_samples = 6

        def __iter__(self) -> Iterator[Any]:
            return numbers(3)

        def __len__(self) -> int:
            return 3

    loader = rereadable(Sized())
    assert (len(loader), loader.num_samples) == (3, 6)
    with pytest.raises(AttributeError):
        loader.order_seed  # noqa: B018


def test_what_is_no_loader_is_refused_as_in_fit():
    with pytest.raises(DataError, match="expected an iterable of batches"):
        rereadable(3)
