"""`LearningRateFinder`: a range test of the learning rate before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, MissingExtraError, checks_options
from jaxtrainer.options import check_count
from jaxtrainer.probe import Probe

_SMOOTHING = 0.98
_WINDOW = 5
"""A slope is taken over one part in this many of the steps: fewer, and noise is the steepest."""


class LearningRateFinder(Callback):
    """Find a learning rate by training a copy with rates that grow exponentially.

    Runs in `fit` before the step is compiled, and in `Trainer.tune`. The test is one compiled
    program that scans the first batches of the training loader, beginning again where there are
    fewer; the run that follows has the same parameters, data and random numbers as without it.
    For the test the attribute is set to an Optax schedule, so `configure_optimizers` passes it
    on: `optax.adam(self.learning_rate)`. Where it makes a schedule of the rate, write
    `schedule = rate if callable(rate) else optax.cosine_decay_schedule(rate, steps)`.

    The suggestion is where the loss falls most steeply over the logarithm of the rate, by least
    squares over a fifth of the steps, before it rises again. On a resumed run the test does not
    run again: the rate that was found is in the checkpoint. `fast_dev_run` leaves the test out.

    Args:
        min_lr: First rate.
        max_lr: Last rate.
        num_training_steps: Optimiser steps from the first to the last.
        early_stop_threshold: The curve ends where the smoothed loss is this many times its
            minimum; None to keep all of it.
        attr: Attribute of the module that holds the learning rate.
        update_attr: Set the attribute to the suggestion; it stays so after `fit`.

    Attributes:
        lrs: Rates up to the end of the curve: `[steps]`, float64.
        losses: Their losses, smoothed by an exponential mean corrected for its start.
        raw_losses: Their losses; with accumulated gradients the mean of each window.
        suggestion: The rate to train with; None if the loss never fell.

    Raises:
        ConfigError: For rates that are not a range, an attribute that is not there or that the
            optimiser does not use, a loss that is not finite at the first rate.

    Example:
        >>> finder = LearningRateFinder(max_lr=0.1)

    References:
        Smith, "Cyclical learning rates for training neural networks", 2017.
    """

    order = -1
    _elsewhere: ClassVar[dict[str, str]] = {
        "mode": "The rates grow exponentially.",
        "attr_name": "It is called `attr`.",
        "num_training": "It is called `num_training_steps`.",
    }

    @checks_options
    def __init__(
        self,
        *,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_training_steps: int = 100,
        early_stop_threshold: float | None = 4.0,
        attr: str = "learning_rate",
        update_attr: bool = True,
    ) -> None:
        if not 0 < min_lr < max_lr < math.inf:
            raise ConfigError(
                f"LearningRateFinder goes from min_lr={min_lr!r} up to max_lr={max_lr!r}: pass "
                "rates with 0 < min_lr < max_lr."
            )
        if early_stop_threshold is not None and not early_stop_threshold > 1:
            raise ConfigError(
                f"early_stop_threshold={early_stop_threshold!r} is how many times its minimum the "
                "loss may be: pass a number above 1, or None."
            )
        self.min_lr = min_lr
        self.max_lr = max_lr
        self.num_training_steps = check_count("num_training_steps", num_training_steps, 5)
        self.early_stop_threshold = early_stop_threshold
        self.attr = attr
        self.update_attr = update_attr
        self._reset()

    def _reset(self) -> None:
        self.lrs, self.losses, self.raw_losses = np.zeros((3, 0))
        self.suggestion: float | None = None

    @property
    def state_key(self) -> str:
        """Name of this callback's state: one for each attribute."""
        return f"LearningRateFinder[{self.attr}]"

    def tune(self, probe: Probe) -> None:
        """Run the test, and set the attribute."""
        if not probe.is_resumed:
            self._reset()
            rates = np.geomspace(self.min_lr, self.max_lr, self.num_training_steps)
            self._take(rates, probe.range_test(self.attr, rates))
            before = getattr(probe.module, self.attr)
            probe.run.notice(self._describe(before))
        if self.update_attr and self.suggestion is not None:
            setattr(probe.module, self.attr, self.suggestion)

    def state_dict(self) -> dict[str, Any]:
        """Return the rate that was found."""
        return {"suggestion": self.suggestion}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.suggestion = state["suggestion"]

    def plot(self, ax: Any = None) -> Any:
        """Draw the losses over the rates, and the suggestion; returns the Matplotlib axes.

        Args:
            ax: Axes to draw on; None for those of a new figure.

        Raises:
            MissingExtraError: Without Matplotlib.
            ConfigError: If no test was run.
        """
        if not len(self.lrs):
            raise ConfigError(
                "there is no curve to plot: run the test with `trainer.tune(module, loader)` or "
                "`trainer.fit(...)` first (a resumed run has its suggestion only)."
            )
        if ax is None:
            ax = _pyplot().subplots()[1]
        ax.plot(self.lrs, self.raw_losses, alpha=0.3, label="loss")
        ax.plot(self.lrs, self.losses, label="smoothed")
        if self.suggestion is not None:
            at = int(np.argmin(np.abs(np.log(self.lrs / self.suggestion))))
            ax.plot([self.lrs[at]], [self.losses[at]], "o", label=f"{self.suggestion:.3g}")
        # Up to what the loss was before it diverged, which would be all there is to see.
        low, high = self.raw_losses.min(), self.losses[: self.losses.argmin() + 1].max()
        room = 0.2 * (high - low) or 1.0
        limits = {"xscale": "log", "ylim": (low - room, high + room)}
        ax.set(xlabel="learning rate", ylabel="loss", **limits)
        ax.legend()
        return ax

    def _take(self, rates: np.ndarray, losses: np.ndarray) -> None:
        if not math.isfinite(losses[0]):
            raise ConfigError(
                f"the loss of the range test is {losses[0]} at its first step, with the rate "
                f"{self.min_lr:g}: it is not the learning rate. Look at the loss of one batch, "
                "e.g. for a logarithm of 0."
            )
        smoothed = smooth(losses)
        end = end_of_curve(smoothed, self.early_stop_threshold)
        self.lrs, self.losses, self.raw_losses = rates[:end], smoothed[:end], losses[:end]
        self.suggestion = suggest(self.lrs, self.raw_losses, max(3, len(rates) // _WINDOW))

    def _describe(self, before: Any) -> str:
        tried = f"{self.lrs[0]:.1e} to {self.lrs[-1]:.1e} tried"
        if self.suggestion is None:
            return f"no suggestion for {self.attr}, the loss does not fall ({tried})"
        goes = f", was {before!r}" if self.update_attr else f"; it stays {before!r}"
        return f"suggested {self.attr}: {self.suggestion:.3g} ({tried}{goes})"


def smooth(losses: np.ndarray) -> np.ndarray:
    """Return the exponential means of the losses, corrected for starting at 0: `[steps]`.

    Example:
        >>> smooth(np.array([2.0, 2.0])).round(6).tolist()
        [2.0, 2.0]

    References:
        Kingma and Ba, "Adam", 2015, section 3, for the correction.
    """
    mean, means = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        means.append(mean / (1 - _SMOOTHING**i))
    return np.array(means)


def end_of_curve(losses: np.ndarray, threshold: float | None) -> int:
    """Return how many values there are before the loss is not finite, or has diverged.

    The first diverged one is counted, so that the curve shows the rise. A loss that may be
    negative has diverged when it is as far above its minimum as a positive one would be.
    """
    best = math.inf
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            return i
        best = min(best, loss)
        if threshold is not None and loss - best > (threshold - 1) * abs(best):
            return i + 1
    return len(losses)


def suggest(lrs: np.ndarray, losses: np.ndarray, window: int) -> float | None:
    """Return the rate in the middle of the steepest fall; None if the loss falls nowhere.

    Slopes over single steps would be noise, most of all at the start of an exponential mean. A
    fall from the spikes of a loss that diverges is none: windows end at the one with the least
    mean.

    Args:
        lrs: Rates, a geometric series: `[steps]`.
        losses: Their losses, not smoothed: `[steps]`.
        window: Steps over which a slope is taken.
    """
    if len(losses) < window:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(losses, window)
    windows = windows[: np.argmin(windows.mean(axis=1)) + 1]
    slopes = windows @ (np.arange(window) - (window - 1) / 2)
    steepest = int(np.argmin(slopes))
    return float(lrs[steepest + window // 2]) if slopes[steepest] < 0 else None


def _pyplot() -> Any:
    try:
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise MissingExtraError(
            "plotting needs Matplotlib: `pip install 'jaxtrainer[plot]'`, or pass axes of your own."
        ) from error
