"""`Reread`: the first batches of a loader, read before training and trained on all the same.

A generator has no second beginning, and a loader that shuffles has another one. May import
levels 0 and 1.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxtrainer.data import IterableSource, OnDevice, open_source
from jaxtrainer.types import PyTree, StatefulIterator


class Reread:
    """A loader whose first epoch is read once, kept as far as it was read, and handed out again.

    Until `rewind` each iteration starts at the first batch of that epoch. The first iteration
    after it does so once more, and forgets each batch; later ones are the loader's own.

    Example:
        >>> loader = Reread(iter([{"x": 1}, {"x": 2}, {"x": 3}]))
        >>> next(iter(loader))
        {'x': 1}
        >>> loader.rewind()
        >>> [batch["x"] for batch in loader]
        [1, 2, 3]
    """

    def __init__(self, loader: Iterable[PyTree], iterator: Iterator[PyTree] | None = None) -> None:
        self.loader = loader
        self._rest = iter(loader) if iterator is None else iterator
        self._kept: deque[PyTree] = deque()
        self._keeps = True
        self._is_again = False

    def rewind(self) -> None:
        """Let the next iteration be the one that is trained on."""
        self._keeps, self._is_again = False, True

    def __iter__(self) -> Iterator[PyTree]:
        if self._keeps:
            return self._keep()
        if self._is_again:
            self._is_again = False
            return itertools.chain(self._forget(), self._rest)
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # pyright: ignore[reportArgumentType]

    def __getattr__(self, name: str) -> Any:
        # The position in the data is told by attributes of the user's loader, where it has them.
        return getattr(object.__getattribute__(self, "loader"), name)

    def _keep(self) -> Iterator[PyTree]:
        yield from tuple(self._kept)
        for batch in self._rest:
            # A loader that fills one buffer again and again would overwrite what is kept.
            copied = jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, batch)
            self._kept.append(copied)
            yield copied

    def _forget(self) -> Iterator[PyTree]:
        while self._kept:
            yield self._kept.popleft()


def rereadable(loader: Any) -> Any:
    """Return the loader, or a `Reread` in its place if reading it changes what comes next.

    Arrays in memory, lists and Grain's datasets begin again where they began.

    Raises:
        DataError: If it is no loader, or is empty.
    """
    inner = loader.loader if isinstance(loader, OnDevice) else loader
    is_iterable = isinstance(open_source(loader, "train"), IterableSource)
    if not is_iterable or isinstance(inner, list | tuple | Reread):
        return loader
    iterator = iter(inner)
    if isinstance(iterator, StatefulIterator):
        return loader
    reread = Reread(inner, iterator)
    return OnDevice(reread, loader.device_transform) if isinstance(loader, OnDevice) else reread


def rewind(loader: Any) -> None:
    """Let what was read of the loader be trained on, if it is a `Reread`."""
    inner = loader.loader if isinstance(loader, OnDevice) else loader
    if isinstance(inner, Reread):
        inner.rewind()
