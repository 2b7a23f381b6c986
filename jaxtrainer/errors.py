"""The exceptions of the package, and the words they share.

Imports nothing of the package. Every class is also a builtin exception, so that
`except ValueError` in a user's program goes on to work.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class JaxTrainerError(Exception):
    """Root of every error that the package raises on purpose."""


class OptionError(JaxTrainerError, TypeError):
    """An option that does not exist, or has the wrong type."""


class ConfigError(JaxTrainerError, ValueError):
    """Options, hooks or limits that cannot work, found before anything compiles."""


class DataError(JaxTrainerError, ValueError):
    """A loader or a batch that cannot be trained on."""


class BatchSpecError(DataError):
    """A batch whose structure, shape or dtype differs from the first one's."""


class StepError(JaxTrainerError, TypeError):
    """A step that returned, or changed, something that the compiled program cannot carry."""


class LogError(JaxTrainerError, ValueError):
    """A value that `log` cannot record."""


class AttributeChangedError(JaxTrainerError, AttributeError):
    """An attribute written where the compiled step would never see the new value."""


class CheckpointError(JaxTrainerError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint path under which there is none."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint of another model, optimiser or loader."""


class RunDirError(CheckpointError, FileExistsError):
    """A run directory that cannot be written, or belongs to another run."""


class MissingExtraError(JaxTrainerError, ImportError):
    """An optional dependency that is not installed."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def checks_options(init: Callable[P, R]) -> Callable[P, R]:
    """Decorate an `__init__` so that a misspelt keyword names the close match.

    Example:
        >>> class Box:
        ...     @checks_options
        ...     def __init__(self, *, width: int = 1): ...
        >>> Box(widht=2)
        Traceback (most recent call last):
        ...
        jaxtrainer.errors.OptionError: Box got an unknown option 'widht'. Did you mean 'width'?
    """
    names = [n for n in inspect.signature(init).parameters if n != "self"]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                hint = did_you_mean(name, names) or f" Options: {', '.join(names)}."
                owner = type(args[0]).__name__ if args else init.__qualname__
                raise OptionError(f"{owner} got an unknown option {name!r}.{hint}")
        return init(*args, **kwargs)

    return checked
