"""What the tests of loggers share: a run that logs everything, and readers of what was written."""

from __future__ import annotations

import csv
import json
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrainer import History, Run
from jaxtrainer.loggers import Logger
from jaxtrainer.records import AXES, Record, Scalars
from tests import tiny

Points = dict[str, list[tuple[int, float]]]

PICTURES = np.linspace(0, 1, 5 * 4 * 6, dtype=np.float32).reshape(5, 4, 6)


class Talkative(tiny.Tiny):
    """Logs a picture, a histogram, a text and a number of its own after each validation."""

    def __init__(self, width: int = 8, api_key: str = "k-123456789", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.api_key = width, api_key

    def on_validation_epoch_end(self, run: Run) -> None:
        run.log("extra", 0.5 * run.global_step)
        run.log_image("drawings", PICTURES, columns=3)
        run.log_histogram("weights", np.arange(10.0))
        run.log_text("note", f"after step {run.global_step}")


class Keeps(Logger):
    """Keeps the records, and waits for `gate` before each."""

    flush_timeout_s = 20.0

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = 0

    def write(self, record: Record) -> None:
        self.gate.wait()
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1

    def of(self, kind: type[Record]) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]

    def points(self, kind: str) -> Points:
        found: Points = {}
        for record in self.of(Scalars):
            for name, value in record.values.items() if record.kind == kind else ():
                found.setdefault(name, []).append((record.axes.step, value))
        return found


def points_of(history: History, kind: str) -> Points:
    """The series of one kind: step and value, in the order of steps."""
    table = history.step if kind == "step" else history.epoch
    return {
        name: sorted(zip(series.steps, series.values, strict=True))
        for name, series in table.items()
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} <= {len(rows[0])}
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def read_lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    rows = [json.loads(x, parse_constant=refuse) for x in path.read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> Points:
    """The series in rows, as `points_of` has them."""
    found: Points = {}
    for row in rows:
        for name, value in row.items():
            if name not in (*AXES, "kind") and value != "":
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return {name: sorted(points) for name, points in found.items()}


def read_png(content: bytes) -> np.ndarray:
    """Pixels `[height, width, channels]` of a PNG without filters, its checksums compared."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0] == zlib.crc32(body)
        chunks[body[:4]], at = body[4:], at + 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8
    channels = {0: 1, 2: 3, 6: 4}[colour]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels)
