"""`Report`: what a run leaves for its readers: a record on the disk, and a page about it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import final

import jax

from jaxtrainer.account import RUN_FILE, joined, read_record, write_account
from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, RunDirError, checks_options
from jaxtrainer.page import FILE_NAME, write_report
from jaxtrainer.remote import refuse_url
from jaxtrainer.result import FitResult
from jaxtrainer.run import History, Run


@final
class Report(Callback):
    """Write `report.html` and `run.json` at the end of `fit`, also where an error ends it.

    The page has the curves, the configuration, the environment, timings and checkpoints; it is one
    file that opens without a server, and fetches and executes nothing. From `run.json`
    `jaxtrainer.plot` and `jaxtrainer.report` read the run again. A resumed run goes on in them.
    It has no hook that runs during training.

    Args:
        dirpath: Directory for the two files; that of the `Checkpoint` is a good one, whose
            checkpoints are then listed.

    Raises:
        ConfigError: If it is no directory on a disk.

    Example:
        >>> report = Report("runs/mnist")
    """

    order = 2
    may_log = False
    critical = False

    @checks_options
    def __init__(self, dirpath: str | os.PathLike[str]) -> None:
        if not isinstance(dirpath, str | os.PathLike) or not os.fspath(dirpath):
            raise ConfigError(f"Report needs a directory, got {dirpath!r}; `Report('runs/mnist')`.")
        refuse_url("Report", dirpath)
        self.given_dirpath = os.fspath(dirpath)
        self.dirpath = self.given_dirpath
        self._earlier = History()
        self._is_open = False
        self._error = ""

    def on_fit_start(self, run: Run) -> None:
        """Take what was recorded before the step that a run resumes from."""
        self._earlier, self._error, self._is_open = History(), "", jax.process_index() == 0
        if run.resumed_step is not None:
            # A damaged file is written anew.
            with contextlib.suppress(RunDirError):
                record = read_record(Path(self.dirpath) / RUN_FILE) or {}
                self._earlier = record.get("history", History()).until(run.resumed_step)

    def on_exception(self, run: Run, exception: BaseException) -> None:
        """Keep what ends the run."""
        self._error = f"{type(exception).__name__}: {exception}".partition("\n")[0]

    def teardown(self, run: Run) -> None:
        """Write both, once everything else has ended."""
        if not self._is_open:
            return
        self._is_open = False
        account = FitResult.of(run).account()
        account = replace(
            account,
            name=Path(self.dirpath).resolve().name,
            history=joined(self._earlier, account.history),
            stop_reason=self._error or account.stop_reason,
        )
        write_account(self.dirpath, account)
        write_report(account, Path(self.dirpath) / FILE_NAME)
