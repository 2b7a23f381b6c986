"""`Isolated`: a callback without which training goes on, should one of its hooks fail.

May import `run`.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

from jaxtrainer.run import Run


class Isolated:
    """The hooks of one callback with `critical=False`; the first that fails disables the others.

    Its `teardown` runs all the same, so that what it has opened is closed.

    Args:
        owner: The callback.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.is_off = False

    def guard(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return the hook as one that does not fail."""

        def guarded(*args: Any) -> Any:
            if self.is_off and name != "teardown":
                return None
            try:
                return hook(*args)
            except Exception as error:
                self._disable(name, error, args)
                return None

        return guarded

    def _disable(self, name: str, error: Exception, args: tuple[Any, ...]) -> None:
        if self.is_off:
            return
        self.is_off = True
        where = f"{type(self.owner).__name__}.{name}"
        what = f"{type(error).__name__}: {error}"
        for run in (a for a in args if isinstance(a, Run)):
            run.notice(f"{where} failed ({what}) and is not critical: it is left out from here on")
        trace = "".join(traceback.format_exception(error))
        warnings.warn(
            f"{where} failed and is not critical (`critical = False`): the callback is left out "
            f"from here on.\n{trace}",
            RuntimeWarning,
            stacklevel=3,
        )


def isolated(owners: list[Any]) -> dict[int, Isolated]:
    """Return an `Isolated` for each callback that is not critical, by its id."""
    return {id(o): Isolated(o) for o in owners if not getattr(o, "critical", True)}
