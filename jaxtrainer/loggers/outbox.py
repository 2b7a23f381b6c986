"""`Outbox`: a logger's own thread and the bounded queue before it.

The trainer's thread puts records in and never waits; whatever a logger does, it does elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from jaxtrainer.loggers.logger import Call, Logger
from jaxtrainer.records import Image, Record, Text

MAX_RECORDS = 2_000
MAX_BYTES = 64 * 2**20
MAX_FAILURES = 5
FIRST_PAUSE_S = 0.25
"""Before the second try; it doubles with each failure, so that five take 4 s."""


class Outbox:
    """What one logger has still to write.

    Args:
        logger: Used by this thread alone, while a call runs.

    Attributes:
        written: Records that it has written in this call.
        dropped: Records that it has not, and will not: the queue was full, or the logger is off.
        is_off: Whether it has failed too often in this call.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.name = type(logger).__name__
        self._state = threading.Condition()
        self._thread: threading.Thread | None = None
        self._forget()

    def begin(self, root: Path, call: Call) -> None:
        """Take the records of a call from here on."""
        with self._state:
            self._forget()
            if self._thread is not None and self._thread.is_alive():
                # The old thread leaves as soon as it can, and this call goes without.
                self.is_off = self._is_ending = True
                self._news.append(f"{self.name} is still busy with the call before: left out")
            self._opening = root, call

    def put(self, record: Record) -> None:
        """Take a record, or count it as dropped; returns at once."""
        size = _size(record)
        with self._state:
            is_full = len(self._queue) >= MAX_RECORDS or self._bytes + size > MAX_BYTES
            if self.is_off or self._is_ending or (is_full and self._queue):
                self.dropped += 1
                return
            self._queue.append(record)
            self._bytes += size
            self._state.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name=f"jaxtrainer {self.name}", daemon=True
                )
                self._thread.start()

    def end(self) -> None:
        """Let the thread end when it has written what is left; it pauses no more."""
        with self._state:
            self._is_ending = True
            self._state.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread, at most so long; what is left then is dropped."""
        thread = self._thread
        if thread is None:
            return
        thread.join(timeout_s)
        with self._state:
            if not thread.is_alive():
                self._thread = None
            elif not self.is_off:
                self._news.append(f"{self.name} has not ended within {timeout_s:.0f} s")
                self._turn_off()

    def news(self) -> list[str]:
        """Return what the user should know and was not told yet."""
        with self._state:
            news, self._news = self._news, []
        return news

    @property
    def has_begun(self) -> bool:
        """Whether there was a record in this call."""
        return self._thread is not None or self.dropped > 0

    @property
    def has_news(self) -> bool:
        """Whether there are any; read without a lock."""
        return bool(self._news)

    def _forget(self) -> None:
        self._queue: deque[Record] = deque()
        self._bytes = 0
        self._news: list[str] = []
        self._is_ending = self._has_failed = False
        self.is_off = False
        self.written = self.dropped = 0

    def _work(self) -> None:
        root, call = self._opening
        if not self._try(lambda: self.logger.open(root, call)):
            return
        while self._has_burst() and self._write_burst():
            pass
        self._try(self.logger.close, tries=1)

    def _has_burst(self) -> bool:
        """Wait for a record, and for those that come soon after; False at the end."""
        with self._state:
            self._state.wait_for(lambda: self._queue or self._is_ending)
            self._state.wait_for(self._is_enough, self.logger.gather_s)
            return bool(self._queue) and not self.is_off

    def _is_enough(self) -> bool:
        # Half of the room is left for those that come meanwhile.
        is_much = len(self._queue) > MAX_RECORDS // 2 or self._bytes > MAX_BYTES // 2
        return is_much or self._is_ending or self.is_off

    def _write_burst(self) -> bool:
        """Write what there is; returns whether the logger is still on."""
        taken = 0
        while (record := self._first()) is not None:
            if not self._try(lambda record=record: self.logger.write(record)):
                return False
            self._done(record)
            taken += 1
        if self._try(self.logger.flush):
            return True
        with self._state:
            self.written -= taken
            self.dropped += taken
        return False

    def _first(self) -> Record | None:
        with self._state:
            return self._queue[0] if self._queue and not self.is_off else None

    def _done(self, record: Record) -> None:
        with self._state:
            # Off in the meantime, everything was dropped.
            if not self.is_off:
                self._queue.popleft()
                self._bytes -= _size(record)
                self.written += 1

    def _try(self, act: Callable[[], object], tries: int = MAX_FAILURES) -> bool:
        pause_s = FIRST_PAUSE_S
        for failures in range(1, tries + 1):
            try:
                act()
                return True
            # Also a SystemExit: some clients leave by one.
            except BaseException as error:
                self._failed(error, is_last=failures == tries)
            self._pause(pause_s)
            pause_s *= 2
        return False

    def _failed(self, error: BaseException, *, is_last: bool) -> None:
        what = f"{type(error).__name__}: {error}"
        with self._state:
            if is_last and not self.is_off:
                self._news.append(f"{self.name} is left out from here on ({what})")
                self._turn_off()
            elif not self._has_failed:
                self._news.append(f"{self.name} failed and is tried again ({what})")
            self._has_failed = True

    def _turn_off(self) -> None:
        self.is_off = True
        self.dropped += len(self._queue)
        self._queue.clear()
        self._bytes = 0

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._state:
            while not self._is_ending and (left := deadline - time.monotonic()) > 0:
                self._state.wait(left)


def _size(record: Record) -> int:
    if isinstance(record, Image):
        return record.pixels.nbytes
    return len(record.text) if isinstance(record, Text) else 1024
