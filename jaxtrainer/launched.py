"""What `jaxtrainer launch` starts: joins the other processes, then runs the program as a script."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

from jaxtrainer.distributed import initialize_if_needed

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Run `script args...` or `-m module args...`."""
    _end_with_launcher()
    initialize_if_needed()
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        # As if Python had been called with the script.
        sys.path[0] = str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")


def _end_with_launcher() -> None:
    # Where the launcher itself is killed it cannot forward anything.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
