"""Where a run directory is: on a disk, or in an object store, and what it does there.

For a disk `rundir.py` and `lock.py` say that; here the same is said for a `RemotePath`, whose
directories cannot appear by one rename. A step is complete when it has the file that Orbax marks
one with, which is written last and deleted first. What is on the way carries a note from before its
first object to after its last, so that only what a run left itself is ever removed. Orbax works on
a copy on the disk, because it writes no arrays to `s3://`. May import levels 0 and 1.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from jaxtrainer.errors import CheckpointError, ConfigError, RunDirError
from jaxtrainer.lease import Lease
from jaxtrainer.lock import lock_of
from jaxtrainer.remote import STORES, RemotePath, is_url, parse_url
from jaxtrainer.rundir import (
    PREFIX,
    check_space,
    clean,
    fetched,
    has_item,
    probe,
    publish,
    remove_step,
    saved_steps,
    set_aside,
    step_of,
    step_path,
    sync_step,
    work_path,
)

MARKER = "commit_success.txt"
"""Orbax's name for it: what it has written to an object store itself is read, too."""

_NOTE = ".unfinished_"
_LOST_SLASH = re.compile(rf"({'|'.join(STORES)}):/[^/]")
_PROBE = re.compile(r"\.write_probe_[0-9]+")


def place(path: str | os.PathLike[str]) -> Path:
    """Return a path as it is used: absolute, or a `RemotePath`, which has what is used of `Path`.

    Raises:
        ConfigError, MissingExtraError: As `check_place`.
    """
    return cast(Path, check_place(path) or Path(path).absolute())


def check_place(path: str | os.PathLike[str]) -> RemotePath | None:
    """Return what a path means that is a URL, and None for others.

    Raises:
        ConfigError: If it is a URL, but none of a directory in a known object store.
        MissingExtraError: If what talks to that store is not installed.
    """
    text = os.fspath(path)
    if lost := _LOST_SLASH.match(text):
        url = f"{lost[1]}://{text[len(lost[1]) + 2 :]}"
        raise ConfigError(f"{text!r} has lost a slash, as in a `Path`; pass the string {url!r}.")
    return parse_url(text) if is_url(text) else None


def placed(root: Path, given: str) -> str:
    """Return a callback's directory below a root, unless it says itself where it is."""
    return given if is_url(given) else str(root / given)


@saved_steps.register(RemotePath)
def _saved_steps(directory: RemotePath) -> list[int]:
    found = [name.split("/") for name in directory.files(f"{PREFIX}_")]
    steps = [step_of(parts[0]) for parts in found if parts[1:] == [MARKER]]
    return sorted(step for step in steps if step is not None)


@has_item.register(RemotePath)
def _has_item(path: RemotePath, item: str) -> bool:
    names = path.files()
    return MARKER in names and any(name.startswith(f"{item}/") for name in names)


@probe.register(RemotePath)
def _probe(directory: RemotePath) -> None:
    name = f".write_probe_{os.getpid()}"
    try:
        (directory / name).write_bytes(b"x")
        directory.remove([name])
    except FileNotFoundError as error:
        raise RunDirError(f"cannot write in {directory}: {error}; is there a bucket?") from error


@check_space.register(RemotePath)
def _check_space(directory: RemotePath, needed: int) -> None:
    free = shutil.disk_usage(_staging()).free
    if free < needed:
        raise RunDirError(
            f"a checkpoint takes about {needed / 1e6:.1f} MB, and is put together in {_staging()}, "
            f"which has {free / 1e6:.1f} MB free, before it goes to {directory}. Make room, or set "
            "TMPDIR to a directory on another disk."
        )


@work_path.register(RemotePath)
def _work_path(directory: RemotePath, step: int) -> Path:
    return step_path(_staging() / _digest(str(directory)), step)


@publish.register(RemotePath)
def _publish(directory: RemotePath, step: int) -> None:
    local, remote = _work_path(directory, step), directory / f"{PREFIX}_{step}"
    if strange := remote.files():
        raise FileExistsError(f"{remote} has files already, such as {strange[0]}")
    note = directory / f"{_NOTE}{remote.name}"
    note.write_bytes(b"")
    files = [str(p.relative_to(local)) for p in sorted(local.rglob("*")) if p.is_file()]
    remote.upload(local, [name for name in files if name != MARKER])
    (remote / MARKER).write_bytes(b"complete")
    # It is there now, whatever comes; a note that stays is removed by the next run.
    with contextlib.suppress(CheckpointError):
        directory.remove([note.name])
    shutil.rmtree(local, ignore_errors=True)


@clean.register(RemotePath)
def _clean(directory: RemotePath, step: int | None = None) -> list[str]:
    shutil.rmtree(_work_path(directory, 0).parent, ignore_errors=True)
    failed: list[str] = []
    try:
        found = [path.name for path in directory.iterdir()]
        directory.remove([name for name in found if _PROBE.fullmatch(name)])
    except CheckpointError as error:
        return [f"{directory} was not looked through for leftovers: {error}"]
    for name in found:
        left = step_of(name.removeprefix(_NOTE)) if name.startswith(_NOTE) else None
        if left is not None and step in (None, left):
            failed += _finished(directory, left)
    return failed


@remove_step.register(RemotePath)
def _remove_step(directory: RemotePath, step: int) -> list[str]:
    name = f"{PREFIX}_{step}"
    try:
        (directory / f"{_NOTE}{name}").write_bytes(b"")
        directory.remove([f"{name}/{MARKER}"])
    except (CheckpointError, OSError) as error:
        return [f"{directory / name} could not be deleted: {error}"]
    return _finished(directory, step)


@set_aside.register(RemotePath)
def _set_aside(directory: RemotePath, steps: Iterable[int]) -> list[str]:
    lines = []
    for step in steps:
        path = directory / f"{PREFIX}_{step}"
        number, kept = 1, directory / f"damaged_{path.name}"
        while kept.is_dir():
            number += 1
            kept = directory / f"damaged_{path.name}-{number}"
        path.copy_to(kept, path.files())
        lines.append(f"{path.name} is damaged, and kept as {kept}")
        lines += _remove_step(directory, step)
    return lines


@sync_step.register(RemotePath)
def _sync_step(directory: RemotePath, step: int) -> None:
    """Do nothing: an object that was accepted is durable."""


@fetched.register(RemotePath)
@contextlib.contextmanager
def _fetched(path: RemotePath, items: Iterable[str]) -> Iterator[Path]:
    wanted = {*items}
    names = [n for n in path.files() if "/" not in n or n.partition("/")[0] in wanted]
    with tempfile.TemporaryDirectory(dir=_staging()) as folder:
        local = Path(folder, path.name)
        path.download(names, local)
        yield local


lock_of.register(RemotePath, Lease)


def _finished(directory: RemotePath, step: int) -> list[str]:
    """End what a note is about: a step without its marker is one to remove."""
    name = f"{PREFIX}_{step}"
    path = directory / name
    try:
        if MARKER not in (files := path.files()):
            path.remove(files)
        directory.remove([f"{_NOTE}{name}"])
    except (CheckpointError, OSError) as error:
        return [f"{path} could not be deleted: {error}"]
    return []


@functools.cache
def _staging() -> Path:
    """Return a folder of this process for the copies on the disk; TMPDIR says where."""
    folder = Path(tempfile.mkdtemp(prefix="jaxtrainer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
