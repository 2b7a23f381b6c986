"""`JSONLinesLogger`: everything as lines of JSON, pictures as PNG files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrainer.errors import checks_options
from jaxtrainer.loggers.logger import Call, Logger, directory_of, free_path, set_aside
from jaxtrainer.loggers.table import Format, Row, Table
from jaxtrainer.records import (
    AXES,
    Axes,
    End,
    Histogram,
    HyperParameters,
    Image,
    Record,
    Scalars,
    Text,
)

FILE, IMAGES = "metrics.jsonl", "images"
_UNKNOWN = re.compile(r"[^\w.-]+")


class JSONLinesLogger(Logger):
    """Write every record as a line of `metrics.jsonl`, and every picture as a PNG in `images/`.

    A line is a JSON object with `kind` and the axes `step`, `epoch`, `samples`, `elapsed_s` (of
    the run) and `unix_time_s`. There is one line of kind `"step"` for each reported step, and one
    of kind `"epoch"` for each step with exact means or values of hooks; both have the values by
    series. Other kinds are `"hyperparameters"`, `"image"` (its `file`), `"histogram"` (`counts`,
    `edges`), `"text"` and `"end"`. Numbers that JSON lacks are the strings `"NaN"`, `"Infinity"`
    and `"-Infinity"`, which `float` understands.

    A resumed run goes on in the file; lines of steps after the one it resumes from are left out,
    and the file as it was is kept as `metrics-1.jsonl`. So is that of another run.

    Args:
        directory: Where to; a run directory of `Checkpoint` may be the same.

    Raises:
        ConfigError: If it is no directory on a disk.

    Example:
        >>> logger = JSONLinesLogger("runs/mnist")  # Trainer(logger=logger)
    """

    @checks_options
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = directory_of("JSONLinesLogger", directory)
        self._table: Table | None = None
        self._folder = Path()

    def open(self, root: Path, call: Call) -> None:
        """Go on with the file, or begin one."""
        self._folder = root / str(self.directory)
        if call.is_new:
            set_aside(self._folder / FILE)
            set_aside(self._folder / IMAGES)
        self._table = Table(self._folder / FILE, _Json(), until=call.resumed_step)

    def write(self, record: Record) -> None:
        """Write its line."""
        row = _row(record)
        if isinstance(record, Image):
            row["file"] = self._write_image(record)
        if self._table is not None:
            self._table.put(row)

    def close(self) -> None:
        """Close the file."""
        table, self._table = self._table, None
        if table is not None:
            table.close()

    def _write_image(self, record: Image) -> str:
        folder = self._folder / IMAGES
        folder.mkdir(exist_ok=True)
        name = _UNKNOWN.sub("_", record.name)
        path = free_path(folder / f"{name}_{record.axes.step}.png")
        new = path.with_name(f".{path.name}.tmp")
        new.write_bytes(record.png)
        new.replace(path)
        return f"{IMAGES}/{path.name}"


class _Json(Format):
    def key(self, row: Mapping[str, Any]) -> Hashable:
        kind, step = row.get("kind"), row.get("step")
        # Of hyper-parameters and ends each is another one.
        return kind, step, None if kind in ("step", "epoch") else repr(row)

    def line(self, row: Mapping[str, Any], columns: Sequence[str]) -> bytes:
        return json.dumps(strict(row), allow_nan=False).encode() + b"\n"

    def rows(self, text: str) -> list[Row]:
        return [row for line in text.split("\n") if (row := _parsed(line)) is not None]


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def axes_of(axes: Axes) -> Row:
    """Return the axes by name."""
    return {name: getattr(axes, name) for name in AXES}


def strict(value: Any) -> Any:
    """Return JSON data without the numbers that JSON lacks.

    Example:
        >>> strict({"loss": float("nan"), "edges": [0.0, float("inf")]})
        {'loss': 'NaN', 'edges': [0.0, 'Infinity']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    return [strict(v) for v in value] if isinstance(value, list | tuple) else value


def _row(record: Record) -> Row:
    axes = axes_of(record.axes)
    match record:
        case Scalars():
            return {"kind": record.kind, **axes, **record.values}
        case Image():
            return {"kind": "image", **axes, "name": record.name}
        case Histogram():
            counts, edges = record.counts.tolist(), record.edges.tolist()
            return {"kind": "histogram", **axes, "name": record.name} | {
                "counts": counts,
                "edges": edges,
            }
        case Text():
            return {"kind": "text", **axes, "name": record.name, "text": record.text}
        case HyperParameters():
            return {"kind": "hyperparameters", **axes, "values": dict(record.values)}
        case End():
            status = {"status": record.status, "reason": record.reason}
            return {"kind": "end", **axes, **status, "metrics": dict(record.metrics)}
