"""`Table`: a text file with one line for each key, whole at every instant, also after a kill.

A line is written at once, in one call of the system. A later value of the same key replaces its
line by a longer one, as long as it is among the last ones. What has to be written anew is written
beside the file and renamed. Nothing is overwritten that another run has written.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrainer.loggers.logger import free_path
from jaxtrainer.records import AXES

Row = dict[str, Any]
_NUM_OPEN = 64
"""Lines at the end of the file that may still change."""


class Format(ABC):
    """How rows are written as text."""

    has_header = False

    @abstractmethod
    def key(self, row: Mapping[str, Any]) -> Hashable:
        """Return what a row is found by; two of the same are one."""

    @abstractmethod
    def line(self, row: Mapping[str, Any], columns: Sequence[str]) -> bytes:
        """Return the line of a row, with its end."""

    @abstractmethod
    def rows(self, text: str) -> list[Row]:
        """Return the rows of whole lines."""

    def header(self, columns: Sequence[str]) -> bytes:
        """Return what comes before the rows."""
        return b""


@dataclass
class _Line:
    row: Row
    text: bytes


class Table:
    """The open file.

    Args:
        path: The file; what is in it is gone on from.
        format: Its lines.
        until: Leave out rows of later steps; the file as it was is then kept beside, under
            another name.
    """

    def __init__(self, path: Path, format: Format, until: int | None = None) -> None:
        self.path = path
        self.format = format
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        # Of a disk that was full, or another writer, the last line may be a part of one.
        whole = text[: text.rfind(b"\n") + 1]
        found = format.rows(whole.decode("utf-8", errors="replace"))
        rows = [row for row in found if until is None or _step(row) <= until]
        columns = _columns(rows)
        content = self._content(rows, columns)
        if content != whole:
            _keep(path)
        self._take(rows, columns, None if content == text else content)

    def put(self, row: Row) -> None:
        """Write a row, or what it adds to the row of the same key."""
        if self.format.has_header and not row.keys() <= {*self.columns}:
            self._add_columns(row)
        key = self.format.key(row)
        if key in self._open_lines:
            self._replace(key, row)
            return
        line = _Line(row, self.format.line(row, self.columns))
        self._write(self._size, line.text)
        self._size += len(line.text)
        self._open_lines[key] = line
        if len(self._open_lines) > _NUM_OPEN:
            self._open_lines.pop(next(iter(self._open_lines)))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _replace(self, key: Hashable, row: Row) -> None:
        keys = [*self._open_lines]
        following = keys[keys.index(key) :]
        offset = self._size - sum(len(self._open_lines[k].text) for k in following)
        merged = {**self._open_lines[key].row, **_later(row)}
        line = _Line(merged, self.format.line(merged, self.columns))
        rest = [self._open_lines[k].text for k in following[1:]]
        text = b"".join([line.text, *rest])
        if offset + len(text) < self._size:
            # A value that is shorter now: the end of the file would be a piece of a line.
            rows = [merged if k == key else r for k, r in self._all_rows()]
            self._rewrite(rows, self.columns)
            return
        self._write(offset, text)
        self._size = offset + len(text)
        self._open_lines[key] = line

    def _add_columns(self, row: Row) -> None:
        rows = [found for _, found in self._all_rows()]
        self._rewrite(rows, _columns([dict.fromkeys(self.columns), row]))

    def _all_rows(self) -> list[tuple[Hashable, Row]]:
        rows = self.format.rows(self.path.read_text(encoding="utf-8"))
        return [(self.format.key(row), row) for row in rows]

    def _rewrite(self, rows: list[Row], columns: list[str]) -> None:
        if os.stat(self.path).st_ino != os.fstat(self._file).st_ino:
            raise OSError(f"{self.path} is the file of another run by now")
        before = self._file
        self._take(rows, columns, self._content(rows, columns))
        os.close(before)

    def _content(self, rows: list[Row], columns: list[str]) -> bytes:
        lines = b"".join(self.format.line(row, columns) for row in rows)
        return self.format.header(columns) + lines if columns else b""

    def _take(self, rows: list[Row], columns: list[str], content: bytes | None) -> None:
        """Open the file, with new content if any; if that fails nothing has changed."""
        if content is not None:
            new = self.path.with_name(f".{self.path.name}.tmp")
            new.write_bytes(content)
            new.replace(self.path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._size = os.fstat(self._file).st_size
        self.columns = columns
        last = [_Line(row, self.format.line(row, columns)) for row in rows[-_NUM_OPEN:]]
        self._open_lines = {self.format.key(line.row): line for line in last}

    def _write(self, offset: int, text: bytes) -> None:
        before = os.pread(self._file, len(text), offset)
        try:
            done = 0
            while done < len(text):
                done += os.pwrite(self._file, text[done:], offset + done)
        except OSError:
            # A full disk has taken a part of it: back to what was there, which needs no room.
            os.ftruncate(self._file, offset + len(before))
            os.pwrite(self._file, before, offset)
            raise


def _later(row: Row) -> Row:
    """Return what a later record of the same key adds: where it belongs says the first."""
    return {k: v for k, v in row.items() if k not in AXES}


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [*dict.fromkeys(name for row in rows for name in row)]


def _step(row: Row) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _keep(path: Path) -> None:
    """Keep the file as it is under another name."""
    if not path.stat().st_size:
        return
    kept = free_path(path)
    try:
        os.link(path, kept)
    except OSError:
        # A file system without links.
        shutil.copyfile(path, kept)
