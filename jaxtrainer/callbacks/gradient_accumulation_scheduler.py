"""`GradientAccumulationScheduler`: batches to an update, by epoch."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.options import accumulation_schedule


class GradientAccumulationScheduler(Callback):
    """Change the number of batches to an optimiser update at the start of epochs.

    The same as `Trainer(accumulate_grad_batches={0: 1, 4: 2})`, as a callback.

    Args:
        scheduling: Batches to an update from each epoch on, the first epoch being 0; one batch
            until the first that is given.

    Raises:
        ConfigError: For an empty dict, or epochs or numbers that cannot be; at the start of a
            call, if `accumulate_grad_batches` is given too.

    Example:
        >>> callbacks = [GradientAccumulationScheduler({0: 8, 4: 4, 8: 1})]
    """

    may_log = False

    @checks_options
    def __init__(self, scheduling: Mapping[int, int]) -> None:
        if not isinstance(scheduling, Mapping):
            raise ConfigError(
                f"scheduling={scheduling!r}: pass a dict from epoch to number of batches, e.g. "
                "`GradientAccumulationScheduler({0: 8, 4: 4})`."
            )
        self.accumulation = accumulation_schedule("scheduling", scheduling)
