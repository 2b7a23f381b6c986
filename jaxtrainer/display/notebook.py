"""Frames in a notebook: one output that is drawn over, and lines as text.

Needs no widgets. A widget takes what any thread prints while it draws, and erases it. Imports the
frames, rich and the standard library, and IPython where it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from typing import Any, final

from rich.console import Console, Group
from rich.text import Text

from jaxtrainer.display.live import Display, Frames, Notices

_WIDTH = 100
_HTML = "<pre style='line-height:normal;margin:0'>{code}</pre>"


@final
class NotebookDisplay(Display):
    """Draws the frames in an output of their own, and prints lines below it."""

    def __init__(self, *, frames: Frames, notices: Notices, tick_s: float) -> None:
        console = Console(force_jupyter=False, force_terminal=False)
        super().__init__(console, frames=frames, notices=notices, tick_s=tick_s)
        self._output: Any = None

    def start(self) -> None:
        """Make the output, and begin to draw."""
        show = importlib.import_module("IPython.display").display
        self._output = show(self._drawn(), raw=True, display_id=True)
        super().start()

    def stop(self) -> None:
        """Empty the output."""
        try:
            super().stop()
        finally:
            output, self._output = self._output, None
            if output is not None:
                output.update({"text/plain": ""}, raw=True)

    @property
    def line_width(self) -> int | None:
        """A notebook scrolls."""
        return None

    def print(self, line: str, style: str = "") -> None:
        """Print a line that stays; lines in a row are one output."""
        self.console.print(Text(line), soft_wrap=True)

    def refresh(self) -> None:
        """Draw now."""
        self.tick()

    def tick(self) -> None:
        """Draw the frames."""
        self.print_notices()
        output = self._output
        if output is not None:
            output.update(self._drawn(), raw=True)

    def _drawn(self) -> dict[str, str]:
        frames = list(self._frames())
        if not frames:
            return {"text/plain": ""}
        page = Console(
            file=io.StringIO(),
            width=_WIDTH,
            record=True,
            force_jupyter=False,
            force_terminal=True,
            color_system="truecolor",
        )
        page.print(Group(*frames), end="")
        html = page.export_html(inline_styles=True, code_format=_HTML)
        return {"text/html": html, "text/plain": "\n".join(frame.plain() for frame in frames)}


def is_notebook(console: Console) -> bool:
    """Return whether a console belongs to a notebook."""
    return console.is_jupyter and importlib.util.find_spec("IPython") is not None
