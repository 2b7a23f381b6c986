"""`Loggers`: all loggers of a trainer, as one callback that hands them what the run records."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, LoggerWarning
from jaxtrainer.loggers.logger import Call, Logger
from jaxtrainer.loggers.outbox import Outbox
from jaxtrainer.metrics import is_private
from jaxtrainer.module import TrainModule
from jaxtrainer.records import End, HyperParameters, Record
from jaxtrainer.run import Run
from jaxtrainer.settings import of_module

_CALLS = ("fit", "validate", "test", "predict")
_COUNTERS = {"step": "global_step", "epoch": "epoch", "samples": "samples"}
Place = Mapping[str, int]


class Loggers(Callback):
    """Hands records to the thread of each logger, and ends them with the call.

    Comes after all callbacks, so that what they record is in. Where several processes train, only
    process 0 has loggers.

    Args:
        given: A logger or several; None, False or an empty list for none.
        root: Directory that their relative directories are in.
        options: What the trainer was made with, as plain data.
        writes: Whether to log at all.

    Raises:
        ConfigError: For what is no logger.
    """

    order = 3
    may_log = False
    _of_first_process = True

    def __init__(
        self, given: Any, root: Path, options: Mapping[str, Any], *, writes: bool = True
    ) -> None:
        self.loggers = _checked(given)
        self._writes = writes and bool(self.loggers)
        self._root = root
        self._options = options
        self._outboxes = [Outbox(logger) for logger in self.loggers]
        self._failure = ""
        self._has_warned: set[int] = set()
        self._module: TrainModule | None = None
        self._place: Place | None = None

    def of_call(self, call: str) -> list[Callback]:
        """Return what takes part in a call as a callback: itself, or nothing."""
        is_due = self._writes and call in _CALLS and jax.process_index() == 0
        return [self] if is_due else []

    def begin(self, run: Run, module: TrainModule, saved: Mapping[str, Any] | None) -> None:
        """Take what a run records, from here on.

        Args:
            run: Record of a call that has not begun yet.
            module: Its hyper-parameters are logged.
            saved: Record of the checkpoint that the call starts from, if any.
        """
        if not self.of_call(run.stage):
            return
        self._module, self._failure = module, ""
        self._place = None if run.stage == "fit" else _place(module, saved)
        self._has_warned.clear()
        for outbox in self._outboxes:
            outbox.begin(self._root, _call(run))
        run.emit = self._handing(run)

    def setup(self, run: Run) -> None:
        """Refuse what cannot work, before anything compiles."""
        for logger in self.loggers:
            logger.check(self._root, _call(run))

    def on_fit_start(self, run: Run) -> None:
        """Log the hyper-parameters."""
        if run.emit is not None and self._module is not None:
            values = {"module": of_module(self._module), "trainer": self._options}
            run.emit(HyperParameters(axes=run.axes(), values=values))

    def on_exception(self, run: Run, exception: BaseException) -> None:
        """Keep what ended the run."""
        self._failure = type(exception).__name__

    def teardown(self, run: Run) -> None:
        """Write what is left, for a bounded time, and say what was not written."""
        emit, run.emit = run.emit, None
        if emit is not None and any(outbox.has_begun for outbox in self._outboxes):
            emit(self._end(run))
        for outbox in self._outboxes:
            outbox.end()
        began = time.monotonic()
        for outbox in self._outboxes:
            spent_s = time.monotonic() - began
            outbox.join(max(0.0, outbox.logger.flush_timeout_s - spent_s))
            self._tell(run, outbox)
            if outbox.dropped:
                run.notice(f"{outbox.name} has not written {outbox.dropped} records")

    def _handing(self, run: Run) -> Callable[[Record], None]:
        def hand(record: Record) -> None:
            if self._place is not None:
                record = replace(record, axes=replace(record.axes, **self._place))
            for outbox in self._outboxes:
                outbox.put(record)
                if outbox.has_news:
                    self._tell(run, outbox)

        return hand

    def _end(self, run: Run) -> End:
        cut = run.stop_reason == "interrupted"
        status = "failed" if self._failure else "interrupted" if cut else "finished"
        metrics = {k: v for k, v in run.metrics.items() if not is_private(k)}
        reason = self._failure or run.stop_reason
        return End(axes=run.axes(), status=status, reason=reason, metrics=metrics)

    def _tell(self, run: Run, outbox: Outbox) -> None:
        for line in outbox.news():
            run.notice(f"{line}; training goes on")
            if id(outbox) not in self._has_warned:
                self._has_warned.add(id(outbox))
                warnings.warn(f"{line}; training goes on.", LoggerWarning, stacklevel=2)


def _call(run: Run) -> Call:
    # At `setup` the stage is still the call.
    return Call(stage=run.stage, resumed_step=run.resumed_step)


def _place(module: TrainModule, saved: Mapping[str, Any] | None) -> Place | None:
    """Return how far the model that is evaluated was trained, as far as that is known."""
    if saved is not None:
        return {axis: saved["loop"][name] for axis, name in _COUNTERS.items()}
    last = module.run
    return None if last is None else {axis: getattr(last, name) for axis, name in _COUNTERS.items()}


def _checked(given: Any) -> list[Logger]:
    if given is None or given is False:
        return []
    if given is True:
        raise ConfigError(
            "logger=True does not say where to: pass `logger=CSVLogger('runs/x')`, or several in "
            "a list."
        )
    several = isinstance(given, Iterable) and not isinstance(given, str | type)
    loggers: list[Any] = list(given) if several else [given]
    for logger in loggers:
        if not isinstance(logger, Logger):
            hint = f"; write `{logger.__name__}('runs/x')`" if isinstance(logger, type) else ""
            raise ConfigError(f"logger must be a Logger or several, got {logger!r}{hint}.")
    if len({id(logger) for logger in loggers}) < len(loggers):
        raise ConfigError("the same logger is in the list twice; make one for each place.")
    return loggers
