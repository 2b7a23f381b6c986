"""`Timer`: how long epochs took, where the time went, and a limit on it.

Reads the run's monotonic clock only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, Literal, final

import rich
from rich.console import Console, Group, RenderableType
from rich.text import Text

from jaxtrainer import distributed
from jaxtrainer.callback import Callback
from jaxtrainer.display.report import phase_table
from jaxtrainer.display.text import format_seconds
from jaxtrainer.duration import Duration, parse_duration
from jaxtrainer.errors import ConfigError, checks_options, did_you_mean
from jaxtrainer.run import Run
from jaxtrainer.types import Stage

STAGES: tuple[Stage, ...] = ("train", "validate", "test", "predict")
PHASES: dict[str, str] = {
    "init": "initialisation",
    "compile": "compilation",
    "tune": "tuning",
    "data": "waiting for data",
    "device": "waiting for the device",
    "dispatch": "dispatch",
    "validate": "validation",
    "checkpoint": "checkpoints",
}
"""How the report calls the phases of `run.timings`, in its order."""


def named_phases(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of `run.timings` by what the report calls the phases, in its order."""
    known = {name: seconds.get(key, 0.0) for key, name in PHASES.items()}
    return {**known, **{key: s for key, s in seconds.items() if key not in PHASES}}


@final
class Timer(Callback):
    """Times stages and epochs, reports where the time went, and can end a run.

    Times are in seconds of the run's monotonic clock. A checkpoint keeps those of the stages,
    so that a resumed run goes on counting; epochs are those of this call of `fit`.

    Args:
        duration: How long to train: `"DD:HH:MM:SS"`, a `timedelta`, a dict such as
            `{"hours": 2}`, or seconds. The run then stops with the reason `"max_time"`.
        interval: Where the duration is checked: after each `"step"` (each dispatch, where several
            steps are fused) or each `"epoch"`.
        verbose: Whether to print the report at the end of `fit`.
        console: Where to print it; the console that `rich.print` uses by default.

    Attributes:
        first_epoch_s: The first epoch and the compilation before it; None until it has ended.
        epoch_times_s: Every epoch that was run to its end, with the validation and saving in it;
            compilation before the first epoch is not counted here.

    Example:
        >>> timer = Timer(duration={"minutes": 30}, interval="epoch")
        >>> timer.time_remaining()
        1800.0
    """

    may_log = False

    @checks_options
    def __init__(
        self,
        duration: Duration | None = None,
        *,
        interval: Literal["step", "epoch"] = "step",
        verbose: bool = True,
        console: Console | None = None,
    ) -> None:
        if interval not in ("step", "epoch"):
            hint = did_you_mean(str(interval), ("step", "epoch"))
            raise ConfigError(f"Timer(interval={interval!r}): use 'step' or 'epoch'.{hint}")
        self.duration_s = None if duration is None else parse_duration(duration)
        self.interval = interval
        self.verbose = verbose
        self.console = console
        self._clock: Callable[[], float] | None = None
        self._reset_stages()
        self._reset_epochs()
        if self.duration_s is not None and interval == "step":
            # Set here and not in the class: a hook that runs after each dispatch costs a little.
            self.on_save_point = self._check

    def _reset_stages(self) -> None:
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}
        self._earlier_s: dict[str, float] = {}

    def _reset_epochs(self) -> None:
        self.first_epoch_s: float | None = None
        self.epoch_times_s: list[float] = []
        self._first_epoch = 0
        self._epoch_start: float | None = None
        self._compile_s = 0.0
        self._total_s = 0.0
        self._phases_s: dict[str, float] = {}

    def time_elapsed(self, stage: Stage = "train") -> float:
        """Return the seconds spent in a stage so far, those before a resume included."""
        _check_stage(stage)
        return self._earlier_s.get(stage, 0.0) + self._current_s(stage)

    def _current_s(self, stage: str) -> float:
        start = self._start.get(stage)
        if start is None or self._clock is None:
            return 0.0
        end = self._end.get(stage)
        return (self._clock() if end is None else end) - start

    def time_remaining(self, stage: Stage = "train") -> float | None:
        """Return the seconds of the duration that are left, 0 at least; None without one."""
        if self.duration_s is None:
            return None
        return max(self.duration_s - self.time_elapsed(stage), 0.0)

    def start_time(self, stage: Stage = "train") -> float | None:
        """Return when the stage last started, on the run's clock."""
        _check_stage(stage)
        return self._start.get(stage)

    def end_time(self, stage: Stage = "train") -> float | None:
        """Return when the stage last ended; None while it runs."""
        _check_stage(stage)
        return self._end.get(stage)

    @property
    def average_epoch_s(self) -> float | None:
        """The mean of the epochs after the first, which pays for warming up; None without one."""
        later = self.epoch_times_s[1:]
        return fmean(later) if later else None

    def setup(self, run: Run) -> None:
        """Take the run's clock."""
        self._clock = run.clock
        if run.stage == "fit":
            self._reset_stages()
            self._reset_epochs()

    def teardown(self, run: Run) -> None:
        """Stop counting what an exception cut short."""
        for stage in self._start:
            self._finish(stage)

    def on_compile_end(self, run: Run, name: str, seconds: float) -> None:
        """Count what is compiled before the first epoch."""
        if self._epoch_start is None:
            self._compile_s += seconds

    def on_train_start(self, run: Run) -> None:
        """Start counting; a resumed run may have used up its time."""
        self._begin("train")
        self._first_epoch = run.epoch
        self._epoch_start = run.clock()
        self._check(run)

    def on_train_epoch_start(self, run: Run) -> None:
        """Start the epoch's time."""
        self._epoch_start = run.clock()

    def on_train_epoch_end(self, run: Run) -> None:
        """Take the epoch's time, if it was run to its end."""
        if run.is_epoch_end and self._epoch_start is not None:
            self.epoch_times_s.append(run.clock() - self._epoch_start)
        if self.first_epoch_s is None and self.epoch_times_s:
            self.first_epoch_s = self._compile_s + self.epoch_times_s[0]
        self._check(run)

    def on_train_end(self, run: Run) -> None:
        """Stop counting."""
        self._finish("train")

    def on_validation_start(self, run: Run) -> None:
        """Start counting."""
        self._begin("validate")

    def on_validation_end(self, run: Run) -> None:
        """Stop counting."""
        self._finish("validate")

    def on_test_start(self, run: Run) -> None:
        """Start counting."""
        self._begin("test")

    def on_test_end(self, run: Run) -> None:
        """Stop counting."""
        self._finish("test")

    def on_predict_start(self, run: Run) -> None:
        """Start counting."""
        self._begin("predict")

    def on_predict_end(self, run: Run) -> None:
        """Stop counting."""
        self._finish("predict")

    def on_fit_end(self, run: Run) -> None:
        """Take the run's timings, and print the report."""
        self._total_s = run.timings.elapsed_s
        self._phases_s = named_phases(run.timings.seconds)
        if self.verbose and distributed.is_first():
            (rich.get_console() if self.console is None else self.console).print(self)

    def _check(self, run: Run) -> None:
        is_over = self.time_remaining() == 0.0 and not run.should_stop
        if run.agree(self.state_key, is_over):
            limit = format_seconds(self.duration_s or 0.0)
            run.notice(f"Timer: the training time of {limit} is used up.")
            run.stop("max_time")

    def _begin(self, stage: Stage) -> None:
        self._earlier_s[stage] = self.time_elapsed(stage)
        self._start[stage] = self._now()
        self._end.pop(stage, None)

    def _finish(self, stage: str) -> None:
        self._end.setdefault(stage, self._now())

    def _now(self) -> float:
        return 0.0 if self._clock is None else self._clock()

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of each stage."""
        elapsed = {stage: self.time_elapsed(stage) for stage in STAGES}
        return {"elapsed_s": {stage: s for stage, s in elapsed.items() if s > 0.0}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from those seconds."""
        self._reset_stages()
        self._earlier_s.update({k: float(s) for k, s in state["elapsed_s"].items()})

    def summary(self) -> str:
        """Return the times of the epochs, as `compile + epoch 1: 4.03 s`."""
        if self.first_epoch_s is None:
            return "no epoch has ended yet"
        lines = [f"compile + epoch {self._first_epoch + 1}: {format_seconds(self.first_epoch_s)}"]
        if self.average_epoch_s is not None:
            lines.append(f"later epochs: {format_seconds(self.average_epoch_s)} average")
        return "\n".join(lines)

    def __rich__(self) -> RenderableType:
        """Return the report: the epochs, and where the time went."""
        summary = Text(self.summary())
        return (
            Group(summary, phase_table(self._phases_s, self._total_s)) if self._total_s else summary
        )

    def __str__(self) -> str:
        console = Console(width=80, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip()


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        hint = did_you_mean(stage, STAGES)
        raise ConfigError(f"Got the stage {stage!r}; use one of {', '.join(STAGES)}.{hint}")
