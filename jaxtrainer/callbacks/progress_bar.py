"""`ProgressBar`: what a run is doing, drawn by a thread of its own.

Reads the integers of `Run` and draws with `display`; has no hook that runs once a batch.
"""

from __future__ import annotations

import math
from typing import final

import rich
from rich.console import Console

from jaxtrainer import distributed
from jaxtrainer.callback import Callback
from jaxtrainer.display.frames import Bar, Frame, Status
from jaxtrainer.display.live import Display, LiveDisplay, PlainDisplay, can_draw_in_place
from jaxtrainer.display.meter import Meter
from jaxtrainer.display.notebook import NotebookDisplay, is_notebook
from jaxtrainer.display.text import format_metrics, format_seconds
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.run import Run


@final
class ProgressBar(Callback):
    """Shows epoch, bar, count, elapsed and remaining time, speed and metrics.

    On a terminal and in a notebook one line is drawn in place, a second one while an
    evaluation runs or a program compiles, and a line stays for every finished epoch. What the
    program prints meanwhile appears above. Anywhere else, e.g. in a log file, there is one
    line for an epoch, and one for each interval in which nothing else was printed.

    The metrics are those logged with `prog_bar=True`; if there are none, the training loss.

    Args:
        refresh_per_second: How often to draw. 0 is no drawing thread: frames change when a
            stage, an epoch or a compilation starts or ends.
        leave: Whether lines stay on a terminal for finished epochs and compilations.
        line_interval_s: Seconds between two lines where frames cannot be drawn in place.
        console: Where to draw; the console that `rich.print` uses by default.

    Example:
        >>> bar = ProgressBar(refresh_per_second=4)
    """

    # After the module: its `on_train_epoch_end` may log values that belong in the line.
    order = 2
    may_log = False

    @checks_options
    def __init__(
        self,
        *,
        refresh_per_second: float = 10,
        leave: bool = True,
        line_interval_s: float = 10.0,
        console: Console | None = None,
    ) -> None:
        if not 0 <= refresh_per_second <= 60:
            raise ConfigError(
                f"ProgressBar(refresh_per_second={refresh_per_second!r}): use 0 to 60 a second."
            )
        if not 0 < line_interval_s < math.inf:
            raise ConfigError(
                f"ProgressBar(line_interval_s={line_interval_s!r}): use a positive time in seconds."
            )
        self.refresh_per_second = refresh_per_second
        self.leave = leave
        self.line_interval_s = line_interval_s
        self.console = console
        self._display: Display | None = None

    def setup(self, run: Run) -> None:
        """Put the display up, so that start-up and compilation are seen."""
        self.close()
        self._run = run
        self._bar_widths: dict[str, int] = {}
        self._line_widths: dict[str, int] = {}
        self._epoch: Meter | None = None
        self._epoch_label = ""
        self._eval: Meter | None = None
        self._eval_label = ""
        self._compiling: tuple[str, float] | None = None
        self._cache_hits = 0
        self._preparing: float | None = run.clock()
        self._display = self._open(run)
        self._display.start()

    def _open(self, run: Run) -> Display:
        console = rich.get_console() if self.console is None else self.console
        if not distributed.is_first():
            console = Console(quiet=True)
        tick_s = 1 / self.refresh_per_second if self.refresh_per_second else 0.0
        if is_notebook(console):
            return NotebookDisplay(frames=self.frames, notices=lambda: run.notices, tick_s=tick_s)
        if can_draw_in_place(console):
            return LiveDisplay(
                console,
                frames=self.frames,
                notices=lambda: run.notices,
                tick_s=tick_s,
                leave=self.leave,
            )
        return PlainDisplay(
            console,
            frames=self.frames,
            notices=lambda: run.notices,
            tick_s=min(1.0, self.line_interval_s) if tick_s else 0.0,
            clock=run.clock,
            line_interval_s=self.line_interval_s,
        )

    def close(self) -> None:
        """Take the display down and leave the terminal as it was; again changes nothing."""
        display, self._display = self._display, None
        if display is None:
            return
        try:
            self._print_epoch(display)
        finally:
            display.stop()

    def teardown(self, run: Run) -> None:
        """Take the display down."""
        self.close()

    def on_exception(self, run: Run, exception: BaseException) -> None:
        """Take the display down before the error is shown."""
        self.close()

    def on_compile_start(self, run: Run, name: str) -> None:
        """Show the compilation, with its time."""
        self._compiling = (f"compiling {name}", run.clock())
        self._pause()
        self._refresh()

    def on_compile_end(self, run: Run, name: str, seconds: float) -> None:
        """Leave a line about it."""
        self._compiling = None
        self._resume()
        found, self._cache_hits = run.cache_hits - self._cache_hits, run.cache_hits
        source = " (from the cache)" if found else ""
        if self._display is not None:
            text = f"compiled {name} in {format_seconds(seconds)}{source}"
            self._display.print(text, style="dim")
        self._refresh()

    def on_sanity_check_start(self, run: Run) -> None:
        """Show a bar for the check."""
        self._start_eval("Sanity check")

    def on_sanity_check_end(self, run: Run) -> None:
        """Remove it."""
        self._end_eval()

    def on_validation_start(self, run: Run) -> None:
        """Show a bar for the validation."""
        self._start_eval("Sanity check" if run.stage == "sanity" else "Validation")

    def on_validation_end(self, run: Run) -> None:
        """Remove it."""
        self._end_eval()

    def on_test_start(self, run: Run) -> None:
        """Show a bar for the test."""
        self._start_eval("Test")

    def on_test_end(self, run: Run) -> None:
        """Remove it."""
        self._end_eval()

    def on_predict_start(self, run: Run) -> None:
        """Show a bar for the prediction."""
        self._start_eval("Predict")

    def on_predict_end(self, run: Run) -> None:
        """Remove it."""
        self._end_eval()

    def on_train_start(self, run: Run) -> None:
        """Show the bar of a run that resumes in the middle of an epoch."""
        # Any other epoch is announced, and there may be none left to run.
        if run.batch_idx:
            self._start_epoch(run)

    def on_train_epoch_start(self, run: Run) -> None:
        """Start the bar again."""
        self._start_epoch(run)

    def on_train_epoch_end(self, run: Run) -> None:
        """Leave the epoch's line."""
        if self._display is not None:
            self._print_epoch(self._display)

    def on_train_end(self, run: Run) -> None:
        """Leave the line of an epoch that was cut short."""
        self.on_train_epoch_end(run)

    def frames(self) -> list[Frame]:
        """Return what to draw now, outermost first; called by the drawing thread."""
        run, epoch, evaluation, compiling = self._run, self._epoch, self._eval, self._compiling
        frames: list[Frame] = []
        if epoch is not None:
            frames.append(self._epoch_bar(epoch, epoch.rate(run.batch_idx), self._bar_widths))
        if compiling is not None:
            label, start = compiling
            frames.append(Status(label=label, elapsed_s=run.clock() - start))
        elif evaluation is not None:
            frames.append(self._eval_bar(evaluation))
        elif self._preparing is not None:
            frames.append(Status(label="preparing", elapsed_s=run.clock() - self._preparing))
        return frames

    def _epoch_bar(self, meter: Meter, rate: float | None, widths: dict[str, int]) -> Bar:
        run = self._run
        return Bar(
            label=self._epoch_label,
            done=run.batch_idx,
            total=run.num_batches,
            elapsed_s=meter.elapsed_s,
            rate=rate,
            unit="steps/s" if run.accumulate == 1 else "batches/s",
            metrics=format_metrics(self._metrics(), widths),
        )

    def _eval_bar(self, meter: Meter) -> Bar:
        run = self._run
        return Bar(
            label=" ".join(filter(None, (self._eval_label, run.loader_name))),
            done=run.eval_batch_idx,
            total=run.num_eval_batches,
            elapsed_s=meter.elapsed_s,
            rate=meter.rate(run.eval_batch_idx),
            unit="batches/s",
        )

    def _metrics(self) -> dict[str, float]:
        # Copied at once: the training thread adds to it.
        values = dict(self._run.metrics)
        shown = set(self._run.prog_bar) or {"train/loss"}
        return {name: value for name, value in values.items() if name in shown}

    def _start_epoch(self, run: Run) -> None:
        last = "" if run.limits.max_epochs is None else f"/{run.limits.max_epochs}"
        self._epoch_label = f"Epoch {run.epoch + 1:>{len(last) - 1 if last else 0}}{last}"
        self._epoch = Meter(run.clock, first=run.batch_idx)
        self._preparing = None
        self._refresh()

    def _print_epoch(self, display: Display) -> None:
        meter, self._epoch = self._epoch, None
        if meter is not None:
            rate = meter.mean_rate(self._run.batch_idx)
            bar = self._epoch_bar(meter, rate, self._line_widths)
            display.print(bar.summary(display.line_width))
            display.refresh()

    def _start_eval(self, label: str) -> None:
        self._pause()
        self._eval_label = label
        self._eval = Meter(self._run.clock)
        self._preparing = None
        self._refresh()

    def _end_eval(self) -> None:
        self._eval = None
        self._resume()
        self._refresh()

    def _pause(self) -> None:
        for meter in (self._epoch, self._eval):
            if meter is not None:
                meter.pause()

    def _resume(self) -> None:
        if self._eval is not None:
            self._eval.resume()
        elif self._epoch is not None:
            self._epoch.resume()

    def _refresh(self) -> None:
        if self._display is not None:
            self._display.refresh()
