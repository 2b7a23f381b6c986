"""The command `jaxtrainer`: each subcommand adds its own parser and says what runs it.

What `fit` and its like need is imported for them only, so that all others work without it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from jaxtrainer import launch
from jaxtrainer.commands import add_parsers
from jaxtrainer.errors import (
    CheckpointNotFoundError,
    ConfigError,
    JaxTrainerError,
    MissingExtraError,
    OptionError,
    RunDirError,
)

CALLS = {
    "fit": "train a module",
    "validate": "validate a module",
    "test": "test a module",
    "predict": "predict with a module",
    "plan": "say what a training step costs",
}
_SAID = (CheckpointNotFoundError, ConfigError, MissingExtraError, OptionError, RunDirError)
"""Errors of a call that a line says; others keep their traceback, which leads to user code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 for one that cannot work."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in CALLS:
            return _call(argv[0], argv[1:])
        args = _parser().parse_args(argv)
        return args.run(args)
    except JaxTrainerError as error:
        if argv and argv[0] in CALLS and not isinstance(error, _SAID):
            raise
        print(f"jaxtrainer: {error}", file=sys.stderr)
        return 2


def _call(name: str, argv: Sequence[str]) -> int:
    if find_spec("jsonargparse") is None:
        raise MissingExtraError(
            f"{name} needs jsonargparse, which is not installed: `pip install 'jaxtrainer[cli]'`."
        )
    from jaxtrainer.commandline.calls import run

    return run(name, argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, as of the other commands; the usage would hide it.
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxtrainer", description="The training loop for JAX.")
    parser.add_argument(
        "--print_completion", action=_Completion, help="print what completes it in a shell"
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, text in CALLS.items():
        commands.add_parser(name, help=text, add_help=False)
    launch.add_parser(commands)
    add_parsers(commands)
    return parser


class _Completion(argparse.Action):
    def __init__(self, **options: object) -> None:
        super().__init__(**{**options, "metavar": "bash|zsh|tcsh"})  # pyright: ignore

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from jaxtrainer.commandline.completion import script

        print(script(_parser(), str(values)))
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
