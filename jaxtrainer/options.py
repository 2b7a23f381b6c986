"""Checks of the trainer's options, in one pass, before anything is read or compiled.

May import level 0, `run` and `precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtrainer.errors import ConfigError, OptionError
from jaxtrainer.precision import Precision
from jaxtrainer.run import Limits, Run
from jaxtrainer.types import Clock

ShouldValidate = Callable[[Run, bool], bool]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The checked options of a trainer, as `Trainer` documents them."""

    limits: Limits
    seed: int
    log_every_n_steps: int
    val_check_interval: int | float | None
    check_val_every_n_epoch: int
    batch_limits: Mapping[str, int | float | None]
    num_sanity_val_steps: int
    accumulate: int
    clip_value: float | None
    clip_algorithm: str
    precision: Precision
    mesh: Mapping[str, int] | Mesh | None
    steps_per_dispatch: int | str
    cache_dir: Path | None
    clock: Clock

    def __post_init__(self) -> None:
        check_count("log_every_n_steps", self.log_every_n_steps)
        check_count("check_val_every_n_epoch", self.check_val_every_n_epoch)
        check_count("accumulate_grad_batches", self.accumulate)
        check_count("num_sanity_val_steps", self.num_sanity_val_steps, 0)
        if check_count("seed", self.seed, 0) >= 2**32:
            raise ConfigError(f"seed must be below 2**32, got {self.seed!r}.")
        check_steps_per_dispatch(self.steps_per_dispatch)
        if self.clip_value is not None and not _is_positive(self.clip_value):
            raise ConfigError(
                f"gradient_clip_val must be a number above 0, or None for no clipping, got "
                f"{self.clip_value!r}."
            )
        if self.clip_algorithm not in ("norm", "value"):
            raise ConfigError(
                f"gradient_clip_algorithm={self.clip_algorithm!r}: use 'norm' or 'value'."
            )


def check_limits(limits: Limits) -> None:
    """Raise ConfigError unless some limit says when training ends."""
    if limits.max_epochs is None and limits.max_steps is None and limits.max_time_s is None:
        raise ConfigError(
            "nothing says when training ends; pass `Trainer(max_epochs=...)`, `max_steps=...` or "
            "`max_time=...`."
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


def validation_period(interval: int | float | None, num_batches: int | None) -> int | None:
    """Return every how many batches of an epoch to validate; None for at its end only."""
    if interval is None or (isinstance(interval, float) and interval == 1.0):
        return None
    if isinstance(interval, bool) or not isinstance(interval, int | float) or interval <= 0:
        raise ConfigError(
            f"val_check_interval={interval!r}: pass an integer (batches) or a fraction of an epoch."
        )
    if isinstance(interval, float):
        if interval > 1.0 or num_batches is None:
            raise ConfigError(
                f"val_check_interval={interval} is a fraction of an epoch"
                f"{' of unknown length' if num_batches is None else ' above 1'}; for a number of "
                f"batches pass an integer: `val_check_interval={int(interval) or 100}`."
            )
        return max(1, int(interval * num_batches))
    if num_batches is not None and interval > num_batches:
        raise ConfigError(
            f"val_check_interval={interval} is more than the {num_batches} batches of an epoch; "
            "to validate less often than once an epoch use `check_val_every_n_epoch`."
        )
    return interval


def when_to_validate(period: int | None, every_n_epochs: int) -> ShouldValidate:
    """Return the test that the loop makes after each dispatch."""

    def is_due(run: Run, is_last: bool) -> bool:
        if (run.epoch + 1) % every_n_epochs:
            return False
        return is_last if period is None else run.batch_idx % period == 0

    return is_due


def check_steps_per_dispatch(value: Any) -> int | str:
    """Return the option, or raise OptionError."""
    if value == "auto" or (isinstance(value, int) and value >= 1 and not isinstance(value, bool)):
        return value
    raise OptionError(f"steps_per_dispatch={value!r}: pass 'auto' or a positive integer.")
