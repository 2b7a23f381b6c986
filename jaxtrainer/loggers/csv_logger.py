"""`CSVLogger`: scalars as two tables that any program reads."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrainer.errors import checks_options
from jaxtrainer.loggers.json_lines import axes_of, strict
from jaxtrainer.loggers.logger import Call, Logger, directory_of, set_aside
from jaxtrainer.loggers.table import Format, Row, Table
from jaxtrainer.records import AXES, HyperParameters, Record, Scalars

FILES = {"step": "steps.csv", "epoch": "epochs.csv"}
HYPERPARAMETERS = "hyperparameters.json"


class CSVLogger(Logger):
    """Write `steps.csv` and `epochs.csv`: a line for each step with values, a column a series.

    `steps.csv` has the values of single steps, `epochs.csv` exact means and what hooks log. Their
    first columns are `step`, `epoch`, `samples`, `elapsed_s` (of the run) and `unix_time_s`. A
    series without a value at a step has an empty field. A series that comes later gets a column
    of its own: the file is written anew and renamed, so that it is whole at every instant. The
    hyper-parameters are in `hyperparameters.json`. Pictures, histograms and texts are left to
    other loggers.

    A resumed run goes on in the files; lines of steps after the one it resumes from are left out,
    and the file as it was is kept as `steps-1.csv`. So is that of another run.

    Args:
        directory: Where to; a run directory of `Checkpoint` may be the same.

    Raises:
        ConfigError: If it is no directory on a disk.

    Example:
        >>> logger = CSVLogger("runs/mnist")  # Trainer(logger=logger)
    """

    @checks_options
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = directory_of("CSVLogger", directory)
        self._folder = Path()
        self._call = Call(stage="fit")
        self._tables: dict[str, Table] = {}

    def open(self, root: Path, call: Call) -> None:
        """Find the place; a file is opened for its first values."""
        self._folder, self._call = root / str(self.directory), call
        for name in (*FILES.values(), HYPERPARAMETERS) if call.is_new else ():
            set_aside(self._folder / name)
        for kind, name in FILES.items():
            if (self._folder / name).exists():
                self._open(kind)

    def write(self, record: Record) -> None:
        """Write its line; what has no scalars is left out."""
        if isinstance(record, Scalars):
            if record.kind not in self._tables:
                self._open(record.kind)
            self._tables[record.kind].put({**axes_of(record.axes), **record.values})
        elif isinstance(record, HyperParameters):
            self._folder.mkdir(parents=True, exist_ok=True)
            new = self._folder / f".{HYPERPARAMETERS}.tmp"
            new.write_text(json.dumps(strict(record.values), indent=1) + "\n", encoding="utf-8")
            new.replace(self._folder / HYPERPARAMETERS)

    def close(self) -> None:
        """Close the files."""
        while self._tables:
            self._tables.popitem()[1].close()

    def _open(self, kind: str) -> None:
        path = self._folder / FILES[kind]
        self._tables[kind] = Table(path, _Csv(), until=self._call.resumed_step)


class _Csv(Format):
    has_header = True

    def key(self, row: Mapping[str, Any]) -> Hashable:
        return row["step"]

    def header(self, columns: Sequence[str]) -> bytes:
        return _line(columns)

    def line(self, row: Mapping[str, Any], columns: Sequence[str]) -> bytes:
        return _line([row.get(name, "") for name in columns])

    def rows(self, text: str) -> list[Row]:
        reader = csv.reader(io.StringIO(text, newline=""))
        columns = next(reader, [])
        return [_row(columns, fields) for fields in reader if len(fields) == len(columns)]


def _line(fields: Sequence[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode(errors="backslashreplace")


def _row(columns: Sequence[str], fields: Sequence[str]) -> Row:
    known = zip(columns, fields, strict=True)
    row: Row = {name: field for name, field in known if field}
    # Numbers stay the text that they were, but for what is compared.
    return {k: int(v) if k in AXES[:3] else v for k, v in row.items()}
