"""Patterns of the paths of modules and parameters, as options take them.

Imports `errors` only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable

from jaxtrainer.errors import ConfigError, did_you_mean

_SHOWN = 12
"""Paths that a message names."""


def parents(path: str) -> list[str]:
    """Return what a path is below, outer ones in front, and the path itself.

    Example:
        >>> parents("blocks/0/norm")
        ['blocks', 'blocks/0', 'blocks/0/norm']
    """
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


def covers(pattern: str, path: str) -> bool:
    """Return whether a path is what the pattern names, or below it.

    `*`, `?` and `[...]` are as in an `Optimizer`'s `wrt`: `*` stands for any characters, `/` too.

    Example:
        >>> [covers("*/norm", path) for path in ("blocks/0/norm/scale", "norm_out")]
        [True, False]
    """
    return any(fnmatch.fnmatchcase(part, pattern) for part in parents(path))


def refuse_unmatched(option: str, patterns: Iterable[str], paths: Collection[str]) -> None:
    """Raise ConfigError for a pattern that names none of the paths.

    Args:
        option: What the patterns were passed to, for the message: `"remat"`.
        patterns: As `covers` takes them.
        paths: Of what there is.
    """
    for pattern in patterns:
        if any(covers(pattern, path) for path in paths):
            continue
        known = sorted({part for path in paths for part in parents(path)})
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        hint = did_you_mean(pattern, known)
        raise ConfigError(
            f"{option}: {pattern!r} matches nothing in the model; there are "
            f"{', '.join(known[:_SHOWN]) or 'no modules'}{more}.{hint}"
        )
