"""Where frames are drawn: in place on a terminal, or as lines in a log; `notebook` has a third.

Both have their own thread, so that the program only calls `print` and `refresh` when
something happens. Imports the frames, rich and the standard library.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from jaxtrainer.display.frames import Frame
from jaxtrainer.types import Clock

Frames = Callable[[], Sequence[Frame]]
Notices = Callable[[], Sequence[str]]


@final
class Ticker:
    """A daemon thread that makes a call every so many seconds until stopped."""

    def __init__(self, call: Callable[[], None], interval_s: float) -> None:
        self._call = call
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="jaxtrainer-display", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Make no more calls; waits for one in progress, a second at most."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def _loop(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._call()


class Display(ABC):
    """Draws the current frames, and prints lines that stay.

    Args:
        console: Where to draw.
        frames: Called by the drawing thread for what to show now.
        notices: Lines for the user; each is printed once, when it appears.
        tick_s: Seconds between two draws; 0 is no thread: draws when `refresh` is called.
    """

    def __init__(
        self, console: Console, *, frames: Frames, notices: Notices, tick_s: float
    ) -> None:
        self.console = console
        self._frames = frames
        self._notices = notices
        self._num_noticed = 0
        self._notice_lock = threading.Lock()
        self._ticker = Ticker(self.tick, tick_s) if tick_s > 0 else None

    def start(self) -> None:
        """Begin to draw."""
        if self._ticker is not None:
            self._ticker.start()

    def stop(self) -> None:
        """Draw no more; leaves what was printed and nothing else."""
        if self._ticker is not None:
            self._ticker.stop()
        self.print_notices()

    def print_notices(self) -> None:
        """Print the notices that are new."""
        with self._notice_lock:
            new = list(self._notices())[self._num_noticed :]
            self._num_noticed += len(new)
        for notice in new:
            in_log = not self.console.is_terminal
            self.console.print(Text(notice, style="yellow"), soft_wrap=in_log)

    @property
    @abstractmethod
    def line_width(self) -> int | None:
        """Columns that a printed line may have; None is any number."""

    @abstractmethod
    def print(self, line: str, style: str = "") -> None:
        """Print a line that stays."""

    @abstractmethod
    def refresh(self) -> None:
        """Show at once that something has changed."""

    @abstractmethod
    def tick(self) -> None:
        """Do what is due; the thread calls it."""


@final
class LiveDisplay(Display):
    """Draws in place; what is printed meanwhile appears above.

    Args:
        leave: Whether lines given to `print` stay, or are never shown.
    """

    def __init__(
        self,
        console: Console,
        *,
        frames: Frames,
        notices: Notices,
        tick_s: float,
        leave: bool = True,
    ) -> None:
        super().__init__(console, frames=frames, notices=notices, tick_s=tick_s)
        self._leave = leave
        # Rich would send stderr to the terminal even where the shell sends it to a file.
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=_is_tty(sys.stdout),
            redirect_stderr=_is_tty(sys.stderr),
            get_renderable=self._render,
        )
        self._exits = contextlib.ExitStack()

    def start(self) -> None:
        """Hide the cursor, take over what is printed, and begin to draw."""
        outputs = (sys.stdout, sys.stderr)
        self._live.start(refresh=True)
        self._exits.enter_context(_logging_follows(outputs))
        super().start()

    def stop(self) -> None:
        """Clear the frames, show the cursor and give the output back."""
        with self._exits:
            try:
                super().stop()
                sys.stdout.flush()
            finally:
                self._live.stop()

    @property
    def line_width(self) -> int | None:
        """The width of the console now."""
        return self.console.width

    def print(self, line: str, style: str = "") -> None:
        """Print a line above the frames, cut at the width of the console."""
        if self._leave:
            self.console.print(Text(line, style=style), no_wrap=True, overflow="ellipsis")

    def refresh(self) -> None:
        """Draw now."""
        self.tick()

    def tick(self) -> None:
        """Draw the frames."""
        self.print_notices()
        self._live.refresh()

    def _render(self) -> RenderableType:
        return Group(*self._frames())


@final
class PlainDisplay(Display):
    """Prints a line at a time: when told to, and after each interval without one."""

    def __init__(
        self,
        console: Console,
        *,
        frames: Frames,
        notices: Notices,
        tick_s: float,
        clock: Clock,
        line_interval_s: float,
    ) -> None:
        super().__init__(console, frames=frames, notices=notices, tick_s=tick_s)
        self._clock = clock
        self._line_interval_s = line_interval_s
        self._last_line = clock()

    @property
    def line_width(self) -> int | None:
        """A log file has no width."""
        return None

    def print(self, line: str, style: str = "") -> None:
        """Print a whole line, however long."""
        self._last_line = self._clock()
        self.console.print(Text(line), soft_wrap=True)

    def refresh(self) -> None:
        """Print new notices; frames wait for their interval."""
        self.print_notices()

    def tick(self) -> None:
        """Print the innermost frame if the interval has passed."""
        self.print_notices()
        if self._clock() - self._last_line >= self._line_interval_s:
            for frame in self._frames()[-1:]:
                self.print(frame.plain())


def can_draw_in_place(console: Console) -> bool:
    """Return whether frames can be drawn over on a terminal.

    `FORCE_COLOR`, which many CI services set, makes rich take a log file for a terminal;
    so the file itself is asked.
    """
    return console.is_interactive and _is_tty(console.file)


def _is_tty(file: Any) -> bool:
    try:
        return bool(file.isatty())
    except (AttributeError, ValueError):  # ValueError: closed
        return False


@contextlib.contextmanager
def _logging_follows(outputs: Sequence[Any]) -> Iterator[None]:
    """Let log handlers that hold one of these outputs write to what has replaced it."""
    replaced = dict(zip(map(id, outputs), (sys.stdout, sys.stderr), strict=True))
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [h for log in loggers for h in getattr(log, "handlers", [])]
    moved = [
        (handler, handler.stream)
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and id(handler.stream) in replaced
    ]
    for handler, stream in moved:
        handler.setStream(replaced[id(stream)])
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
