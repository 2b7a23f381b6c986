"""One writer to a run directory in an object store, as far as that can be had there.

Advisory: a run that is cut off from the store for longer than `PATIENCE_S`, while another starts,
loses the directory to it, and finds out at its next save. Imports `errors`, `lock` and `remote`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from typing import Any

from jaxtrainer.errors import CheckpointError, RunDirError
from jaxtrainer.lock import NAME, in_use, is_alive, owner_in, this_process
from jaxtrainer.remote import RemotePath

BEAT_S = 15.0
"""How often who holds a lease says so."""

PATIENCE_S = 45.0
"""How long a lease of another host is watched before it is taken for one of a dead process."""


class Lease:
    """The lock of a run directory in an object store: an object that its owner writes anew.

    Args:
        directory: The run directory.
    """

    def __init__(self, directory: RemotePath) -> None:
        self.path = directory / NAME
        self._owner: dict[str, Any] = {}
        self._is_lost = False
        self._ended = threading.Event()
        self._beater: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; where another host may hold it, watch for a sign of life first.

        Raises:
            RunDirError: If somebody else has it, saying who.
        """
        self._owner = {**this_process(), "lease": uuid.uuid4().hex, "beat": 0}
        with contextlib.suppress(FileExistsError):
            self.path.write_bytes(self._text(), is_new=True)
        if not self._is_mine(found := self._read()):
            self._refuse_living(found)
            self.path.write_bytes(self._text())
        # Who wrote last has it, of several that found it free.
        if not self._is_mine(found := self._read()):
            raise RunDirError(in_use(self.path, owner_in(found) or {"pid": "?"}))
        self._beater = threading.Thread(target=self._beat, name="jaxtrainer-lease", daemon=True)
        self._beater.start()

    def check(self) -> None:
        """Raise RunDirError if another run has taken it over."""
        if self._is_lost:
            raise RunDirError(
                f"{self.path.parent} was taken over by another run, because this one could not be "
                "heard of; end one of them. This one saves nothing more."
            )

    def release(self) -> None:
        """Give it back, if it is held."""
        if self._beater is not None:
            self._ended.set()
            self._beater.join()
            with contextlib.suppress(CheckpointError, OSError):
                if self._is_mine(self._read()):
                    self.path.parent.remove([NAME])
        self._beater = None

    def _refuse_living(self, found: str) -> None:
        owner = owner_in(found)
        if owner is None or not is_alive(owner):
            return
        if owner.get("host") == self._owner["host"]:
            raise RunDirError(in_use(self.path, owner))
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT_S))
            now = self._read()
            if not now:
                return
            if now != found:
                raise RunDirError(in_use(self.path, owner_in(now) or owner))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            # A store that does not answer now may do so in a moment.
            with contextlib.suppress(CheckpointError, OSError):
                if not self._is_mine(self._read()):
                    self._is_lost = True
                    return
                self._owner["beat"] += 1
                self.path.write_bytes(self._text())

    def _text(self) -> bytes:
        return json.dumps(self._owner).encode()

    def _is_mine(self, text: str) -> bool:
        return (owner_in(text) or {}).get("lease") == self._owner.get("lease")

    def _read(self) -> str:
        try:
            return self.path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return ""
