"""Makes a picture of a terminal: runs a command in tmux, and writes what is on its screen as SVG.

    python .ci/picture.py docs/pictures/mnist_mlp.svg "make mnist" python recipes/mnist_mlp.py

The compilation cache is an empty one, as at a first run. Needs tmux.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS, ROWS = 92, 80
FONTS = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def screen_after(command):
    """Return what a terminal shows when a command has ended, colours as escape sequences."""
    with tempfile.TemporaryDirectory() as folder:
        tmux = ["tmux", "-f", "/dev/null", "-S", f"{folder}/socket"]
        ended = f"{shlex.join(tmux)} wait-for -S ended"
        line = f"{shlex.join(command)}; {ended}; sleep infinity"
        env = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        subprocess.run([*tmux, "new-session", "-d", *size, line], env=env, check=True)
        try:
            subprocess.run([*tmux, "wait-for", "ended"], check=True)
            shown = subprocess.run([*tmux, "capture-pane", "-e", "-p"], capture_output=True)
            return shown.stdout.decode()
        finally:
            subprocess.run([*tmux, "kill-server"], check=True)


def picture_of(screen, title):
    """Return the SVG of a screen below the line that was typed. It asks for no font."""
    lines = [line.rstrip() for line in screen.rstrip().split("\n")]
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True, width=COLUMNS, force_terminal=True, color_system="truecolor", file=nowhere
        )
        console.print(Text(f"$ {title}"), highlight=False)
        console.print(Text.from_ansi("\n".join(lines)), highlight=False)
        console.print()  # room at the lower edge
        svg = console.export_svg(title=title, theme=MONOKAI, unique_id="shot")
    svg = re.sub(r"<!--.*?-->|@font-face \{.*?\}|<clipPath id=\"shot-line.*?</clipPath>", "", svg,
                 flags=re.DOTALL)  # fmt: skip
    svg = re.sub(r' clip-path="url\(#shot-line-\d+\)"', "", svg)
    svg = svg.replace("Fira Code, monospace", FONTS)
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


def main(path, title, *command):
    Path(path).write_text(picture_of(screen_after(command), title), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
