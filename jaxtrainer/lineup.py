"""Which callbacks a call of the trainer has: checked, completed by the module's, placed on disk.

May import levels 0 to 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxtrainer import distributed
from jaxtrainer.callback import Callback
from jaxtrainer.callbacks.checkpoint import Checkpoint
from jaxtrainer.callbacks.non_finite import NonFinite
from jaxtrainer.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from jaxtrainer.callbacks.prediction_writer import PredictionWriter
from jaxtrainer.callbacks.profiler import Profiler
from jaxtrainer.callbacks.progress_bar import ProgressBar
from jaxtrainer.checkpoint import find_checkpoint
from jaxtrainer.checks import is_overridden
from jaxtrainer.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    did_you_mean,
)
from jaxtrainer.hooks import tunes
from jaxtrainer.module import TrainModule
from jaxtrainer.places import placed

_SAVERS = (Checkpoint, OnExceptionCheckpoint, PredictionWriter)


class Lineup:
    """The trainer's callbacks.

    Args:
        given: A callback or several.
        with_bar: Add a `ProgressBar` if there is none.
        saves: Keep the callbacks that write files, or look for sizes and rates.
        root: Directory that their relative directories are in.

    Raises:
        ConfigError: For what is no callback, or two that would keep their state under one name.
    """

    def __init__(self, given: Any, *, with_bar: bool, saves: bool, root: Path) -> None:
        self.saves = saves
        self.root = root
        self.callbacks = self._checked(given)
        if with_bar and not any(isinstance(c, ProgressBar) for c in self.callbacks):
            self.callbacks.append(ProgressBar())
        _check_keys(self.callbacks)

    def for_module(self, module: TrainModule) -> list[Callback]:
        """Return the callbacks and the module's own, which take the place of their like."""
        added = module.configure_callbacks() if is_overridden(module, "configure_callbacks") else ()
        if added is None:
            owner = type(module).__name__
            raise ConfigError(f"{owner}.configure_callbacks returned None; return a list.")
        added = self._checked(added)
        kept = [c for c in self.callbacks if not any(_replaces(new, c) for new in added)]
        _check_keys([*kept, *added])
        _check_restores([*kept, *added])
        return [*kept, *added]

    def _checked(self, given: Any) -> list[Callback]:
        several = isinstance(given, Iterable) and not isinstance(given, str | type)
        callbacks: list[Any] = list(given) if several else [given]
        for callback in callbacks:
            if not isinstance(callback, Callback):
                hint = f"; write `{callback.__name__}()`" if isinstance(callback, type) else ""
                raise ConfigError(f"callbacks must be Callback instances, got {callback!r}{hint}.")
        kept = [c for c in callbacks if self.saves or not (isinstance(c, _SAVERS) or tunes(c))]
        for callback in kept:
            self._place(callback)
        return kept

    def _place(self, callback: Callback) -> None:
        if (
            isinstance(callback, (*_SAVERS, Profiler, NonFinite))
            and callback.given_dirpath is not None
        ):
            callback.dirpath = placed(self.root, callback.given_dirpath)


def find_saved(
    ckpt_path: Any, callbacks: Iterable[Callback], *, may_fall_back: bool = False
) -> Path | None:
    """Return the step directory that `ckpt_path` means: `"last"`, `"best"`, a path, or None.

    Args:
        ckpt_path: As in `fit`.
        callbacks: Among them, perhaps, a `Checkpoint`.
        may_fall_back: Whether `"last"` may be an earlier one, where the last is damaged.

    Raises:
        ConfigError: If it is nothing of these.
        CheckpointNotFoundError: If there is no such checkpoint.
    """
    if ckpt_path is None:
        return None
    found: Path | None = None
    error: Exception | None = None
    try:
        found = _found(ckpt_path, callbacks, may_fall_back)
    except (ConfigError, CheckpointError) as caught:
        error = caught
    told = distributed.gather(str(error or found), "checkpoint to start from")
    if error is not None:
        raise error
    if {*told} != {str(found)}:
        lines = "\n".join(f"  process {i}: {text}" for i, text in enumerate(told))
        raise CheckpointError(
            f"ckpt_path={ckpt_path!r} is not the same for all processes:\n{lines}\nA run "
            "directory must be on a file system that all hosts share."
        )
    return found


def _found(ckpt_path: Any, callbacks: Iterable[Callback], may_fall_back: bool) -> Path:
    if not isinstance(ckpt_path, str | os.PathLike):
        raise ConfigError(f"ckpt_path={ckpt_path!r}: pass 'last', 'best' or a directory.")
    if ckpt_path not in ("last", "best"):
        hint = did_you_mean(os.fspath(ckpt_path), ("last", "best"))
        if hint and not os.path.exists(ckpt_path):
            raise CheckpointNotFoundError(f"ckpt_path={ckpt_path!r} is no directory.{hint}")
        return find_checkpoint(ckpt_path)
    saver = next((c for c in callbacks if isinstance(c, Checkpoint)), None)
    if saver is None:
        raise CheckpointNotFoundError(
            f"ckpt_path={ckpt_path!r} means a checkpoint of the `Checkpoint` callback, and "
            "there is none; pass `Trainer(callbacks=[Checkpoint('runs/...')])`, or a path."
        )
    return saver.find(str(ckpt_path), may_fall_back=may_fall_back)


def _replaces(new: Callback, old: Callback) -> bool:
    return type(old) is not Callback and isinstance(new, type(old))


def _check_restores(callbacks: Iterable[Callback]) -> None:
    callbacks = list(callbacks)
    restores = any(isinstance(c, NonFinite) and c.policy == "restore" for c in callbacks)
    if restores and not any(isinstance(c, Checkpoint) for c in callbacks):
        raise ConfigError(
            "NonFinite('restore') goes back to the last checkpoint, and there is no `Checkpoint`: "
            "add `Checkpoint('runs/...')` to the callbacks, or use `NonFinite('skip')`."
        )


def _check_keys(callbacks: Iterable[Callback]) -> None:
    keys = [c.state_key for c in callbacks if c.state_dict()]
    if twice := {k for k in keys if keys.count(k) > 1}:
        raise ConfigError(
            f"several callbacks keep their state under {', '.join(twice)}; override `state_key`, "
            "or give Checkpoints directories of different names."
        )
