"""One writer to a run directory: a lock file that says which process on which host it is.

Imports `errors` only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from functools import singledispatch
from pathlib import Path
from typing import Any, Protocol

from jaxtrainer.errors import RunDirError

NAME = ".lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Lock(Protocol):
    """What keeps other runs out of a run directory."""

    def acquire(self) -> None:
        """Take it, or raise RunDirError."""

    def check(self) -> None:
        """Raise RunDirError if another run has taken it over."""

    def release(self) -> None:
        """Give it back, if it is held."""


class RunLock:
    """The lock of a run directory, held from `acquire` to `release`.

    A lock that a dead process of this host has left is taken over. A process on another host
    cannot be asked whether it lives, so that its lock is refused.

    Args:
        directory: An existing directory.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self._text = ""

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunDirError: If somebody else has it, saying who.
        """
        text = json.dumps(this_process())
        while not _create(self.path, text):
            found = _read(self.path)
            if (owner := owner_in(found)) is not None and is_alive(owner):
                raise RunDirError(in_use(self.path, owner))
            _take_away(self.path, found)
        self._text = text

    def check(self) -> None:
        """Do nothing: that of a living process is never taken over."""

    def release(self) -> None:
        """Give it back, if it is held."""
        # On a disk that has become read-only it stays, and the next run takes it over.
        with contextlib.suppress(OSError):
            if self._text and _read(self.path) == self._text:
                self.path.unlink()
        self._text = ""


@singledispatch
def lock_of(directory: Path) -> Lock:
    """Return the lock of a run directory; `places.py` says what it is in an object store."""
    return RunLock(directory)


def _create(path: Path, text: str) -> bool:
    """Make the file with its content, in one step; return False if there is one."""
    draft = path.with_name(f"{path.name}_{os.getpid()}")
    try:
        draft.write_text(text)
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links, or one that is full.
        return _create_by_open(path, text)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return True


def _create_by_open(path: Path, text: str) -> bool:
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunDirError(f"cannot write {path}: {error}") from error
    return True


def _take_away(path: Path, stale: str) -> None:
    aside = path.with_name(f"{path.name}_{os.getpid()}_stale")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside) != stale and not path.exists():
            # Somebody took it over first, and has it now.
            aside.rename(path)
    aside.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunDirError(f"cannot read {path}, which says who writes there: {error}") from error


def owner_in(text: str) -> dict[str, Any] | None:
    """Return who holds the lock; None if it says nothing, as one that a power loss cut short."""
    with contextlib.suppress(ValueError):
        owner = json.loads(text)
        if isinstance(owner, dict) and isinstance(owner.get("pid"), int):
            return owner
    return None


def this_process() -> dict[str, Any]:
    """Return what tells this process from any other."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else None
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": boot, "pid": pid, "started": _started(pid)}


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; None if it is dead or unknown."""
    try:
        # The name of the program before it may hold anything, brackets too.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # One that waits for its parent to take notice is dead, too.
    return None if fields[0] in "ZX" else fields[19]


def is_alive(owner: dict[str, Any]) -> bool:
    """Return whether a process lives, or may do so, because it is of another host."""
    here = this_process()
    if owner.get("host") != here["host"]:
        return True
    if owner.get("boot") != here["boot"]:
        return False
    if here["started"] is not None:
        # The number alone may be another process by now.
        return _started(owner["pid"]) == owner.get("started") is not None
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def in_use(path: str | os.PathLike[str], owner: dict[str, Any]) -> str:
    """Return what to tell who wanted the lock."""
    who = f"process {owner['pid']} on {owner.get('host')}"
    text = (
        f"{os.path.dirname(path)} is being written by {who}: two runs would delete each other's "
        "files. "
    )
    if owner["pid"] == os.getpid() and owner.get("host") == socket.gethostname():
        return text + "That is this process: give each `Checkpoint` a directory of its own."
    if owner.get("host") == socket.gethostname():
        return text + "Wait for it or end it, or give this run a directory of its own."
    return text + f"If it has ended, delete {path}; or give this run a directory of its own."
