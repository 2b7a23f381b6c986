"""Predictions of a whole call as one NumPy archive."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrainer.distributed import is_first
from jaxtrainer.errors import ConfigError, RunDirError


def check_free(path: Path) -> None:
    """Raise before anything compiles if the file is there already, or cannot be.

    Raises:
        RunDirError: Saying which.
    """
    if path.exists():
        raise RunDirError(f"{path} is there already; move it away, or pass another `--output`.")
    if not path.absolute().parent.is_dir():
        raise RunDirError(f"--output {path}: there is no directory {path.parent}; make it.")


def write_archive(path: Path, predictions: Any) -> None:
    """Write arrays `[rows, ...]` by name: `predictions`, or those of the tree.

    Args:
        path: `FILE.npz`.
        predictions: As `Trainer.predict` returns them; of several loaders `loader/name`.
    """
    if not is_first():
        return
    by_loader = predictions if isinstance(predictions, Mapping) else {"": predictions}
    arrays = {
        f"{loader}/{name}".strip("/"): np.concatenate(parts)
        for loader, batches in by_loader.items()
        for name, parts in _leaves(batches).items()
    }
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    os.replace(partial, path)


def _leaves(batches: Any) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for where, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
            name = jax.tree_util.keystr(where, simple=True, separator="/") or "predictions"
            array = np.asarray(leaf)
            if array.ndim == 0:
                raise ConfigError(
                    f"{name!r} of predict_step has no rows: return arrays [batch, ...], or write "
                    "batches to `--output DIRECTORY`."
                )
            # NumPy's file format knows no bfloat16.
            is_small = array.dtype.kind == "V" or array.dtype.name == "bfloat16"
            found.setdefault(name, []).append(array.astype(np.float32) if is_small else array)
    return found
