"""The script that completes `jaxtrainer` in a shell: commands, options, and their choices."""

from __future__ import annotations

import argparse
from typing import Any

from jaxtrainer.errors import ConfigError, MissingExtraError

SHELLS = ("bash", "zsh", "tcsh")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return a script for a shell; the options of a module are not in it.

    Args:
        parser: The whole command's; the commands of the trainer get their options here.
        shell: One of `SHELLS`.

    Raises:
        ConfigError: For another shell.
        MissingExtraError: Without `jaxtrainer[cli]`.
    """
    if shell not in SHELLS:
        raise ConfigError(f"--print_completion {shell}: there are {', '.join(SHELLS)}.")
    try:
        import shtab

        from jaxtrainer.commandline.options import CALLS, build_parser
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--print_completion needs {error.name}, which is not installed: "
            "`pip install 'jaxtrainer[cli]'`."
        ) from None
    commands = _subparsers(parser)
    for call in CALLS:
        for action in build_parser(call, None, None)._actions:
            _copy(action, commands[call])
    return shtab.complete(parser, shell=shell)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def _copy(action: argparse.Action, parser: argparse.ArgumentParser) -> None:
    names = [name for name in action.option_strings if not name.endswith((".help", "+"))]
    if not names or names == ["--trainer"]:
        return
    takes_none = action.nargs == 0
    options: dict[str, Any] = {"action": "store_true"} if takes_none else {}
    if (choices := _choices(action)) is not None:
        options["choices"] = choices
    text = (action.help or "").replace("%", "%%")
    parser.add_argument(*names, help=text.split(". ")[0], **options)


def _choices(action: argparse.Action) -> list[str] | None:
    import typing

    kind = getattr(action, "_typehint", None)
    if kind is bool:
        return ["true", "false"]
    is_literal = typing.get_origin(kind) is typing.Literal
    return [str(choice) for choice in typing.get_args(kind)] if is_literal else None
