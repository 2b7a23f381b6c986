"""Ctrl-C and SIGTERM: the first lets training end well, the second ends it at once.

What a signal asks for is decided here; how signals are seen while compiled code runs, and how a
process is left that does not come to an end, is in `watch.py`. Imports `run` and `watch`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxtrainer.run import Run
from jaxtrainer.watch import SignalWatch, tell

_TRAINING = ("train", "validate")
"""Stages of a `fit` in which something is trained that is worth saving."""


class Interrupts:
    """Context in which signals end a call of the trainer.

    In the training loop of `fit` the first signal stops the run at the next boundary, where it is
    saved: an asynchronous exception could arrive between a dispatch and the assignment of its
    result, and lose the donated state; a flag cannot. Before the first step there is nothing to
    save, and the call is left at once, as by the second signal: Ctrl-C raises KeyboardInterrupt,
    SIGTERM SystemExit with code 143. The other calls have nothing to save either: Ctrl-C does in
    them what it always does, and SIGTERM leaves after their clean-up.

    Only the main thread gets signals; in another one nothing is installed. Nor is it in a call
    that is made inside another, or for a signal that the program ignores.

    Of several processes each has handlers of its own, and all stop where one got a signal.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._received: int | None = None
        self._call = run.stage
        self._before: dict[int, Any] = {}
        self._watch: SignalWatch | None = None

    def __enter__(self) -> Interrupts:
        numbers = [n for n in self._numbers() if _is_ours_to_take(n)]
        if numbers and threading.current_thread() is threading.main_thread():
            self._watch = SignalWatch(numbers, self._answer).start()
            self._before = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A stream of predictions may be closed by another thread, which cannot change handlers.
        with contextlib.suppress(ValueError):
            for number, handler in self._before.items():
                signal.signal(number, handler)
            if self._watch is not None:
                self._watch.stop()
        if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            self.say_farewell()

    @property
    def received(self) -> int | None:
        """The signal that has come first, here or to another process; None if there was none."""
        return self._received or self.run.signal or None

    def say_farewell(self) -> None:
        """Print what was saved of a run that SIGTERM has ended."""
        run, saved = self.run, self.run.last_checkpoint
        where = f"{self._call} left in epoch {run.epoch}, at step {run.global_step}"
        if saved is not None:
            what = f"saved: {saved}; go on with `fit(..., ckpt_path={saved!r})`"
        elif self._is_training and run.total_batches:
            what = "nothing of it is saved; a `Checkpoint` among the callbacks would have done that"
        else:
            what = "nothing is lost"
        tell(f"SIGTERM: {where}; {what}")

    @property
    def _is_training(self) -> bool:
        return self._call == "fit" and self.run.stage in _TRAINING

    def _numbers(self) -> tuple[int, ...]:
        if self._call == "fit":
            return signal.SIGINT, signal.SIGTERM
        return (signal.SIGTERM,)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self._received is None
        if is_first:
            self._received = number
        if self._watch is not None:
            self._watch.handled += 1
        # Also where an exception follows: one that is raised in a `__del__` is lost.
        self.run.interrupt(number)
        if is_first and self._is_training:
            return
        if number == signal.SIGTERM:
            raise SystemExit(128 + number)
        phase = self.run.timings.current
        when = f" (in the phase {phase!r})" if phase else ""
        why = f"before the first step{when}: nothing is lost" if is_first else "again: left at once"
        raise KeyboardInterrupt(f"{signal.Signals(number).name} {why}")

    def _answer(self, number: int, count: int) -> None:
        """Tell the user what comes of a signal; runs in the watch's thread."""
        name = signal.Signals(number).name
        if count > 1:
            tell(f"{name} received again: leaving now")
        elif self._is_training:
            tell(f"{name} received: stopping after this step; again to leave at once")


def _is_ours_to_take(number: int) -> bool:
    """Return whether a handler may be replaced, and put back later."""
    now = signal.getsignal(number)
    if now is None or now is signal.SIG_IGN:
        return False
    return not isinstance(getattr(now, "__self__", None), Interrupts)
