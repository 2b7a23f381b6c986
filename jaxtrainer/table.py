"""What the processes of a call tell each other, in JAX's key-value store.

A row of each, which it writes itself, and one reason to leave, of which the first stands. May
import level 0.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax._src import distributed as _runtime

RPC_S = 2.0
"""How long an answer is waited for where the caller has other things to do."""


class Table(Protocol):
    """What the processes of a call share: a row of each, and why to leave."""

    def put(self, process: int, text: str) -> None:
        """Set the row of a process."""
        ...

    def rows(self) -> dict[int, str]:
        """Return all rows."""
        ...

    def accuse(self, reason: str) -> None:
        """Say why everyone is to leave, unless somebody has done so."""
        ...

    def reason(self, timeout_s: float) -> str | None:
        """Wait for a reason to leave; None if there is none by then."""
        ...


class CoordinatedTable:
    """The table in the key-value store of JAX's coordination service.

    Args:
        call: Number of the call in this process; all processes make the same calls.
    """

    def __init__(self, call: int) -> None:
        self._client: Any = _runtime.global_state.client
        self._rows, self._reason = f"jaxtrainer/call/{call}/rows/", f"jaxtrainer/call/{call}/reason"

    def put(self, process: int, text: str) -> None:
        """Set the row of a process."""
        self._client.key_value_set(f"{self._rows}{process}", text, allow_overwrite=True)

    def rows(self) -> dict[int, str]:
        """Return all rows."""
        found = self._client.key_value_dir_get(self._rows)
        return {int(key.rpartition("/")[2]): text for key, text in found}

    def accuse(self, reason: str) -> None:
        """Say why everyone is to leave, unless somebody has done so."""
        try:
            self._client.key_value_set(self._reason, reason)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def reason(self, timeout_s: float) -> str | None:
        """Wait for a reason to leave; None if there is none by then."""
        try:
            return self._client.blocking_key_value_get(self._reason, int(1000 * timeout_s))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise


def bounded(job: Callable[[], Any], limit_s: float = RPC_S) -> bool:
    """Run a job in a thread of its own, and return whether it was done in time; errors are lost."""
    done: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def work() -> None:
        is_done = False
        with contextlib.suppress(BaseException):
            job()
            is_done = True
        done.put(is_done)

    threading.Thread(target=work, name="jaxtrainer-bounded", daemon=True).start()
    try:
        return done.get(timeout=limit_s)
    except queue.Empty:
        return False
