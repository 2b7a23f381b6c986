"""The end of a process whose run has failed: told to the others, and without waiting for them.

At its exit JAX waits until all processes have come there, which those never do that have left or
hang. May import level 0, `distributed` and `waiting`.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jax._src import distributed as _runtime

from jaxtrainer.waiting import is_ending
from jaxtrainer.watch import leave_process, tell

EXIT_RESTART = 75
"""Exit code of a process that leaves because of another one: to be started again (EX_TEMPFAIL)."""

LINGER_S = 2.0
"""How long process 0 stays after a failure: the others read the reason from its memory."""

_EXIT_S, _JOIN_S = 6.0, 12.0
_POLL_S = 0.2
_kept: list[Any] = []


class Ending:
    """What happens at the end of this process, if a call has failed; one for the process.

    Attributes:
        failed_at_s: When a call has failed here, on the monotonic clock; None if none has.
        threads: Those that may be in JAX's C++, where Python's end would abort the process.
    """

    def __init__(self) -> None:
        self.failed_at_s: float | None = None
        self.threads: list[threading.Thread] = []
        self._tells: Callable[[BaseException], None] | None = None

    def watch(self, tells: Callable[[BaseException], None]) -> None:
        """Look at the exit whether an exception ends the program outside of every call.

        Args:
            tells: Tells the others about it.
        """
        if self._tells is None:
            atexit.register(self._at_exit)
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        self._tells = tells

    def has_failed(self) -> None:
        """Take note that a call has failed: the exit of the process waits for nobody."""
        if self.failed_at_s is None:
            threading.Thread(target=_leave_with_main, name="exit", daemon=True).start()
        self.failed_at_s = time.monotonic()

    def linger(self) -> None:
        """Give the others the time to read why, if this process keeps it for them."""
        if self.failed_at_s is not None and _runtime.global_state.process_id == 0:
            time.sleep(max(0.0, self.failed_at_s + LINGER_S - time.monotonic()))

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)
        # In a session of its own an exception ends nothing.
        if error is not None and self.failed_at_s is None and not hasattr(sys, "ps1"):
            assert self._tells is not None
            self._tells(error)
            self.has_failed()
        if self.failed_at_s is not None:
            self.linger()
        for thread in self.threads:
            thread.join(_JOIN_S)
        if self.failed_at_s is not None:
            _forget_the_others()


ENDING = Ending()


def _forget_the_others() -> None:
    """Let JAX's clean-up find no client of the coordination service, and wait for nobody."""
    state = _runtime.global_state
    for name in ("preemption_sync_manager", "client", "service"):
        kept = getattr(state, name)
        # Its destructor would wait as well.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        _kept.append(kept)
        setattr(state, name, None)


def _leave_with_main() -> None:
    # Threads of an executor may wait for the others, and the interpreter for them.
    while not is_ending():
        time.sleep(_POLL_S)
    time.sleep(_EXIT_S)
    tell("the process waits for others that have left; it is left as it is")
    leave_process(1 if getattr(sys, "last_value", None) is not None else EXIT_RESTART)
