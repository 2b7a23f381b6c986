"""`StochasticWeightAveraging`: the equal average of the weights of the last epochs."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from jaxtrainer.averaging import Averaging
from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.options import check_count
from jaxtrainer.run import Run
from jaxtrainer.types import Array


class StochasticWeightAveraging(Callback):
    """Average the weights at the end of each epoch from `start_epoch` on, all alike.

    What is averaged, where it lives, when it is used and how it is saved is as for `EMA`. Until
    the first sample evaluations use the trained weights. An epoch that is cut short gives no
    sample. BatchNorm's statistics are averaged with the weights, in place of one more epoch to
    refresh them; the learning rate is the optimiser's: pass it a schedule that ends constant.

    Args:
        start_epoch: Index of the first epoch with a sample (int), or a fraction of the trainer's
            `max_epochs` (float), rounded down: of 10 epochs 0.8 averages those with index 8 and 9.
        every_n_steps: Take a sample after every optimiser update whose number is a multiple of
            this one, from that epoch on, in place of one an epoch.
        use_buffers: Average the model's floating-point state; if not, its latest is used.

    Raises:
        ConfigError: For a value out of range, a start after the last epoch, a fraction without
            `max_epochs`, or if another callback averages too.

    References:
        Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018.

    Example:
        >>> import optax
        >>> schedule = optax.join_schedules(
        ...     [optax.cosine_decay_schedule(0.1, 800, alpha=0.2), optax.constant_schedule(0.02)],
        ...     boundaries=[800],
        ... )
        >>> callbacks = [StochasticWeightAveraging(start_epoch=0.8)]
    """

    may_log = False
    _elsewhere: ClassVar[dict[str, str]] = {
        "swa_epoch_start": "Pass `start_epoch=`.",
        "swa_lrs": "Give the optimiser a schedule that ends at a constant rate.",
        "annealing_epochs": "Give the optimiser a schedule that ends at a constant rate.",
        "annealing_strategy": "Give the optimiser a schedule that ends at a constant rate.",
        "avg_fn": "For a moving average use `EMA`.",
        "device": "The average lives where the weights live.",
    }

    @checks_options
    def __init__(
        self,
        start_epoch: int | float = 0.8,
        *,
        every_n_steps: int | None = None,
        use_buffers: bool = True,
    ) -> None:
        if not isinstance(start_epoch, float):
            check_count("start_epoch", start_epoch, 0)
        elif not 0.0 <= start_epoch < 1.0:
            raise ConfigError(
                f"start_epoch={start_epoch!r} is no fraction of the epochs (0 to below 1); for an "
                f"epoch pass an integer: `start_epoch={max(int(start_epoch), 0)}`."
            )
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps)
        self.start_epoch = start_epoch
        self.every_n_steps = every_n_steps
        self.use_buffers = use_buffers

    def averaging(self, run: Run) -> Averaging:
        """See `Callback.averaging`."""
        start, every = self._start(run.limits.max_epochs), self.every_n_steps

        def is_sample(step: Array, epoch: Array, ends_epoch: Array) -> Array:
            is_due = ends_epoch if every is None else (step > 0) & (step % every == 0)
            return (epoch >= start) & is_due

        return Averaging(
            is_sample=is_sample,
            weight=lambda count: 1.0 / (count + 1).astype(jnp.float32),
            use_buffers=self.use_buffers,
        )

    def _start(self, max_epochs: int | None) -> int:
        if isinstance(self.start_epoch, float):
            if max_epochs is None:
                raise ConfigError(
                    f"StochasticWeightAveraging(start_epoch={self.start_epoch}) is a fraction of "
                    "max_epochs, which is not set; pass an integer, or `Trainer(max_epochs=...)`."
                )
            return int(self.start_epoch * max_epochs)
        if max_epochs is not None and self.start_epoch >= max_epochs:
            raise ConfigError(
                f"StochasticWeightAveraging(start_epoch={self.start_epoch}) never starts: the last "
                f"epoch of max_epochs={max_epochs} has the index {max_epochs - 1}."
            )
        return self.start_epoch
