"""What can be told of other people's loaders by their attributes: workers, sizes, records.

Neither Grain nor PyTorch is imported. Imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import types
from collections.abc import Iterator
from typing import Any

_ONE_TO_ONE = ("MapMapDataset", "MapWithIndexMapDataset", "RandomMapMapDataset")
"""Grain's transformations that leave element `i` the element `i`."""


def close_iterator(iterator: Any) -> None:
    """End an iterator that owns threads or processes: a generator, or one of Grain.

    What else has a `close` may be the user's, and be read again.
    """
    if isinstance(iterator, types.GeneratorType) or is_of(type(iterator), "grain"):
        close = getattr(iterator, "close", None)
        # That of a `grain.DataLoader` has one inside.
        close = close or getattr(getattr(iterator, "_iterator", None), "close", None)
        # A generator that runs in a thread which is stuck cannot be closed.
        with contextlib.suppress(ValueError):
            if close is not None:
                close()


def is_of(kind: type, package: str) -> bool:
    """Return whether a class, or one it is made from, is a package's."""
    return any(t.__module__.partition(".")[0] == package for t in kind.__mro__)


def why_forked(loader: Any) -> str:
    """Return what is wrong with a PyTorch loader whose workers are forked, or an empty string.

    A fork copies the locks that JAX's threads hold, and no thread to release them.
    """
    is_torch = is_of(type(loader), "torch") and hasattr(loader, "multiprocessing_context")
    workers = getattr(loader, "num_workers", 0)
    if not is_torch or not workers or _start_method(loader.multiprocessing_context) != "fork":
        return ""
    return (
        f"a PyTorch {type(loader).__name__} with num_workers={workers}, which would fork this "
        "process; its copies of JAX's locks can wait for ever. Pass "
        "`DataLoader(..., multiprocessing_context='spawn')`, or `num_workers=0`."
    )


def _start_method(context: Any) -> str:
    if isinstance(context, str):
        return context
    if context is not None:
        return context.get_start_method()
    # The first one is the platform's default; to ask for the context would settle it.
    method = multiprocessing.get_start_method(allow_none=True)
    return method or multiprocessing.get_all_start_methods()[0]


def why_empty(loader: Any) -> str:
    """Return why a loader has no batch, with its sizes where it tells them."""
    samples, batch_size = _sizes(loader)
    if samples is None:
        found = ""
    elif batch_size is None:
        found = f"It reads {samples} samples. "
    else:
        found = f"It reads {samples} samples in batches of {batch_size}. "
    at_most = f", {samples} at most" if samples and batch_size and samples < batch_size else ""
    return (
        f"{found}One that drops its remainder is empty when there are fewer samples than a batch: "
        f"use a smaller batch size{at_most}."
    )


def _sizes(loader: Any) -> tuple[int | None, int | None]:
    """Return the samples and the batch size of a loader of Grain or PyTorch, where known."""
    dataset, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    for parent in _lineage(loader):
        dataset, size = parent, size or getattr(parent, "_batch_size", None)
    try:
        samples = None if dataset is None else len(dataset)
    except TypeError:
        samples = None
    return samples, size if isinstance(size, int) else None


def _lineage(loader: Any) -> Iterator[Any]:
    """Yield a Grain dataset and those it is made from, as long as that is one."""
    while is_of(type(loader), "grain"):
        yield loader
        parents = getattr(loader, "_parents", ())
        if len(parents) != 1:
            return
        (loader,) = parents


def failing_records(dataset: Any, index: int) -> str:
    """Return which records of a batch of a Grain `MapDataset` cannot be read, by reading each.

    Args:
        dataset: Made by `batch`, and perhaps mapped after it.
        index: Of the batch, counted on through the epochs.

    Returns:
        A note, or an empty string where it cannot be told.
    """
    lineage = (d for d in _lineage(dataset) if type(d).__name__ not in _ONE_TO_ONE)
    batches = next(lineage, None)
    size, parents = getattr(batches, "_batch_size", None), getattr(batches, "_parents", ())
    if batches is None or not size or len(parents) != 1:
        return ""
    (records,) = parents
    epoch, batch = divmod(index, len(batches))
    rows = range(batch * size, min((batch + 1) * size, len(records)))
    bad = [row for row in rows if not _can_read(records, epoch * len(records) + row)]
    names = ", ".join(map(str, bad))
    at = f"of samples {rows.start} to {rows.stop - 1} of the epoch"
    return f"{at}, {names} cannot be read" if bad else at


def _can_read(records: Any, index: int) -> bool:
    try:
        records[index]
    except Exception:
        return False
    return True
