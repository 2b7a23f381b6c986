"""`OnExceptionCheckpoint`: what was trained so far survives the exception that ends the run."""

from __future__ import annotations

import os
from functools import singledispatch
from pathlib import Path

import jax

from jaxtrainer import distributed
from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, RunDirError, checks_options
from jaxtrainer.guard import unfit
from jaxtrainer.places import check_place, place
from jaxtrainer.remote import RemotePath
from jaxtrainer.run import Run
from jaxtrainer.rundir import probe, saved_steps
from jaxtrainer.store import CheckpointStore


class OnExceptionCheckpoint(Callback):
    """Save the whole state when training ends by an exception, Ctrl-C or SIGTERM.

    The path is in a note of the exception, below its traceback, and in `path`; `fit` goes on from
    it with `ckpt_path=`. A run that ends well leaves nothing. Nothing is saved either if the
    exception came while the state was being changed, or the state is not finite, and then the note
    says that.

    Args:
        dirpath: Run directory. If it has checkpoints that this run does not go on from, the
            first free one of `dirpath-2`, `dirpath-3`, ... is used, so that no crash is refused.

    Attributes:
        path: Directory of the checkpoint; None if none was needed.

    Raises:
        RunDirError: Before compilation, if nothing can be written there.

    Example:
        >>> callback = OnExceptionCheckpoint("runs/mnist/crash")
    """

    order = 2

    @checks_options
    def __init__(self, dirpath: str | os.PathLike[str]) -> None:
        if not isinstance(dirpath, str | os.PathLike):
            raise ConfigError(f"OnExceptionCheckpoint needs a run directory, got {dirpath!r}.")
        check_place(dirpath)
        self.given_dirpath = os.fspath(dirpath)
        self.dirpath = self.given_dirpath
        self.path: str | None = None

    def setup(self, run: Run) -> None:
        """Find out that nothing can be written now, not when it is needed."""
        self.path = None
        if run.stage == "fit":
            _check_writable(place(self.dirpath))

    def on_train_end(self, run: Run) -> None:
        """Save if a signal has ended training: that is no exception inside the run."""
        if run.stop_reason == "interrupted" and not unfit(run.state):
            self._save(run)

    def on_exception(self, run: Run, exception: BaseException) -> None:
        """Save what is there to save."""
        if run.capture is None or not run.total_batches or self.path is not None:
            return
        try:
            if distributed.count() > 1:
                note = "no checkpoint: only this process knows of the exception"
            elif not _is_whole(run):
                note = "no checkpoint: the exception came while a step was changing the state"
            elif why := unfit(run.state):
                note = f"no checkpoint: {why}"
            else:
                self._save(run)
                note = f"the state is saved; go on with `fit(..., ckpt_path={self.path!r})`"
        except Exception as error:
            # The exception that ends the run is the one to be seen.
            note = f"no checkpoint: {error}"
        exception.add_note(note)

    def _save(self, run: Run) -> None:
        assert run.capture is not None
        step = run.global_step
        store = CheckpointStore(self._directory(run), resumed_step=run.resumed_step)
        try:
            store.save(step, run.capture())
        finally:
            store.close()
        self.path = run.last_checkpoint = str(store.path(step))

    def _directory(self, run: Run) -> Path:
        base = place(self.dirpath)
        resumed_step, number, directory = run.resumed_step or 0, 1, base
        while any(s > resumed_step or s == run.global_step for s in saved_steps(directory)):
            number += 1
            directory = base.with_name(f"{base.name}-{number}")
        return directory


def _is_whole(run: Run) -> bool:
    """Return whether the state is alive, and of the batch that the run's counters say."""
    if any(array.is_deleted() for array in jax.tree.leaves(run.state)):
        return False
    return int(run.state.batch_count) == run.total_batches


@singledispatch
def _check_writable(directory: Path) -> None:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RunDirError(
            f"cannot write in {directory}: {existing} is "
            f"{'not writable' if existing.is_dir() else 'no directory'}; pass "
            "`OnExceptionCheckpoint` a directory that can be written, or made."
        )


@_check_writable.register(RemotePath)
def _probe_remote(directory: RemotePath) -> None:
    probe(directory)
