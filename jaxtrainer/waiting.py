"""`Patience`: how long a call waits for a loader, and what becomes of one that does not answer.

A thread that is stuck in a loader cannot be ended from outside; its worker processes can, and the
call goes on without the rest. May import level 0 and `watch`.
"""

from __future__ import annotations

import multiprocessing
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from jaxtrainer.errors import DataTimeoutError
from jaxtrainer.watch import leave_process, tell

T = TypeVar("T")

EXIT_STUCK = 76
"""Exit code of a process that a stuck loader kept from ending."""

_POLL_S = 0.2
_HURRY_S = 5.0
_EXIT_S = 10.0


class Patience:
    """Waits for what a thread reads from a loader; one for each call of the trainer.

    Args:
        limit_s: Seconds without an answer after which a loader is stuck; None for no limit.
        gives_up: Says whether nobody wants the answer any more.
    """

    def __init__(
        self, limit_s: float | None = None, gives_up: Callable[[], bool] = lambda: False
    ) -> None:
        self.limit_s = limit_s
        self.gives_up = gives_up
        self._before = {child.pid for child in multiprocessing.active_children()}
        self._is_abandoned = False

    def take(
        self,
        items: queue.SimpleQueue[Any],
        thread: threading.Thread,
        reading: Callable[[], str | None],
    ) -> Any:
        """Return the next of the items that a thread puts there; None if nobody wants it.

        Args:
            items: The queue.
            thread: What fills it.
            reading: Names what is being read. As long as that changes, the loader is slow at most:
                it takes many batches to fill a chunk. None while nothing is.

        Raises:
            DataTimeoutError: If nothing comes in time.
        """
        waited_s, name = 0.0, None
        while True:
            try:
                return items.get(timeout=_POLL_S)
            except queue.Empty:
                waited_s += _POLL_S
            now = reading()
            if now is None or now != name:
                waited_s, name = 0.0, now
            if self.gives_up():
                return None
            if name is not None and self.limit_s is not None and waited_s >= self.limit_s:
                raise self._timeout(thread, name)

    def call(self, job: Callable[[], T], name: str) -> T:
        """Return what the job returns, or raise what it raises; it runs in another thread.

        Args:
            job: Reads a loader.
            name: What is read, for messages.

        Raises:
            DataTimeoutError: If it does not end in time.
        """
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put((True, job()))
            except BaseException as error:
                answers.put((False, error))

        thread = threading.Thread(target=work, name="jaxtrainer-first-batch", daemon=True)
        thread.start()
        answer = self.take(answers, thread, lambda: name)
        if answer is None:
            raise KeyboardInterrupt(f"while waiting for {name}")
        thread.join()
        is_good, value = answer
        if not is_good:
            raise value
        return value

    def end(self, thread: threading.Thread) -> None:
        """Wait for a thread that was told to end: not for long where that would hide an error."""
        is_hurry = sys.exc_info()[0] is not None or self.gives_up()
        thread.join(_HURRY_S if is_hurry else self.limit_s)

    def abandon(self) -> None:
        """Kill the processes that loaders have started, and let no thread keep this one alive."""
        started = [c for c in multiprocessing.active_children() if c.pid not in self._before]
        for child in started:
            child.kill()
        for child in started:
            child.join(_HURRY_S)
        if not self._is_abandoned:
            self._is_abandoned = True
            threading.Thread(target=_leave_with_main, name="exit", daemon=True).start()

    def _timeout(self, thread: threading.Thread, name: str) -> DataTimeoutError:
        error = DataTimeoutError(
            f"in the data phase: {name} was not read within {self.limit_s:g} s. The loader is "
            "stuck, or slower than that; allow it more time with "
            "`Trainer(data_timeout='00:01:00:00')`, or None for no limit."
        )
        error.add_note(stacks_of(thread))
        self.abandon()
        return error


def stacks_of(thread: threading.Thread) -> str:
    """Return where a thread is, and where the threads of Grain are, as text."""
    frames, lines = sys._current_frames(), []
    for other in threading.enumerate():
        frame = frames.get(other.ident or 0)
        if frame is not None and (other is thread or other.name.startswith("grain")):
            stack = traceback.format_stack(frame)
            lines += [f"the thread {other.name} is at (innermost last):\n", *stack]
    return "".join(lines).rstrip()


def _leave_with_main() -> None:
    # The interpreter waits for threads that are no daemons, as those of an executor.
    while not is_ending():
        time.sleep(_POLL_S)
    time.sleep(_EXIT_S)
    tell("threads of a stuck loader keep the process alive; it is left as it is")
    leave_process(EXIT_STUCK)


def is_ending() -> bool:
    """Return whether the main thread has nothing to do any more but wait for others."""
    main = threading.main_thread()
    frame = sys._current_frames().get(main.ident or 0)
    while frame is not None and frame.f_code is not threading._shutdown.__code__:  # pyright: ignore[reportAttributeAccessIssue]
        frame = frame.f_back
    return frame is not None or not main.is_alive()
