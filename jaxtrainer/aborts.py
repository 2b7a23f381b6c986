"""Time to say why, when JAX aborts the process because of another one.

JAX's client of the coordination service ends the process from a thread of its own when the
coordinator is gone or another process has died: SIGABRT, with no Python in it. Its handler is C, as
one in Python would have to wait for an interpreter that may be stuck: libc's `sleep`, which gets
the number of the signal, 6, as its seconds. The abort goes on when they are over, so that nothing
keeps the process alive. Linux only; imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

GRACE_S = float(signal.SIGABRT)
"""Seconds between the abort and the end of the process."""

_BIT = 1 << (signal.SIGABRT - 1)


class DelayedAbort:
    """An abort of this process waits for `GRACE_S`, and can be seen meanwhile.

    Nothing is changed where somebody handles SIGABRT already, as `faulthandler` does.

    Attributes:
        is_on: Whether it is in effect.
    """

    def __init__(self) -> None:
        self.is_on = False

    def start(self) -> DelayedAbort:
        """Delay aborts from here on."""
        if sys.platform == "linux":
            libc = _libc()
            before = libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
            self.is_on = not before
            if before:
                libc.signal(signal.SIGABRT, before)
        return self

    def stop(self) -> None:
        """Let an abort end the process at once, as before."""
        if self.is_on:
            _libc().signal(signal.SIGABRT, None)
            self.is_on = False

    def is_waiting(self) -> bool:
        """Return whether a thread of this process is in an abort."""
        # A signal is blocked in the thread that handles it, and this one alone: a thread that is
        # just being made blocks them all.
        return self.is_on and any(_blocked(thread) == _BIT for thread in _threads())


def _threads() -> list[str]:
    return os.listdir("/proc/self/task")


def _blocked(thread: str) -> int:
    try:
        with open(f"/proc/self/task/{thread}/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("SigBlk:"):
                    return int(line.split()[1], 16)
    except OSError:
        # It has ended.
        pass
    return 0


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return libc
