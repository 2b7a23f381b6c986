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


class DataTimeoutError(DataError, TimeoutError):
    """A loader that did not answer within `Trainer(data_timeout=...)`."""


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


class CheckpointCorruptError(CheckpointError, ValueError):
    """A checkpoint whose files are not what was written."""


class CheckpointWarning(UserWarning):
    """A checkpoint that was not saved, or was passed over because it is damaged."""


class LoggerWarning(UserWarning):
    """A logger that fails, while training goes on."""


class RunDirError(CheckpointError, FileExistsError):
    """A run directory that cannot be written, or belongs to another run."""


class NonFiniteError(JaxTrainerError, FloatingPointError):
    """A loss or gradients with NaN or infinity, where a callback asked for an error.

    Attributes:
        evidence: What running the batch once more has shown: `replay.Evidence`, or None.
    """

    evidence: object = None


class DistributedError(JaxTrainerError, RuntimeError):
    """Processes of one run that could not come together, or do not agree."""


class DistributedTimeoutError(DistributedError, TimeoutError):
    """A process that the others have waited for in vain."""


class MissingExtraError(JaxTrainerError, ImportError):
    """An optional dependency that is not installed."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string.

    Example:
        >>> did_you_mean("epochs", ["max_epochs", "min_epochs", "seed"])
        " Did you mean 'max_epochs' or 'min_epochs'?"
    """
    likeness = {k: difflib.SequenceMatcher(None, k, name).ratio() for k in known}
    best = max(likeness.values(), default=0.0)
    close = [repr(k) for k, ratio in likeness.items() if ratio == best >= cutoff]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def checks_options(init: Callable[P, R]) -> Callable[P, R]:
    """Decorate an `__init__` or a method so that a misspelt keyword names the close match.

    Where the class has a dict `_elsewhere`, it says what takes the place of other options.

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
                raise OptionError(_unknown_option(type(args[0]), init, name, names))
        return init(*args, **kwargs)

    return checked


def refuse_unknown(method: Callable[..., object], unknown: Iterable[str]) -> None:
    """Raise OptionError if there are keywords that a bound method does not know.

    For a method that takes `**unknown: Never`, where the frame of `checks_options` would stay on
    the stack of every training step.
    """
    names = [n for n in inspect.signature(method).parameters if n != "unknown"]
    for name in unknown:
        owner = type(getattr(method, "__self__", None))
        raise OptionError(_unknown_option(owner, method, name, names))


def _unknown_option(
    owner: type, init: Callable[..., object], name: str, names: Iterable[str]
) -> str:
    what = owner.__name__ if init.__name__ == "__init__" else f"{owner.__name__}.{init.__name__}"
    instead = getattr(owner, "_elsewhere", {}).get(name)
    hint = f" {instead}" if instead else did_you_mean(name, names)
    return f"{what} got an unknown option {name!r}.{hint or ' Options: ' + ', '.join(names) + '.'}"
