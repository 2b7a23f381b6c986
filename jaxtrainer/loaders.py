"""Several loaders in one call: by name, and what their series are called.

May import levels 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np

from jaxtrainer.errors import DataError
from jaxtrainer.metrics import MetricSpec, Totals

T = TypeVar("T")


# Series with a `_` first are private, and a callback may name a directory after the loader.
_NAME = r"[^_./\\][^/\\]*"


def loaders_by_name(loader: Any, stage: str) -> dict[str | None, Any]:
    """Return the loaders that a call was given, by name; a single one has the name None.

    A dict is one of loaders unless a value is an array: then it is a batch, which the feed
    refuses with a better hint.

    Args:
        loader: What was passed.
        stage: For messages.

    Raises:
        DataError: For a dict that is empty, a name that no series can have, or loaders in a list.
    """
    if isinstance(loader, list | tuple) and loader and all(_is_loader(x) for x in loader):
        named = ", ".join(f"'name_{i}': loader_{i}" for i in range(len(loader)))
        raise DataError(
            f"the {stage} loader is a {type(loader).__name__} of {len(loader)} loaders; give them "
            f"names, which their series then have: `{{{named}}}`."
        )
    if not isinstance(loader, Mapping) or any(_is_array(x) for x in loader.values()):
        return {None: loader}
    if not loader:
        raise DataError(f"the {stage} loaders are an empty dict; pass e.g. `{{'clean': loader}}`.")
    for name in loader:
        if not isinstance(name, str) or not re.fullmatch(_NAME, name):
            raise DataError(
                f"a {stage} loader is called {name!r}; use a name for its series, e.g. 'clean' for "
                "`val/clean/loss`: not empty, without '/', and with no '_' or '.' first."
            )
    return dict(loader)


def refuse_several(loader: Any) -> None:
    """Raise DataError for several training loaders: they make one stream of batches."""
    values = list(loader.values()) if isinstance(loader, Mapping) else loader
    if isinstance(values, list | tuple) and values and all(_is_loader(x) for x in values):
        raise DataError(
            f"the train loader is a {type(loader).__name__} of {len(values)} loaders; training "
            "takes one. Mix them into it, e.g. `grain.MapDataset.mix([a, b], weights=[1, 1])`."
        )


def _is_loader(value: Any) -> bool:
    """Return whether a value is an object that makes batches, and no part of a batch."""
    is_leaf = jax.tree_util.all_leaves([value]) and not _is_array(value)
    return is_leaf and hasattr(value, "__iter__") and not isinstance(value, str | bytes)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | int | float)


def series_of_loader(series: str, loader: str | None) -> str:
    """Return what a series is called when it is of one loader of several.

    The loader's name comes after the first part: `val/loss` is `val/clean/loss`. A series without
    a `/` has it behind: `val_loss/clean`.

    Example:
        >>> series_of_loader("val/loss", "clean"), series_of_loader("val_loss", "clean")
        ('val/clean/loss', 'val_loss/clean')
    """
    if loader is None:
        return series
    first, *rest = series.split("/")
    return "/".join([first, loader, *rest])


def of_all_loaders(metrics: Mapping[str, T], series: str) -> dict[str, T]:
    """Return the values of a series: its own, and those of the single loaders.

    Example:
        >>> of_all_loaders({"val/clean/loss": 1.0, "val/noisy/loss": 3.0}, "val/loss")
        {'val/clean/loss': 1.0, 'val/noisy/loss': 3.0}
    """
    first, *rest = series.split("/")
    return {
        name: value
        for name, value in metrics.items()
        if name == series or (name.startswith(f"{first}/") and name.split("/")[2:] == rest)
    }


def totals_of_loader(specs: tuple[MetricSpec, ...], loader: str | None) -> Totals:
    """Return the totals of what a step logs, as the series of one loader."""
    named = (replace(spec, name=series_of_loader(spec.name, loader)) for spec in specs)
    return Totals(tuple(named))
