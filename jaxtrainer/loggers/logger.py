"""`Logger`: where the records of a run go. May import `records` and what lies below it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrainer.errors import ConfigError, MissingExtraError, RunDirError
from jaxtrainer.records import Record
from jaxtrainer.remote import refuse_url


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the trainer, as a logger is told of it.

    Attributes:
        stage: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        resumed_step: Optimiser step that a `fit` goes on from; None where it starts anew.
    """

    stage: str
    resumed_step: int | None = None

    @property
    def is_new(self) -> bool:
        """Whether a run begins, so that what is there already is of another one."""
        return self.stage == "fit" and self.resumed_step is None


class Logger(ABC):
    """Base of all loggers.

    `open`, `write`, `flush` and `close` run in a thread of the logger's own, so that they may take
    their time, and fail: a record that cannot be written is tried again, and after five failures in
    a row the logger is left out for the rest of the call. A call without a record opens nothing.

    Attributes:
        directory: Directory of its files, which is looked at before anything compiles; None for
            a logger without.
        gather_s: Seconds for which records wait for others, to be written in one burst.
        flush_timeout_s: Seconds that the end of a call waits for the records that are left.

    Example:
        >>> class Print(Logger):
        ...     def write(self, record):
        ...         print(record)
    """

    directory: str | None = None
    gather_s: float = 0.0
    flush_timeout_s: float = 10.0

    def check(self, root: Path, call: Call) -> None:
        """Raise, before anything compiles, if this cannot work. Runs in the trainer's thread.

        Args:
            root: The trainer's `default_root_dir`, in which a relative directory is.
            call: What begins.
        """
        if self.directory is not None:
            probe(root / self.directory, type(self).__name__)

    def open(self, root: Path, call: Call) -> None:  # noqa: B027 (a logger may need none)
        """Make ready for records. Called again if it raises, as the others."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write a record; one of a kind unknown to it: nothing."""

    def flush(self) -> None:  # noqa: B027 (a logger may write each record at once)
        """After a burst of records: see that what `write` has taken outlives the process."""

    def close(self) -> None:  # noqa: B027 (a logger may need none)
        """Let go of what `open` has opened; the last record was an `End`, or it was left out."""


def probe(directory: Path, owner: str) -> None:
    """Make the directory, and raise RunDirError if nothing can be written in it."""
    file = directory / f".write_probe_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.touch()
        file.unlink()
    except OSError as error:
        raise RunDirError(
            f"cannot write in {directory} ({error}); pass `{owner}` a directory that can be "
            "written, or made."
        ) from error


def directory_of(owner: str, given: Any) -> str:
    """Return the directory that a logger was given.

    Raises:
        ConfigError: If it is none on a disk.
    """
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise ConfigError(f"{owner} needs a directory, got {given!r}; write `{owner}('runs/x')`.")
    refuse_url(owner, given)
    return os.fspath(given)


def missing(package: str, owner: str, extra: str) -> MissingExtraError:
    """Return the error that says what installs a package that a logger needs."""
    return MissingExtraError(
        f"{owner} needs {package}, which is not installed: `pip install 'jaxtrainer[{extra}]'`."
    )


def set_aside(path: Path) -> None:
    """Rename a file or directory of another run, if there is one: `x.csv` is kept as `x-1.csv`."""
    if os.path.lexists(path):
        path.rename(free_path(path))


def free_path(path: Path) -> Path:
    """Return the path, with a number if it is taken: `x-1.csv`, `x-2.csv`, ..."""
    number, free = 0, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
