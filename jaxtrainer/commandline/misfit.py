"""What jsonargparse says of an option that does not fit, in one line with the close match."""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from jaxtrainer.errors import did_you_mean

_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)', re.DOTALL)
_UNKNOWN = re.compile(r"[Uu]nrecognized arguments: (\S+)")
_UNEXPECTED = re.compile(
    r"(?:Key|key|keys?|Option) ['\"]?([\w.]+)['\"]? is not (?:expected|accepted)"
)
_IN_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([^']+)'")
_DENIED = re.compile(r"Importing '([^']+)' is not allowed")
_NO_PATH = re.compile(r"Expected a dot import path string: (\S+)")
_NO_OPTION = re.compile(
    r"Problem with given class_path '([^']+)':\s*(?:\S.*\n\s*)?Option '([^']+)'"
)
_IN_CLASS = re.compile(
    r"Problem with given class_path '([^']+)':\s*"
    r"(?:Validation failed: )?Parser key \"([^\"]+)\":\s*(.*)",
    re.DOTALL,
)
_GIVEN = re.compile(r"(?:Given value|Got value): (.*)")
_QUOTES = "'\""
_NESTED = re.compile(r"NestedArg\(key='([^']*)', val=(.*)\)$")


def described(message: str, parser: Any) -> str:
    """Return a message of jsonargparse's in one line, in words that say what to write.

    Args:
        message: Of the error.
        parser: Whose options are searched for a close match.
    """
    if found := _UNKNOWN.search(message):
        name = found[1].partition("=")[0]
        return f"unknown option {name}.{_close_option(name, parser)}"
    if found := _IN_GROUP.search(message):
        names = [k.removeprefix(f"{found[1]}.") for k in _keys(parser) if k.startswith(found[1])]
        return f"{found[1]} has no option {found[2]!r}.{did_you_mean(found[2], names)}"
    if found := _KEY.search(message):
        return _one_line(f"{found[1]}: {_of_value(found[1], found[2], parser)}")
    if found := _UNEXPECTED.search(message):
        close = did_you_mean(found[1], _keys(parser))
        return f"unknown key {found[1]!r}.{close}"
    return _one_line(message)


def denied(message: str) -> str | None:
    """Return the path that jsonargparse does not import, if that is what a message says."""
    found = _DENIED.search(message)
    return found[1] if found else None


def _of_value(key: str, said: str, parser: Any) -> str:
    value = _GIVEN.findall(said)[-1:] or [""]
    if nested := _NESTED.match(value[0]):
        value = [f"{nested[1]}={nested[2].strip(_QUOTES)}"]
    if found := _DENIED.search(said):
        module = found[1].rpartition(".")[0] or found[1]
        return (
            f"{found[1]} is not imported because a file names it; if you trust it, add "
            f"`--allow-import {module}`."
        )
    if found := _NO_OPTION.search(said):
        return _no_option(found[1], found[2])
    if found := _IN_CLASS.search(said):
        owner = _short(found[1])
        value = _GIVEN.findall(found[3])[:1] or [""]
        return f"{owner}.{found[2]} {_expected(_parameter(found[1], found[2]), value[0])}"
    if found := _NO_PATH.search(said):
        names = [cls.__name__ for cls in _subclasses(_type_of(key, parser))]
        close = did_you_mean(found[1], names) or f" There are {', '.join(sorted(names))}."
        return f"there is no class {found[1]!r}.{close}"
    if found := _UNEXPECTED.search(said):
        return f"unknown key {found[1]!r}.{did_you_mean(found[1], _keys(parser))}"
    if (kind := _type_of(key, parser)) is not None and value[0]:
        return _expected(kind, value[0])
    return _one_line(said)


def _no_option(path: str, option: str) -> str:
    names = _parameters(path)
    close = did_you_mean(option, names) or f" Options: {', '.join(names)}."
    return f"{_short(path)} has no option {option!r}.{close}"


def _expected(kind: Any, value: str) -> str:
    return f"expected {words(kind)}, got {value}." if kind is not None else f"cannot be {value}."


def words(kind: Any) -> str:
    """Return a type as a reader would say it.

    Example:
        >>> words(int | None), words(typing.Literal["a", "b"]), words(list[int])
        ('int or None', "'a' or 'b'", 'list[int]')
    """
    if kind is type(None):
        return "None"
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(part) for part in typing.get_args(kind))
    if origin is None and inspect.isclass(kind):
        return kind.__name__
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", str(kind))


def _close_option(name: str, parser: Any) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    return did_you_mean(name, [option for option in known if option.startswith("--")], 0.7)


def _keys(parser: Any) -> list[str]:
    return [action.dest for action in parser._actions]


def _type_of(key: str, parser: Any) -> Any:
    for action in parser._actions:
        if action.dest == key and action.option_strings:
            found = getattr(action, "_typehint", None) or action.type
            if found is not None:
                return found
    return None


def _subclasses(kind: Any) -> Iterator[type]:
    parts = typing.get_args(kind)
    for part in parts or (kind,):
        if typing.get_args(part):
            yield from _subclasses(part)
        elif inspect.isclass(part) and part is not type(None):
            yield from _public_below(part)


def _public_below(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        is_ours = cls.__module__.startswith("jaxtrainer.")
        is_shown = cls.__module__.startswith(("jaxtrainer.callbacks.", "jaxtrainer.loggers."))
        if (is_shown and _is_exported(cls)) or not (is_ours or cls.__name__.startswith("_")):
            yield cls
        yield from _public_below(cls)


def _is_exported(cls: type) -> bool:
    package = sys.modules.get(".".join(cls.__module__.split(".")[:2]))
    return cls.__name__ in getattr(package, "__all__", ())


def _loaded(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _parameters(path: str) -> list[str]:
    cls = _loaded(path)
    return [*inspect.signature(cls).parameters] if cls is not None else []


def _parameter(path: str, name: str) -> Any:
    cls = _loaded(path)
    try:
        return typing.get_type_hints(inspect.unwrap(cls.__init__)).get(name)
    except (AttributeError, NameError, TypeError):
        return None


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _one_line(text: str) -> str:
    return " ".join(text.split())
