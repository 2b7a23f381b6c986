"""What may be imported because a value names it.

That is what the user has typed on the command line, what `--allow-import` says, and the callbacks
and loggers of the package. A file that somebody else has written imports nothing else.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from jaxtrainer.errors import ConfigError, did_you_mean

OWN = (
    *("jaxtrainer.callbacks", "jaxtrainer.loggers"),
    *("jaxtrainer.Callback", "jaxtrainer.callback.Callback"),
    *("jaxtrainer.Every", "jaxtrainer.every.Every"),
    *("jaxtrainer.Precision", "jaxtrainer.precision.Precision"),
)
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*([.:])[A-Za-z_]\w*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def typed(words: Iterable[Any]) -> list[str]:
    """Return the modules of the classes and functions that words of a command line name.

    Example:
        >>> typed(["--module", "net:Net", "--x", "3", {"class_path": "mine.calls.Stop"}])
        ['net', 'mine.calls']
    """
    found: list[str] = []
    for word in words:
        if isinstance(word, Mapping):
            found += typed([word[k] for k in word if k in ("class_path", "init_args")])
            found += typed(v for v in word.values() if isinstance(v, Mapping | list))
        elif isinstance(word, list):
            found += typed(word)
        elif isinstance(word, str) and _PATH.fullmatch(word):
            found.append(split(word)[0])
    return [*dict.fromkeys(found)]


def is_path(word: str) -> bool:
    """Return whether a word has the form of `pkg.mod:Class` or `pkg.mod.Class`."""
    return _PATH.fullmatch(word) is not None


def split(path: str) -> tuple[str, str]:
    """Return module and name of `pkg.mod:Class`, or of `pkg.mod.Class`.

    Raises:
        ConfigError: If it is neither.
    """
    if not _PATH.fullmatch(path):
        raise ConfigError(f"{path!r} names no class: write `package.module:Class`.")
    module, _, name = path.rpartition(":" if ":" in path else ".")
    return module, name


def check_prefix(prefix: str) -> str:
    """Return a prefix of `--allow-import`, or raise ConfigError if it is no module's name."""
    cleaned = prefix.rstrip(".")
    if not _MODULE.fullmatch(cleaned):
        raise ConfigError(f"--allow-import {prefix!r}: write the name of a module or package.")
    return cleaned


def is_allowed(path: str, allowed: Sequence[str]) -> bool:
    """Return whether a dotted path is one of the allowed ones, or below one."""
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in allowed)


def locate(path: str, allowed: Sequence[str], key: str) -> Any:
    """Import what `pkg.mod:name` means.

    Args:
        path: As a user or a file has it.
        allowed: Modules that may be imported.
        key: The option, for messages.

    Raises:
        ConfigError: If it may not be imported, or is not there. An error inside the module goes
            on as it is.
    """
    name, attribute = split(path)
    if not is_allowed(f"{name}.{attribute}", allowed):
        raise ConfigError(
            f"{key}: a file names {path}, and nothing is imported because a file says so; if you "
            f"trust it, add `--allow-import {name}`, or pass `--{key} {path}`."
        )
    # As `python -m` does: an installed command starts with its own directory.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        # One that is missing inside the user's module is the user's to see.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        hint = did_you_mean(error.name, [entry[:-3] for entry in _python_files()])
        raise ConfigError(
            f"{key}: there is no module {error.name!r} here or installed.{hint}"
        ) from None
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"{key}: {name} has no {attribute!r}.{did_you_mean(attribute, public)}")
    return getattr(module, attribute)


def _python_files() -> list[str]:
    return [entry for entry in os.listdir() if entry.endswith(".py")]
