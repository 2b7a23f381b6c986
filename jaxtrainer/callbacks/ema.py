"""`EMA`: an exponential moving average of the weights, for evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp

from jaxtrainer.averaging import Averaging
from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.options import check_count
from jaxtrainer.run import Run
from jaxtrainer.types import Array


class EMA(Callback):
    """Keep `average = decay * average + (1 - decay) * weights`, and evaluate the average.

    The compiled step updates it after each optimiser update; it lives in the training state, in
    float32 or wider, divided over the devices as the weights are. It costs their memory once
    more, and reading and writing it in each step.

    Every evaluation in `fit` uses the average, and `module.model` is the average when `fit` has
    ended, however it ended; a later `fit` starts from that. A checkpoint has both: `fit` goes on
    with the trained weights and the average, `validate`, `test` and `predict` take the average.
    It can only be resumed with such a callback, and a checkpoint without averages only without.

    The floating-point state of the model, such as BatchNorm's statistics, is averaged too, so
    that it fits the weights: no pass over the data is needed at the end.

    Args:
        decay: Share of the old average that stays at each sample: at least 0, below 1.
        every_n_steps: Take a sample every this many optimiser updates.
        start_step: The weights after this many updates are the first sample (0: the initial
            weights); until then evaluations use the trained weights.
        warmup: With `n` samples in the average, use `min(decay, (1 + n) / (10 + n))`, so that the
            first weights, which are bad ones, are forgotten sooner.
        use_buffers: Average the model's floating-point state; if not, its latest is used.

    Raises:
        ConfigError: For a value out of range, or if another callback averages too.

    References:
        Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992. The
        warm-up is that of TensorFlow's `tf.train.ExponentialMovingAverage`.

    Example:
        >>> callbacks = [EMA(0.999), EMA(0.9999, warmup=True, every_n_steps=10)]
    """

    may_log = False
    _elsewhere: ClassVar[dict[str, str]] = {
        "update_every_n_steps": "Pass `every_n_steps=`.",
        "update_starting_at_step": "Pass `start_step=`.",
        "update_starting_at_epoch": "Pass `start_step=`, a number of optimiser updates.",
        "device": "The average lives where the weights live.",
    }

    @checks_options
    def __init__(
        self,
        decay: float = 0.999,
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        warmup: bool = False,
        use_buffers: bool = True,
    ) -> None:
        if not _is_share(decay):
            raise ConfigError(f"decay must be a number from 0 to below 1, got {decay!r}.")
        self.decay = decay
        self.every_n_steps = check_count("every_n_steps", every_n_steps)
        self.start_step = check_count("start_step", start_step, 0)
        self.warmup = warmup
        self.use_buffers = use_buffers

    def averaging(self, run: Run) -> Averaging:
        """See `Callback.averaging`."""
        return Averaging(
            is_sample=self._is_sample,
            weight=self._weight,
            use_buffers=self.use_buffers,
            is_dense=self.every_n_steps == 1,
        )

    def _is_sample(self, step: Array, epoch: Array, ends_epoch: Array) -> Array:
        since = step - self.start_step
        return (since >= 0) & (since % self.every_n_steps == 0)

    def _weight(self, count: Array) -> Array:
        if not self.warmup:
            return jnp.float32(1.0 - self.decay)
        n = count.astype(jnp.float32)
        # 1 - min(decay, (1 + n) / (10 + n)), without the rounding of a difference from 1.
        return jnp.maximum(1.0 - self.decay, 9.0 / (10.0 + n))


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
