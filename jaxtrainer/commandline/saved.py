"""The resolved configuration of a run, kept beside what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxtrainer.callback import Callback
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.distributed import is_first
from jaxtrainer.errors import RunDirError
from jaxtrainer.loggers.logger import set_aside
from jaxtrainer.remote import is_url
from jaxtrainer.run import Run

if TYPE_CHECKING:
    from jaxtrainer.trainer import Trainer

FILE = "config.yaml"


class SavedConfiguration(Callback):
    """Write the configuration before training begins; one of an earlier run is kept beside it.

    Args:
        text: YAML.
        root: The trainer's `default_root_dir`, if it was given.

    Attributes:
        trainer: Whose callbacks and loggers say where; set before the call.
    """

    may_log = False

    def __init__(self, text: str, root: str | None) -> None:
        # Private: it is no setting of the run, whose record would have it a second time.
        self._text, self._root = text, root
        self.trainer: Trainer | None = None

    def on_fit_start(self, run: Run) -> None:
        """Write it. All that could refuse the run has been asked by now."""
        directory = self._directory()
        if directory is None or not is_first():
            return
        path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.read_text(encoding="utf-8") == self._text:
                return
            set_aside(path)
            path.write_text(self._text, encoding="utf-8")
        except OSError as error:
            raise RunDirError(f"cannot write {path}: {error}.") from error

    def _directory(self) -> Path | None:
        if self.trainer is None:
            return None
        saves = [c.dirpath for c in self.trainer.callbacks if isinstance(c, Checkpoint)]
        root = Path(self._root or ".")
        logs = [root / x.directory for x in self.trainer.loggers if x.directory is not None]
        places = [*(Path(s) for s in saves if not is_url(s)), *logs]
        return places[0] if places else Path(self._root) if self._root else None
