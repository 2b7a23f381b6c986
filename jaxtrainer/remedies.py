"""What to do about a batch that is not like the first one, for which the step is compiled.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ALLOW = "pass `Trainer(max_recompiles=3)`: up to 3 other shapes are then compiled for, each once"


def is_shorter(got: Any, want: Any) -> bool:
    """Return whether a leaf is what is expected, but for fewer samples."""
    if got.dtype != want.dtype or len(got.shape) != len(want.shape):
        return False
    return got.shape[1:] == want.shape[1:] and got.shape[0] <= want.shape[0]


def allowance(differing: Iterable[tuple[Any, Any]]) -> str:
    """Return what allows leaves `(got, want)` to differ, if that is by the length of axes only."""
    for got, want in differing:
        if got.dtype != want.dtype or len(got.shape) != len(want.shape):
            return ""
    return f"\nor {ALLOW}"


def remedy(got: Any, want: Any) -> str:
    """Return what to write in the loader so that a leaf is like the first batch's.

    Args:
        got: Spec of the leaf, with `shape` and `dtype`.
        want: Spec of the first batch's.

    Example:
        >>> import numpy as np
        >>> remedy(np.zeros((8, 5), np.int32), np.zeros((8, 7), np.int32))
        'pad every batch in the loader to one shape: `np.pad(x, [(0, 0), (0, 2)])`'
    """
    if got.dtype != want.dtype:
        return f"cast it in the loader: `x.astype({str(want.dtype)!r})`"
    if len(got.shape) != len(want.shape):
        return "reshape it in the loader"
    gaps = [w - g for g, w in zip(got.shape, want.shape, strict=True)]
    if gaps[0] < 0:
        return "use one batch size, the first batch's, in the whole epoch"
    if min(gaps) < 0:
        return "pad every batch in the loader to the longest, or crop to one shape"
    widths = ", ".join(f"(0, {gap})" for gap in gaps[1:])
    return f"pad every batch in the loader to one shape: `np.pad(x, [(0, 0), {widths}])`"
