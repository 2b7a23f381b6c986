"""A command as a user calls it: its exit code, and what it prints."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from typing import Any


def call(add_parsers: Callable[[Any], None], *argv: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser(prog="jaxtrainer")
    add_parsers(parser.add_subparsers(required=True))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        args = parser.parse_args(argv)
        return args.run(args), out.getvalue()
