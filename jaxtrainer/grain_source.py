"""Grain's `MapDataset` as a source of batches: random access, and only the rows of a process.

Grain is not imported before there is a dataset of it. May import levels 0 and 1.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxtrainer.rows import Held
from jaxtrainer.types import PyTree
from jaxtrainer.workers import close_iterator, failing_records


class MapSource:
    """A Grain `MapDataset`: random access, so that any position is reached at once.

    Args:
        dataset: Whose elements are batches.
        held: Which part of a batch of so many rows to read; None for all of it.
    """

    def __init__(self, dataset: Any, held: Callable[[int], Held | None] | None = None) -> None:
        # A dataset that the user repeated without end has one endless epoch.
        is_endless = len(dataset) > sys.maxsize // 2
        self.num_batches = None if is_endless else len(dataset)
        self._dataset, self._held = dataset, held
        read = dataset if held is None else rows_of_batches(dataset, held)
        self._endless = read if is_endless or not len(dataset) else read.repeat()

    def of_rows(self, held: Callable[[int], Held | None]) -> MapSource:
        """Return a source of the rows that are held, where the dataset says which records they are.

        That is where it ends in `.batch(n)`; of any other all rows are read.
        """
        if self.num_batches is None or not is_batched(self._dataset):
            return self
        return MapSource(self._dataset, held)

    def rows_of(self, batch_idx: int, num_read: int) -> int:
        """Return how many rows a batch of an epoch has, of which `num_read` were read."""
        if self._held is None:
            return num_read
        size = self._dataset._batch_size
        return min(len(self._dataset.parents[0]) - batch_idx * size, size)

    def sample(self, epoch: int, batch_idx: int) -> PyTree:
        """Return the first record of a batch, which every process may look at."""
        index = epoch * len(self._dataset.parents[0]) + batch_idx * self._dataset._batch_size
        return self._dataset.parents[0][index]

    @property
    def is_partial(self) -> bool:
        """Whether it yields a part of each batch only."""
        return self._held is not None

    def open(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[PyTree, Any]]:
        """See `Source.open`."""
        # Grain counts on through the epochs, and reshuffles at each multiple of the length.
        index = epoch * (self.num_batches or 0) + start
        iterator = iter(self._endless.to_iter_dataset())
        iterator.set_state({"next_index": index})
        rest = None if self.num_batches is None else self.num_batches - start
        try:
            for batch in itertools.islice(iterator, rest):
                yield batch, None
                index += 1
        except Exception as error:
            if note := failing_records(self._dataset, index):
                error.add_note(note)
            raise
        finally:
            close_iterator(iterator)


def is_batched(dataset: Any) -> bool:
    """Return whether the dataset's last operation is `.batch(n)`, which stacks records."""
    # By name, and by all that is used of it: another version of Grain may have another one.
    return (
        type(dataset).__name__ == "BatchMapDataset"
        and isinstance(getattr(dataset, "_batch_size", None), int)
        and getattr(getattr(dataset, "_batch_fn", None), "__name__", "") == "make_batch"
        and len(getattr(dataset, "parents", ())) == 1
    )


def rows_of_batches(batches: Any, held: Callable[[int], Held | None]) -> Any:
    """Return a dataset of the rows that a process holds of each batch; no other record is read."""
    import grain

    records, size, stack = batches.parents[0], batches._batch_size, batches._batch_fn
    num_records, num_batches = len(records), len(batches)

    class RowsOfBatches(grain.MapDataset[Any]):
        def __len__(self) -> int:
            return num_batches

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                return self.slice(index)
            epoch, batch = divmod(int(index), num_batches)
            start = batch * size
            part = held(min(num_records - start, size))
            rows = range(min(num_records - start, size)) if part is None else part.rows.tolist()
            first = epoch * num_records + start
            if not rows:
                # Of a short last batch there may be none: an empty batch of the right shapes.
                return jax.tree.map(lambda a: a[:0], stack([records[first]]))
            return stack([records[first + row] for row in rows])

    return RowsOfBatches(records)
