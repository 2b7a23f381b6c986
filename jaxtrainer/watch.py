"""`SignalWatch`: sees signals also while compiled code runs, and ends what does not end.

Python calls a signal's handler between two of its own instructions: not while XLA compiles, nor
while a thread is waited for that is stuck. A thread that reads Python's wakeup pipe sees it at
once. Imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection

GRACE_S = 5.0
"""Seconds that the clean-up of a process has which was asked to leave at once."""

_END = b"\0"


class SignalWatch:
    """Reads which signals arrive, from a thread; the main thread makes and stops it.

    Where the main thread does not come to answer within `GRACE_S`, the process is left: after a
    first SIGTERM that finds it in compiled code, and after any second signal. The worker processes
    of loaders are killed then, and nothing else runs. A Ctrl-C never ends an interactive session.

    Args:
        numbers: The signals to look at; others only pass through.
        answer: Called with each signal and how many there were.

    Attributes:
        handled: Signals that the main thread has answered; it counts them.
    """

    def __init__(self, numbers: Collection[int], answer: Callable[[int, int], None]) -> None:
        self.handled = 0
        self._numbers, self._answer = numbers, answer
        self._count, self._number = 0, 0
        self._leaves_at: float | None = None
        self._thread = threading.Thread(target=self._work, name="jaxtrainer-signals", daemon=True)

    def start(self) -> SignalWatch:
        """Watch from here on."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._outer = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Watch no longer, and give the wakeup pipe back to who had it."""
        signal.set_wakeup_fd(self._outer)
        os.write(self._write, _END)
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _work(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], self._left_s())
            if not ready:
                self._leave_if_stuck()
                continue
            byte = os.read(self._read, 1)
            if byte == _END:
                return
            if self._outer != -1:
                with contextlib.suppress(OSError):
                    os.write(self._outer, byte)
            if byte[0] in self._numbers:
                self._note(byte[0])

    def _note(self, number: int) -> None:
        self._count, self._number = self._count + 1, number
        self._leaves_at = time.monotonic() + GRACE_S
        self._answer(number, self._count)
        if self._count > 2 and self._may_leave():
            self._leave()

    def _left_s(self) -> float | None:
        return None if self._leaves_at is None else max(0.0, self._leaves_at - time.monotonic())

    def _leave_if_stuck(self) -> None:
        self._leaves_at = None
        is_unseen = self.handled == 0 and self._number == signal.SIGTERM
        if self._may_leave() and (self._count > 1 or is_unseen):
            self._leave()

    def _may_leave(self) -> bool:
        return self._number == signal.SIGTERM or not hasattr(sys, "ps1")

    def _leave(self) -> None:
        name = signal.Signals(self._number).name
        tell(f"{name}: the process does not come to an end, and is left as it is")
        leave_process(128 + self._number)


def tell(text: str) -> None:
    """Print a line that must be seen, whatever becomes of the process."""
    with contextlib.suppress(OSError, ValueError):
        print(f"jaxtrainer: {text}", file=sys.stderr, flush=True)


def leave_process(code: int) -> None:
    """End the process without waiting for anything; its worker processes are killed."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
