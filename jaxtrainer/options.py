"""Checks of the trainer's options, in one pass, before anything is read or compiled.

May import level 0, `run` and `precision`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtrainer.errors import ConfigError, OptionError
from jaxtrainer.every import Every
from jaxtrainer.precision import Precision
from jaxtrainer.remat import Remat
from jaxtrainer.run import Limits
from jaxtrainer.types import Clock


@dataclass(frozen=True, kw_only=True)
class Options:
    """The checked options of a trainer, as `Trainer` documents them."""

    limits: Limits
    seed: int
    log_every_n_steps: int
    val_check_interval: int | float | Every | None
    check_val_every_n_epoch: int
    batch_limits: Mapping[str, int | float | None]
    overfit: int | float | None
    num_sanity_val_steps: int
    accumulate: Mapping[int, int]
    clip_value: float | None
    clip_algorithm: str
    precision: Precision
    matmul_precision: str | None
    remat: Remat
    offload_optimizer: bool
    mesh: Mapping[str, int] | Mesh | None
    sharding: Any
    steps_per_dispatch: int | str
    deterministic: bool
    max_recompiles: int
    cache_dir: Path | None
    data_timeout_s: float | None
    peer_timeout_s: float | None
    clock: Clock

    def __post_init__(self) -> None:
        check_count("log_every_n_steps", self.log_every_n_steps)
        _check_epochs(self.check_val_every_n_epoch, self.val_check_interval)
        for name, stage in (("train", "train"), ("val", "validate")):
            # 0 validation batches are no validation, which is something else than how many.
            if self.overfit is not None and self.batch_limits[stage]:
                raise ConfigError(
                    f"overfit_batches={self.overfit!r} says how many batches there are; leave out "
                    f"limit_{name}_batches={self.batch_limits[stage]!r}."
                )
        check_count("num_sanity_val_steps", self.num_sanity_val_steps, 0)
        if check_count("seed", self.seed, 0) >= 2**32:
            raise ConfigError(f"seed must be below 2**32, got {self.seed!r}.")
        check_steps_per_dispatch(self.steps_per_dispatch)
        if not isinstance(self.offload_optimizer, bool):
            raise ConfigError(
                f"offload_optimizer must be True or False, got {self.offload_optimizer!r}."
            )
        if self.offload_optimizer and self.steps_per_dispatch != 1:
            raise ConfigError(
                f"offload_optimizer=True with steps_per_dispatch={self.steps_per_dispatch!r}: "
                "between fused steps the state would stay on the device; leave one of them out."
            )
        if not isinstance(self.deterministic, bool):
            raise ConfigError(f"deterministic must be True or False, got {self.deterministic!r}.")
        check_count("max_recompiles", self.max_recompiles, 0)
        if self.clip_value is not None and not _is_positive(self.clip_value):
            raise ConfigError(
                f"gradient_clip_val must be a number above 0, or None for no clipping, got "
                f"{self.clip_value!r}."
            )
        if self.clip_algorithm not in ("norm", "value"):
            raise ConfigError(
                f"gradient_clip_algorithm={self.clip_algorithm!r}: use 'norm' or 'value'."
            )

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options of XLA for the steps; those of a backend that is not used do nothing."""
        return {"xla_gpu_deterministic_ops": True} if self.deterministic else {}


def _check_epochs(every_n_epochs: Any, interval: Any) -> None:
    if every_n_epochs is None:
        count = interval if isinstance(interval, int) else 100
        raise ConfigError(
            "check_val_every_n_epoch=None: to count batches through the epochs pass "
            f"`val_check_interval=Every(batches={count})`."
        )
    check_count("check_val_every_n_epoch", every_n_epochs)
    if isinstance(interval, Every) and every_n_epochs != 1:
        raise ConfigError(
            f"val_check_interval={interval!r} says when to validate, and so does "
            f"check_val_every_n_epoch={every_n_epochs}; pass one, e.g. "
            f"`val_check_interval=Every(epochs={every_n_epochs})`."
        )


def check_limits(limits: Limits) -> None:
    """Raise ConfigError unless some limit says when training ends, or that none does."""
    has_limit = (limits.max_epochs, limits.max_steps, limits.max_time_s) != (None, None, None)
    if not has_limit and not limits.is_endless:
        raise ConfigError(
            "nothing says when training ends; pass `Trainer(max_epochs=...)`, `max_steps=...` or "
            "`max_time=...`. To train until a callback or Ctrl-C ends it pass `max_epochs=-1`."
        )
    for unit in ("epochs", "steps"):
        least = check_count(f"min_{unit}", getattr(limits, f"min_{unit}"), 0)
        most = getattr(limits, f"max_{unit}")
        if most is not None and least > check_count(f"max_{unit}", most, 0):
            raise ConfigError(f"min_{unit}={least} is more than max_{unit}={most}.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Return the value, or raise ConfigError unless it is an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    return value


def batch_limit(name: str, limit: int | float | None, num_batches: int | None) -> int | None:
    """Return how many batches an epoch a `limit_*_batches` option means.

    Args:
        name: The option, for messages.
        limit: A number of batches, a fraction of the epoch (float), or None for all.
        num_batches: Batches in the loader, if known.

    Raises:
        ConfigError: For a negative limit, or a fraction of a loader without a length.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 0:
        raise ConfigError(f"{name} must be an integer or a fraction of 1, got {limit!r}.")
    if limit == 0:
        raise ConfigError(f"{name}={limit!r} leaves no batch; pass more, or None for all of them.")
    if isinstance(limit, int):
        return limit
    if limit > 1.0:
        raise ConfigError(
            f"{name}={limit} is a fraction above 1; for a number of batches pass an integer: "
            f"`{name}={int(limit)}`."
        )
    if num_batches is None:
        raise ConfigError(
            f"{name}={limit} is a fraction of a loader without a length; pass a number of batches."
        )
    return max(1, int(limit * num_batches))


def accumulation_schedule(name: str, value: Any) -> dict[int, int]:
    """Return batches to an update from each epoch on; 1 until the first one that is given.

    Raises:
        ConfigError: Unless it is an integer above 0, or a dict of such by epoch.

    Example:
        >>> accumulation_schedule("accumulate_grad_batches", {4: 2})
        {0: 1, 4: 2}
    """
    if not isinstance(value, Mapping):
        return {0: check_count(name, value)}
    if not value:
        raise ConfigError(f"{name}={{}} has no epoch; pass e.g. `{{0: 1, 4: 2}}`.")
    for epoch, factor in value.items():
        check_count(f"an epoch in {name}={dict(value)}", epoch, 0)
        check_count(f"the number of batches in {name}={dict(value)}", factor)
    return {0: 1, **dict(sorted(value.items()))}


def accumulation_of(
    given: Mapping[int, int], scheduled: Sequence[Mapping[int, int]]
) -> Mapping[int, int]:
    """Return the schedule of a callback, if there is one, or that of the trainer's option.

    Raises:
        ConfigError: If there is more than one.
    """
    if len(scheduled) > 1:
        raise ConfigError(
            "several callbacks schedule the accumulation of gradients; keep one "
            "`GradientAccumulationScheduler`."
        )
    if not scheduled:
        return given
    if given != {0: 1}:
        shown = given[0] if len(given) == 1 else dict(given)
        raise ConfigError(
            f"accumulate_grad_batches={shown!r} and a GradientAccumulationScheduler both say how "
            "many batches an update takes; leave out one, e.g. "
            f"`Trainer(accumulate_grad_batches={dict(scheduled[0])!r})` alone."
        )
    return scheduled[0]


def check_steps_per_dispatch(value: Any) -> int | str:
    """Return the option, or raise OptionError."""
    if value == "auto" or (isinstance(value, int) and value >= 1 and not isinstance(value, bool)):
        return value
    raise OptionError(f"steps_per_dispatch={value!r}: pass 'auto' or a positive integer.")
