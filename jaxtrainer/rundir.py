"""The files of a run directory: which steps it has, what of it may be deleted, and how.

A step directory appears and disappears by one rename, so that at every instant one of that name
is complete. Nothing outside the directory is touched, and no symbolic link followed. For a run
directory in an object store `places.py` has these functions once more. Imports `errors` only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import singledispatch
from pathlib import Path

from jaxtrainer.errors import RunDirError

PREFIX = "step"
_STEP_DIR = re.compile(rf"{PREFIX}_(0|[1-9][0-9]*)")
_DELETED = ".deleted_"
_LEFTOVER = re.compile(
    rf"{PREFIX}_[0-9]+\.orbax-checkpoint-tmp.*|\.deleted_{PREFIX}_[0-9]+.*"
    r"|\.write_probe_[0-9]+|\.lock_[0-9]+\w*"
)
"""What a run that was killed may leave: a save that has not ended, or a deletion."""


def step_path(directory: Path, step: int) -> Path:
    """Return the directory of a step."""
    return directory / f"{PREFIX}_{step}"


def step_of(name: str) -> int | None:
    """Return the step that a directory's name means, if it is one's.

    Example:
        >>> step_of("step_16"), step_of("step_16.orbax-checkpoint-tmp"), step_of("step_016")
        (16, None, None)
    """
    match = _STEP_DIR.fullmatch(name)
    return int(match[1]) if match else None


@singledispatch
def saved_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a run directory, in order."""
    if not directory.is_dir():
        return []
    steps = [step_of(entry.name) for entry in directory.iterdir() if entry.is_dir()]
    return sorted(step for step in steps if step is not None)


@singledispatch
def has_item(path: Path, item: str) -> bool:
    """Return whether there is a step directory with an item of that name."""
    return (path / item).is_dir()


@singledispatch
def probe(directory: Path) -> None:
    """Make the directory, and raise RunDirError if nothing can be written in it."""
    file = directory / f".write_probe_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
        file.unlink()
    except OSError as error:
        raise RunDirError(
            f"cannot write in {directory} ({error}); pass `Checkpoint` a directory that can be "
            "written, or made."
        ) from error


@singledispatch
def check_space(directory: Path, needed: int) -> None:
    """Raise RunDirError if a checkpoint of that many bytes does not fit on the disk."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunDirError(
            f"a checkpoint takes about {needed / 1e6:.1f} MB, and the disk of {directory} has "
            f"{free / 1e6:.1f} MB free. Make room, or pass `Checkpoint` a directory on another."
        )


@singledispatch
def clean(directory: Path, step: int | None = None) -> list[str]:
    """Remove what a save or a deletion left that did not end; return what could not be removed.

    Args:
        directory: The run directory, which nobody else writes in.
        step: Only what is left of a save of this step; None for all.
    """
    failed: list[str] = []
    unfinished = None if step is None else f"{PREFIX}_{step}."
    for entry in sorted(directory.iterdir()):
        is_mine = _LEFTOVER.fullmatch(entry.name) and not entry.is_symlink()
        if is_mine and (unfinished is None or entry.name.startswith(unfinished)):
            failed += _removed(entry)
    return failed


@singledispatch
def remove_step(directory: Path, step: int) -> list[str]:
    """Delete a step; return what went wrong, as lines for the user."""
    path = step_path(directory, step)
    if path.is_symlink():
        return [f"{path} was not deleted: it is a symbolic link"]
    # A step directory is whole or not there, also to who is killed in here.
    doomed = _free_name(directory, f"{_DELETED}{path.name}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{path} could not be deleted: {error}"]
    return _removed(doomed)


@singledispatch
def set_aside(directory: Path, steps: Iterable[int]) -> list[str]:
    """Rename damaged steps, so that they are kept and no longer count; return what was done."""
    lines = []
    for path in (step_path(directory, step) for step in steps):
        kept = _free_name(directory, f"damaged_{path.name}")
        try:
            path.rename(kept)
        except OSError as error:
            raise RunDirError(
                f"{path} is damaged, and cannot be renamed to {kept.name}: {error}. Move it away."
            ) from error
        lines.append(f"{path.name} is damaged, and kept as {kept}")
    return lines


@singledispatch
def work_path(directory: Path, step: int) -> Path:
    """Return the directory that Orbax is to write a step to."""
    return step_path(directory, step)


@singledispatch
def publish(directory: Path, step: int) -> None:
    """Bring a step from where Orbax has written it to its place."""


@singledispatch
@contextmanager
def fetched(path: Path, items: Iterable[str]) -> Iterator[Path]:
    """Give the directory in which Orbax can read some items of a step."""
    yield path


@singledispatch
def sync_step(directory: Path, step: int) -> None:
    """Return when all of a step is on the disk itself, its names included."""
    for folder, _, files in os.walk(step_path(directory, step)):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    _sync(directory)


def _free_name(directory: Path, name: str) -> Path:
    number, path = 1, directory / name
    while os.path.lexists(path):
        number += 1
        path = directory / f"{name}-{number}"
    return path


def _removed(path: Path) -> list[str]:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return [f"{path} could not be deleted: {error}"]
    return []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
