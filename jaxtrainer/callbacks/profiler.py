"""`Profiler`: where the host's time went, hook by hook, and a trace of some steps.

The hooks are timed only where there is a `Profiler`; without one they are called as they are.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import jax
import rich
from rich.console import Console, Group, RenderableType
from rich.table import Table

from jaxtrainer.callback import Callback
from jaxtrainer.display.report import hook_table, named_phases, phase_table
from jaxtrainer.errors import ConfigError, RunDirError, checks_options
from jaxtrainer.remote import refuse_url
from jaxtrainer.result import render
from jaxtrainer.run import Run


@dataclass(kw_only=True)
class HookTime:
    """What one hook of one callback, or of the module, has taken.

    Attributes:
        calls: How often it was called.
        total_s: Seconds in it, less those in hooks that were called inside it.
    """

    calls: int = 0
    total_s: float = 0.0

    @property
    def mean_us(self) -> float:
        """Microseconds of one call."""
        return 1e6 * self.total_s / self.calls if self.calls else 0.0


@final
class Profiler(Callback):
    """Time every hook of every callback and of the module, and trace some steps.

    The table of hooks, and of where else the time of the call went, is printed at its end, also of
    `validate`, `test` and `predict`. Timing a hook costs about a microsecond.

    A trace shows what host and devices did in the steps from the first to the last of `steps`. Its
    file is in the run's notices: `tensorboard --logdir` reads it, and https://ui.perfetto.dev. The
    devices are waited for where it starts and where it stops, so that it has all of these steps
    and no others, and nowhere else. Hooks are in it by their names.

    Args:
        dirpath: Directory for the trace.
        steps: First and last optimiser step to trace, counted from 1, both included. Choose some
            after the first few, which warm up.
        verbose: Print the tables at the end.
        console: Where to print them; the console that `rich.print` uses by default.

    Attributes:
        times: A `HookTime` for each hook that was called, by `"EarlyStopping.on_validation_end"`.
        trace_path: The trace's file for TensorBoard; None if none was made.

    Raises:
        ConfigError: For steps that cannot be traced, or without `dirpath`.
        RunDirError: Before compilation, if nothing can be written there.

    Example:
        >>> profiler = Profiler("runs/mnist/profile", steps=(10, 20))
    """

    order = 2
    may_log = False
    _elsewhere: ClassVar[dict[str, str]] = {
        "filename": "The table is printed to `console=`; `str(profiler)` is its text.",
        "schedule": "Pass `steps=(first, last)`.",
    }

    @checks_options
    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        steps: tuple[int, int] | None = None,
        verbose: bool = True,
        console: Console | None = None,
    ) -> None:
        if (dirpath is None) != (steps is None):
            raise ConfigError(
                f"Profiler(dirpath={dirpath!r}, steps={steps!r}): a trace needs both, "
                "`Profiler('runs/profile', steps=(10, 20))`; the table of hooks neither."
            )
        refuse_url("Profiler", dirpath)
        self.given_dirpath = None if dirpath is None else os.fspath(dirpath)
        self.dirpath = self.given_dirpath
        self.steps = None if steps is None else _checked_steps(steps)
        self.verbose = verbose
        self.console = console
        self.times: dict[str, HookTime] = {}
        self.trace_path: str | None = None
        self._callbacks: list[Callback] = []
        self._run: Run | None = None
        self._elapsed_s: float | None = None
        self._inner_s = 0.0
        self._traced_from: int | None = None
        self._is_traced = False
        if self.steps is not None:
            first, last = self.steps
            self.at_train_steps = (first - 1, last)
            # Set here and not in the class: a hook that runs after each dispatch costs a little.
            self.on_save_point = self.on_validation_start = self._look
            self.on_train_start = self.on_train_epoch_end = self._look

    def wrap_hook(self, name: str, owner: Any, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return the hook with a clock around it."""
        label = ""

        @functools.wraps(hook)
        def timed(run: Run, *args: Any) -> Any:
            nonlocal label
            if run is not self._run:
                self._begin(run)
            label = label or f"{self._label(owner)}.{name}"
            clock, outer_s, self._inner_s = run.clock, self._inner_s, 0.0
            began = clock()
            try:
                with jax.profiler.TraceAnnotation(label):
                    return hook(run, *args)
            finally:
                spent_s = clock() - began
                time = self.times.setdefault(label, HookTime())
                time.calls += 1
                time.total_s += spent_s - self._inner_s
                self._inner_s = outer_s + spent_s

        return timed

    def setup(self, run: Run) -> None:
        """Find out that nothing can be written now, not after the traced steps."""
        self.trace_path, self._is_traced = None, False
        if self.dirpath is not None and run.stage == "fit":
            try:
                Path(self.dirpath).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunDirError(f"Profiler cannot write in {self.dirpath}: {error}") from error

    def on_train_end(self, run: Run) -> None:
        """Stop a trace that the end of the run cuts short."""
        self._stop(run)
        if self.steps is not None and not self._is_traced:
            run.notice(
                f"Profiler: no trace, because training went from step {run.resumed_step or 0} to "
                f"{run.global_step} and steps={self.steps} are not in it"
            )

    def on_exception(self, run: Run, exception: BaseException) -> None:
        """Stop the trace; what was traced until then is kept."""
        self._stop(run)

    def teardown(self, run: Run) -> None:
        """Print the tables."""
        self._elapsed_s = run.timings.elapsed_s
        if self.verbose and jax.process_index() == 0:
            (rich.get_console() if self.console is None else self.console).print(self)

    def table(self) -> Table:
        """Return the table of the hooks, those that took longest first."""
        rows = {k: (t.calls, t.total_s) for k, t in self.times.items()}
        return hook_table(rows, self._total_s)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the table as `{hook: {"calls", "total_s", "mean_us", "share"}}`.

        `share` is that of the time of the whole call.
        """
        whole_s = self._total_s or 1.0
        return {
            name: {
                "calls": time.calls,
                "total_s": time.total_s,
                "mean_us": time.mean_us,
                "share": time.total_s / whole_s,
            }
            for name, time in self.times.items()
        }

    def __rich__(self) -> RenderableType:
        if self._run is None:
            return "nothing was profiled yet"
        phases = phase_table(named_phases(self._run.timings.seconds), self._total_s)
        return Group(self.table(), phases)

    def __str__(self) -> str:
        return render(self.__rich__(), width=100)

    @property
    def _total_s(self) -> float:
        if self._elapsed_s is not None or self._run is None:
            return self._elapsed_s or 0.0
        return self._run.timings.elapsed_s

    def _begin(self, run: Run) -> None:
        self._run, self.times, self._callbacks = run, {}, []
        self._elapsed_s, self._inner_s = None, 0.0

    def _label(self, owner: Any) -> str:
        """Return the owner's class; of a second callback of the same class `"Accuracy 2"`."""
        # The hooks of a data module are on an object of the package's own.
        if not isinstance(owner, Callback) or hasattr(owner, "datamodule"):
            return type(getattr(owner, "datamodule", owner)).__name__
        if not any(owner is known for known in self._callbacks):
            self._callbacks.append(owner)
        alike = [c for c in self._callbacks if type(c) is type(owner)]
        number = next(i for i, known in enumerate(alike, 1) if known is owner)
        return type(owner).__name__ if number == 1 else f"{type(owner).__name__} {number}"

    def _look(self, run: Run) -> None:
        """Start or stop the trace, if this is the place."""
        if self.steps is None or run.stage == "sanity":
            return
        first, last = self.steps
        if self._traced_from is not None and run.global_step >= last:
            self._stop(run)
        elif not self._is_traced and first - 1 <= run.global_step < last:
            self._start(run)

    def _start(self, run: Run) -> None:
        self._is_traced = True
        jax.block_until_ready(run.state)
        try:
            jax.profiler.start_trace(str(self.dirpath))
        except RuntimeError as error:
            # Another trace is running, perhaps the user's own: no reason to end the training.
            run.notice(f"Profiler: no trace: {error}")
        else:
            self._traced_from = run.global_step + 1

    def _stop(self, run: Run) -> None:
        if self._traced_from is None:
            return
        first, self._traced_from = self._traced_from, None
        # Of a step that has failed there is nothing to wait for.
        with contextlib.suppress(Exception):
            jax.block_until_ready(run.state)
        jax.profiler.stop_trace()
        files = Path(str(self.dirpath)).glob("plugins/profile/*/*.xplane.pb")
        newest = max(files, key=lambda path: path.stat().st_mtime_ns)
        self.trace_path = str(newest)
        run.notice(
            f"Profiler: steps {first} to {run.global_step} are in {newest}; "
            f"`tensorboard --logdir {self.dirpath}`, or open the .trace.json.gz beside it in "
            "https://ui.perfetto.dev"
        )


def _checked_steps(steps: Any) -> tuple[int, int]:
    numbers = list(steps) if isinstance(steps, tuple | list) else []
    are_steps = [isinstance(n, int) and not isinstance(n, bool) for n in numbers]
    if len(numbers) != 2 or not all(are_steps) or not 1 <= numbers[0] <= numbers[1]:
        raise ConfigError(
            f"steps={steps!r}: pass the first and the last step to trace, counted from 1: "
            "`steps=(10, 20)`."
        )
    return numbers[0], numbers[1]
