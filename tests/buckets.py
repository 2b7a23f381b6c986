"""An object store in memory in the place of a real one, and ways to break it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxtrainer import remote
from jaxtrainer.places import place
from jaxtrainer.remote import RemotePath

URL = "s3://bucket/runs/a"


class Store(MemoryFileSystem):
    """Objects by key; `before` sees the name and first argument of every call, and may raise."""

    cachable = False
    store: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: Callable[[str, Any], None] = staticmethod(lambda name, path: None)

    def find(self, path: str, *args: Any, prefix: str = "", **options: Any) -> Any:
        self.before("find", path)
        return super().find(path, *args, **options)

    def ls(self, path: str, *args: Any, **options: Any) -> Any:
        self.before("ls", path)
        return super().ls(path, *args, **options)

    def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        self.before("cat_file", path)
        return super().cat_file(path, *args, **options)

    def pipe_file(self, path: str, value: bytes, *args: Any, **options: Any) -> None:
        self.before("pipe_file", path)
        super().pipe_file(path, value, *args, **options)

    def put_file(self, lpath: str, rpath: str, *args: Any, **options: Any) -> None:
        self.before("put_file", rpath)
        super().put_file(lpath, rpath, *args, **options)

    def get_file(self, rpath: str, lpath: str, *args: Any, **options: Any) -> None:
        self.before("get_file", rpath)
        super().get_file(rpath, lpath, *args, **options)

    def rm(self, path: Any, *args: Any, **options: Any) -> None:
        self.before("rm", path)
        for name in path:
            self.store.pop("/" + name, None)

    def names(self) -> list[str]:
        """What there is, below the bucket."""
        return sorted(key.removeprefix("/bucket/runs/") for key in self.store)


def use(monkeypatch: pytest.MonkeyPatch) -> Store:
    """Let `s3://` mean a new, empty store."""
    store = type("Store", (Store,), {"store": {}, "pseudo_dirs": [""]})()
    monkeypatch.setitem(remote.STORES, "s3", ("fsspec", "s3", "AWS_ACCESS_KEY_ID"))
    monkeypatch.setattr(remote, "filesystem", lambda scheme: store)
    return store


def run_dir(url: str = URL) -> RemotePath:
    path: Any = place(url)
    return path


def breaking(call: str, part: str, error: BaseException) -> Callable[[str, Any], None]:
    """For `Store.before`: raise at calls of that name whose argument has that part."""

    def before(name: str, path: Any) -> None:
        if name == call and part in str(path):
            raise error

    return before
