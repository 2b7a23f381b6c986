"""Paths in an object store, through fsspec, which is imported on first use.

A store has no directories, no rename and no locks; what a run directory does with what there is
says `places.py`. Imports `errors` only.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxtrainer.errors import CheckpointCorruptError, ConfigError, MissingExtraError, RunDirError

TIMEOUT_S = 10.0
"""How long a short answer of a store may take: its client alone would try again for minutes."""

STORES = {
    "gs": ("gcsfs", "gcs", "`gcloud auth application-default login`"),
    "s3": ("s3fs", "s3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or `aws configure`"),
}
"""By scheme the package, the extra that installs it, and where credentials come from."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_STRANGE = re.compile(r"[*?\[\]{}\0\\]|/\.\.?(/|$)")
"""Patterns, and steps upwards."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL.

    Example:
        >>> is_url("gs://bucket/run"), is_url("runs/gs")
        (True, False)
    """
    return _URL.match(os.fspath(path)) is not None


def parse_url(url: str) -> RemotePath:
    """Return what a URL means.

    Raises:
        ConfigError: If it is none of a directory in a known object store.
        MissingExtraError: If what talks to that store is not installed.
    """
    match = _URL.match(url)
    scheme, key = match.groups() if match else ("", "")
    if scheme not in STORES:
        known = " and ".join(f"`{name}://`" for name in STORES)
        raise ConfigError(
            f"{url!r} is a kind of URL that is not known: checkpoints go to a directory, also of a "
            f"mounted disk, or to {known}."
        )
    key = key.rstrip("/")
    if "/" not in key or not all(key.split("/")) or _STRANGE.search(key):
        raise ConfigError(
            f"{url!r} names no directory in a bucket; write e.g. `{scheme}://bucket/runs/mnist`."
        )
    package, extra, _ = STORES[scheme]
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"{url!r} needs {package}, which is not installed: `pip install 'jaxtrainer[{extra}]'`."
        )
    return RemotePath(scheme, key)


def refuse_url(what: str, path: str | os.PathLike[str] | None) -> None:
    """Raise ConfigError if a path is a URL, where files of a disk are needed."""
    if path is not None and is_url(path):
        raise ConfigError(
            f"{what}: {os.fspath(path)!r} is a URL, and only checkpoints can be kept in an object "
            "store (`Checkpoint`, `OnExceptionCheckpoint`); pass a directory."
        )


@dataclass(frozen=True)
class RemotePath(os.PathLike[str]):
    """A path in an object store. What the store refuses, or does not answer, is a RunDirError.

    Attributes:
        scheme: Which store, e.g. `"gs"`.
        key: Bucket and name in it, e.g. `"bucket/runs/mnist"`.
    """

    scheme: str
    key: str

    def __fspath__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __str__(self) -> str:
        return self.__fspath__()

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.scheme, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """Last part."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """All but the last part; itself, where that would be the whole bucket."""
        parent = self.key.rpartition("/")[0]
        return RemotePath(self.scheme, parent) if "/" in parent else self

    def with_name(self, name: str) -> RemotePath:
        """Return the path with another last part."""
        return RemotePath(self.scheme, f"{self.key.rpartition('/')[0]}/{name}")

    def exists(self) -> bool:
        """Return whether there is an object of that name."""
        with self._talking() as store:
            return _short(store, "exists", self.key)

    def is_dir(self) -> bool:
        """Return whether there is anything below it."""
        return any(True for _ in self.iterdir())

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in it, subdirectories as well."""
        with self._talking() as store:
            keys = _found(lambda: _short(store, "ls", self.key, detail=False))
        names = {self._relative(key).partition("/")[0] for key in keys}
        return iter([self / name for name in sorted(names - {""})])

    def files(self, prefix: str = "") -> list[str]:
        """Return the names of all objects below it, such as `step_4/record/metadata`."""
        with self._talking() as store:
            keys = _found(lambda: _short(store, "find", self.key, prefix=prefix))
        names = sorted(self._relative(key) for key in keys)
        return [name for name in names if name.startswith(prefix) and name]

    def stat(self) -> SimpleNamespace:
        """Return its size, as `st_size`."""
        with self._talking() as store:
            return SimpleNamespace(st_size=_short(store, "info", self.key)["size"])

    def read_bytes(self) -> bytes:
        """Return the content of the object."""
        with self._talking() as store:
            return _short(store, "cat_file", self.key)

    def write_bytes(self, data: bytes, *, is_new: bool = False) -> None:
        """Write an object; where it is to be new, raise FileExistsError if there is one."""
        with self._talking() as store:
            if not is_new:
                _short(store, "pipe_file", self.key, data)
            elif _short(store, "exists", self.key) or not self._create(store, data):
                raise FileExistsError(str(self))

    def remove(self, names: Sequence[str]) -> None:
        """Delete objects by their names below it; what is gone is no error."""
        with self._talking() as store:
            if names:
                _found(lambda: store.rm([f"{self.key}/{name}" for name in names]))

    def upload(self, folder: Path, names: Sequence[str]) -> None:
        """Write files of a folder, and raise RunDirError if not all of their bytes arrived."""
        with self._talking() as store:
            store.put([str(folder / n) for n in names], [f"{self.key}/{n}" for n in names])
            for name in self._differing(store, folder, names):
                # Some stores take a last byte for the end of the request; a stream has no such end.
                data = (folder / name).read_bytes()
                store.pipe_file(f"{self.key}/{name}", data, chunksize=max(1, len(data)))
            if cut := self._differing(store, folder, names):
                raise OSError(f"{cut[0]} has another size there than it was sent with")

    def download(self, names: Sequence[str], folder: Path) -> None:
        """Read objects into files of a folder.

        Raises:
            CheckpointCorruptError: If a name would lead out of the folder.
        """
        if strange := [n for n in names if {"", ".", ".."} & {*n.split("/")} or "\\" in n]:
            raise CheckpointCorruptError(f"{self} has an object of the name {strange[0]!r}")
        with self._talking() as store:
            store.get([f"{self.key}/{n}" for n in names], [str(folder / n) for n in names])

    def copy_to(self, other: RemotePath, names: Sequence[str]) -> None:
        """Copy objects within the store."""
        with self._talking() as store:
            for name in names:
                store.cp_file(f"{self.key}/{name}", f"{other.key}/{name}")

    def _differing(self, store: Any, folder: Path, names: Sequence[str]) -> list[str]:
        found = _short(store, "find", self.key, detail=True).items()
        sizes = {self._relative(key): entry["size"] for key, entry in found}
        return [name for name in names if sizes.get(name) != (folder / name).stat().st_size]

    def _create(self, store: Any, data: bytes) -> bool:
        """Write it, unless another has done so just now, where the store knows conditions."""
        try:
            _short(store, "pipe_file", self.key, data, mode="create")
        except Exception:
            if _short(store, "exists", self.key):
                return False
            _short(store, "pipe_file", self.key, data)
        return True

    def _relative(self, key: str) -> str:
        return key.strip("/").removeprefix(self.key).lstrip("/")

    @contextmanager
    def _talking(self) -> Iterator[Any]:
        try:
            yield filesystem(self.scheme)
        except (FileNotFoundError, FileExistsError, MissingExtraError):
            raise
        except Exception as error:
            # Never taken for damage: what cannot be reached may be whole.
            why = str(error) or f"no answer within {TIMEOUT_S:.0f} s"
            raise RunDirError(
                f"{self} cannot be reached ({type(error).__name__}: {why}). Are the network and "
                f"the credentials there? {STORES[self.scheme][2]}."
            ) from error


@functools.cache
def filesystem(scheme: str) -> Any:
    """Return fsspec's way into an object store; made now, because it looks for credentials."""
    import fsspec

    # Listings that it would keep miss what other processes write.
    return fsspec.filesystem(scheme, use_listings_cache=False)


def _short(store: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call what has to answer soon."""
    limit = {"timeout": TIMEOUT_S} if store.async_impl else {}
    return getattr(store, method)(*args, **kwargs, **limit)


def _found(ask: Any) -> list[str]:
    try:
        return ask() or []
    except FileNotFoundError:
        return []
