"""What a command line asks for, before anything is imported: its files, its classes, the rest."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtrainer.commandline.imports import OWN, check_prefix, is_path, typed
from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.settings import HIDDEN

SECTIONS = ("trainer", "module", "data")
CALL_OPTIONS = ("ckpt_path", "verbose", "output", "mesh", "num_devices", "accelerator")
_CLASS, _ARGUMENTS = "class_path", "init_args"


@dataclass
class Request:
    """A command line, read as far as it goes without importing what it names.

    Attributes:
        call: `"fit"`, `"validate"`, `"test"`, `"predict"` or `"plan"`.
        argv: What is left for the parser of the options.
        files: By the name of a file its options, nested by section.
        module: Path of the module's class, or None.
        data: Path of what makes the data, or None.
        allowed: Modules that values may name.
        hidden: Options that a file does not say because they are secret, by file.
        paths: Classes and functions that are typed on the command line.
        prints: Whether to print the configuration only.
    """

    call: str
    argv: list[str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    module: str | None = None
    data: str | None = None
    allowed: tuple[str, ...] = OWN
    hidden: dict[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    prints: bool = False


def read_request(call: str, argv: Sequence[str]) -> Request:
    """Return what the command line asks for.

    Raises:
        ConfigError: For a file that cannot be read, or what cannot be there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_general(parser)
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}.") from None
    if given.seed is not None:
        rest += ["--trainer.seed", given.seed]
    words = [*rest, *(word.partition("=")[2] for word in rest), given.module, given.data]
    allowed = (
        *OWN,
        *typed(_values(words)),
        *map(check_prefix, given.allow_import),
    )
    paths = tuple(word for word in words if word and is_path(word))
    request = Request(call, rest, allowed=allowed, paths=paths, prints=given.print_config)
    for path in given.config:
        _add_file(request, path)
    request.module, request.data = given.module or request.module, given.data or request.data
    return request


def add_general(parser: Any) -> None:
    """Add the options that decide what other options there are."""
    add = parser.add_argument
    add(
        *("--config",),
        **{"action": "append", "default": [], "metavar": "FILE"},
        help="options from a YAML or JSON file; later files and the command line come on top",
    )
    add("--module", metavar="PKG:CLASS", help="the TrainModule; `--module.NAME` its arguments")
    add(
        *("--data",),
        metavar="PKG:NAME",
        help="a DataModule, or what returns loaders; `--data.NAME` its arguments",
    )
    add(
        *("--allow-import",),
        **{"action": "append", "default": [], "metavar": "PKG"},
        help="what files may name classes of; what is on the command line needs none",
    )
    add("--print_config", action="store_true", help="print the configuration, and do nothing")
    add("--seed", metavar="N", help="the same as --trainer.seed")


def load(text: str, where: str) -> Any:
    """Return the plain data of a YAML text; tags that would make objects are errors.

    Raises:
        ConfigError: If it is none.
    """
    import yaml
    from jsonargparse import get_loader

    try:
        return get_loader("yaml")(text)  # a safe loader that reads 1e-3 as a number
    except (yaml.YAMLError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{where} is no plain YAML: {said}.") from None


def _values(words: Sequence[str | None]) -> list[Any]:
    found: list[Any] = []
    for word in words:
        is_nested = word is not None and word[:1] in ("[", "{")
        found.append(load(word, "an option") if is_nested and word is not None else word)
    return found


def _add_file(request: Request, path: str) -> None:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}.") from None
    found = load(text, path)
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no options, but {type(found).__name__} {found!r:.60}.")
    known = (*SECTIONS, *CALL_OPTIONS)
    for key in found:
        if key not in known:
            hint = did_you_mean(str(key), known) or f" Sections: {', '.join(SECTIONS)}."
            raise ConfigError(f"{path}: unknown key {key!r}.{hint}")
    for name in ("module", "data"):
        if name in found:
            chosen, arguments = _of_class(found[name], f"{path}: {name}")
            if chosen is not None:
                before = getattr(request, name)
                if before is not None and before != chosen:
                    # The arguments of another class are not this one's.
                    for options in request.files.values():
                        options.pop(name, None)
                setattr(request, name, chosen)
            found[name] = arguments
    request.files[path] = {k: v for k, v in found.items() if v not in (None, {})}
    _take_hidden(request, path, request.files[path], "")


def _of_class(given: Any, where: str) -> tuple[str | None, dict[str, Any]]:
    if given is None or isinstance(given, str):
        return given, {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: write `class_path: package.module:Class`, got {given!r:.60}.")
    if _CLASS not in given:
        return None, given
    if strange := [key for key in given if key not in (_CLASS, _ARGUMENTS)]:
        raise ConfigError(
            f"{where}: {strange[0]!r} beside class_path; its arguments are below `init_args`."
        )
    chosen, arguments = given[_CLASS], given.get(_ARGUMENTS) or {}
    if not isinstance(chosen, str) or not isinstance(arguments, dict):
        raise ConfigError(f"{where}: class_path is a name, and init_args a table of arguments.")
    return chosen, arguments


def _take_hidden(request: Request, path: str, options: dict[str, Any], prefix: str) -> None:
    for key in [*options]:
        value = options[key]
        if value == HIDDEN:
            del options[key]
            request.hidden[f"{prefix}{key}"] = path
        elif isinstance(value, Mapping):
            _take_hidden(request, path, options[key], f"{prefix}{key}.")
