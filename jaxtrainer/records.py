"""What loggers get: scalars, images, histograms, texts, hyper-parameters; checked when made.

Imports NumPy, `errors` and `png` only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from jaxtrainer.errors import LogError
from jaxtrainer.png import encode_png

AXES = ("step", "epoch", "samples", "elapsed_s", "unix_time_s")
_RESERVED = (*AXES, "kind")
_BINS = 64
_SLACK = 1e-3
"""What rounding may add to a pixel: a sigmoid in bfloat16 goes past 1 by less."""


def unix_time_s() -> float:
    """Return the wall clock, in seconds since 1970: to be written down, and for nothing else."""
    return time.time()


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Where a record belongs.

    Attributes:
        step: Optimiser updates.
        epoch: Index of the epoch.
        samples: Samples trained on.
        elapsed_s: Seconds of the run when it was recorded, those before a resume included.
        unix_time_s: The wall clock then, in seconds since 1970.
    """

    step: int
    epoch: int
    samples: int
    elapsed_s: float
    unix_time_s: float = field(default_factory=unix_time_s)


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """Values of series.

    Attributes:
        kind: `"step"`, or `"epoch"` for exact means and what hooks log.
        values: By series; one called as an axis is `logged/<name>`.
        forked: Series that have values of both kinds.
    """

    axes: Axes
    kind: Literal["step", "epoch"]
    values: Mapping[str, float]
    forked: frozenset[str] = frozenset()

    @property
    def tagged(self) -> dict[str, float]:
        """The values by names that tell the kinds apart: the mean of `x` is `x_epoch`."""
        means = self.forked if self.kind == "epoch" else ()
        return {f"{n}_epoch" if n in means else n: v for n, v in self.values.items()}


@dataclass(frozen=True, kw_only=True)
class Image:
    """A picture: `pixels` `[height, width, channels]`, uint8, channels 1, 3 or 4 (RGBA)."""

    axes: Axes
    name: str
    pixels: np.ndarray

    @cached_property
    def png(self) -> bytes:
        """The file, encoded once for all loggers."""
        return encode_png(self.pixels)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often values fell between `edges` `[bins + 1]`; `counts` is `[bins]`, both float64."""

    axes: Axes
    name: str
    counts: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text; where it can be shown as Markdown it is."""

    axes: Axes
    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class HyperParameters:
    """Nested plain data: what module and trainer were made with."""

    axes: Axes
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of a call, with the newest value of every series.

    Attributes:
        status: `"finished"`, `"interrupted"` or `"failed"`.
        reason: `run.stop_reason`, or the name of the exception.
    """

    axes: Axes
    status: str
    reason: str
    metrics: Mapping[str, float]


Record: TypeAlias = Scalars | Image | Histogram | Text | HyperParameters | End


def scalars(axes: Axes, kind: Any, values: Mapping[str, float], forked: set[str]) -> Scalars:
    """Return a record of values, none of them called as an axis."""
    named = {f"logged/{n}" if n in _RESERVED else n: float(v) for n, v in values.items()}
    return Scalars(axes=axes, kind=kind, values=named, forked=frozenset(forked & values.keys()))


def image(axes: Axes, name: str, value: Any, columns: int | None) -> Image:
    """Return a picture, or several as one grid.

    Args:
        axes: Where it belongs.
        name: Its series.
        value: One, `[height, width]` or `[height, width, channels]`; with `columns` several,
            `[n, height, width]` or `[n, height, width, channels]`. uint8, or floats from 0 to 1.
        columns: Pictures in a row of the grid.

    Raises:
        LogError: For another shape, dtype or range.
    """
    what = f"log_image({_checked_name(name)!r})"
    array = _array(what, value)
    several = columns is not None
    if several and (not isinstance(columns, int) or columns < 1):
        raise LogError(f"{what}: columns must be an integer of at least 1, got {columns!r}.")
    if array.ndim == 2 + several:
        array = array[..., None]
    if array.ndim != 3 + several or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        wanted = (
            "[n, height, width(, channels)] with `columns=`"
            if several
            else ("[height, width] or [height, width, channels]")
        )
        hint = "" if several or array.ndim < 3 else "; for several pictures pass `columns=10`"
        raise LogError(
            f"{what}: expected {wanted}, channels 1, 3 or 4, got shape {np.shape(value)}{hint}."
        )
    pixels = _pixels(what, array)
    return Image(axes=axes, name=name, pixels=pixels if columns is None else grid(pixels, columns))


def grid(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Lay pictures `[n, height, width, channels]` side by side; what is left over is 0."""
    n, height, width, channels = pixels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    full = np.zeros((rows * columns, height, width, channels), pixels.dtype)
    full[:n] = pixels
    tiles = full.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return tiles.reshape(rows * height, columns * width, channels)


def histogram(axes: Axes, name: str, values: Any, edges: Any) -> Histogram:
    """Count values, or take counts between given edges.

    Args:
        axes: Where it belongs.
        name: Its series.
        values: An array of numbers of any shape, of which those that are not finite are left
            out; with `edges` counts, `[bins]`.
        edges: Rising, `[bins + 1]`; the last one may be infinite.

    Raises:
        LogError: For no numbers, or edges that do not fit.
    """
    what = f"log_histogram({_checked_name(name)!r})"
    array = _array(what, values)
    if array.dtype.kind not in "biuf" or not array.size:
        raise LogError(
            f"{what}: expected numbers, got {array.dtype} of shape {array.shape}; pass an array."
        )
    array = array.astype(np.float64)
    if edges is None:
        counts, edges = np.histogram(array[np.isfinite(array)], bins=_BINS)
        return Histogram(axes=axes, name=name, counts=counts.astype(np.float64), edges=edges)
    edges = np.asarray(edges, np.float64)
    if array.ndim != 1 or edges.shape != (len(array) + 1,) or not (np.diff(edges) > 0).all():
        raise LogError(
            f"{what}: with `edges` the values are counts, one fewer than rising edges; got counts "
            f"of shape {array.shape} and edges of shape {edges.shape}."
        )
    return Histogram(axes=axes, name=name, counts=array, edges=edges)


def text(axes: Axes, name: str, value: Any) -> Text:
    """Return a text; raise LogError for what is none."""
    if not isinstance(value, str):
        raise LogError(
            f"log_text({_checked_name(name)!r}): expected a string, got {type(value).__name__}; "
            "pass `str(value)`."
        )
    return Text(axes=axes, name=_checked_name(name), text=value)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise LogError(f"a series is named by a string of one line, got {name!r}.")
    return name


def _array(what: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception as error:
        raise LogError(f"{what}: {type(value).__name__} is no array: {error}") from error
    # bfloat16 and its like are floats that NumPy does not know as such.
    is_float = array.dtype.kind == "V" and array.dtype.names is None
    return array.astype(np.float32) if is_float else array


def _pixels(what: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array.copy()
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind != "f":
        raise LogError(
            f"{what}: pixels are uint8, or floats from 0 to 1; got {array.dtype}. Write e.g. "
            "`image.astype(np.uint8)`."
        )
    low, high = float(array.min()), float(array.max())
    # NaN is not within anything.
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise LogError(
            f"{what}: floats are from 0 to 1, got values from {low:g} to {high:g}. Scale them, "
            "e.g. `(image - image.min()) / np.ptp(image)`, or cut them off with `np.clip`."
        )
    return np.round(255 * np.clip(array, 0, 1)).astype(np.uint8)
