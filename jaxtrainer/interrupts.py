"""Ctrl-C and SIGTERM as a request to stop training, answered at the next boundary of the loop.

Imports `run` only.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxtrainer.run import Run

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context in which the first signal stops the run, and the second one ends it at once.

    An asynchronous KeyboardInterrupt could arrive between a dispatch and the assignment of its
    result, and lose the donated state; a flag cannot. Outside `fit` there is no state to lose,
    and signals do what they always do.

    Attributes:
        received: The signal that stopped the run, or None.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        # Python delivers signals to the main thread; elsewhere handlers may not be set.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and self.run.stage == "fit":
            self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self.run.notice(
            f"{signal.Signals(number).name} received: stopping after this step; again to stop now"
        )
        self.run.stop("interrupted")
