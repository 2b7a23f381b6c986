"""`BackboneFinetuning`: a part of the model stays frozen at first, and trains gently then."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import optax

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options
from jaxtrainer.optim import Optimizer, listed, matching, nearest
from jaxtrainer.run import Run

_DEFAULT_EPOCH = 10


class BackboneFinetuning(Callback):
    """Keep a part of the model frozen at first, and train it at a lower rate from then on.

    One compilation serves both phases. Before it is unfrozen the part does not change by a bit,
    nor does its optimiser state; its gradients are computed all the same, but enter no norm, so
    that `gradient_clip_val` acts on the others alone. When it is unfrozen its own optimiser
    starts, with momentum and schedule at step 0, which is why it is divided from the other: the
    norm of an `optax.clip_by_global_norm` in it is over the part, and why a `LearningRateMonitor`
    shows two rates (before `lr_ratio`). BatchNorm statistics are no parameters, and move all the
    time. To freeze a part for good, return an `Optimizer(tx, wrt="head")` from
    `configure_optimizers`: then no gradient is computed for it.

    Several of these callbacks unfreeze several parts, one after the other.

    Args:
        backbone: What to freeze: the name of a module or parameter (`"backbone/conv1"`), a
            pattern of names (`"*/bias"`), or a list of these.
        unfreeze_at_epoch: Index of the first epoch that trains it; 10 if no step is given.
        unfreeze_at_step: Or, in its place, the number of training steps before that.
        lr_ratio: Factor on its updates, and with them on its learning rate: a number, or an Optax
            schedule over the steps since it was unfrozen (`optax.linear_schedule(0.1, 1.0, 500)`).

    Raises:
        ConfigError: For options that cannot work; when `fit` starts, for a part that is not there
            or that no optimiser owns.

    Example:
        >>> callback = BackboneFinetuning(backbone="encoder", unfreeze_at_epoch=3)
    """

    _elsewhere: ClassVar[dict[str, str]] = {
        "unfreeze_backbone_at_epoch": "Write `unfreeze_at_epoch=`.",
        "backbone_initial_ratio_lr": "Write `lr_ratio=`.",
        "backbone_initial_lr": "Write `lr_ratio=`, relative to the rate of the other parameters.",
        "lambda_func": "Pass a schedule: `lr_ratio=optax.linear_schedule(0.1, 1.0, steps)`.",
        "should_align": "Pass a schedule that ends at 1: `lr_ratio=optax.linear_schedule(0.1, 1.0, "
        "steps)`.",
        "train_bn": "Leave the norms out: `backbone=['backbone/conv*']`. Statistics always move.",
    }

    @checks_options
    def __init__(
        self,
        *,
        backbone: str | Sequence[str] = "backbone",
        unfreeze_at_epoch: int | None = None,
        unfreeze_at_step: int | None = None,
        lr_ratio: float | Callable[[Any], Any] = 0.1,
    ) -> None:
        if unfreeze_at_epoch is not None and unfreeze_at_step is not None:
            raise ConfigError(
                f"pass unfreeze_at_epoch={unfreeze_at_epoch!r} or "
                f"unfreeze_at_step={unfreeze_at_step!r}, not both."
            )
        for name, value in (("epoch", unfreeze_at_epoch), ("step", unfreeze_at_step)):
            if value is not None and (type(value) is not int or value < 0):
                raise ConfigError(
                    f"unfreeze_at_{name} must be an integer of at least 0, got {value!r}."
                )
        is_number = isinstance(lr_ratio, int | float) and not isinstance(lr_ratio, bool)
        if not callable(lr_ratio) and not (is_number and lr_ratio >= 0):
            raise ConfigError(
                f"lr_ratio must be a number of at least 0, or a schedule, got {lr_ratio!r}."
            )
        self.parts = [backbone] if isinstance(backbone, str) else list(backbone)
        if not self.parts or not all(isinstance(part, str) and part for part in self.parts):
            raise ConfigError(
                f"backbone={backbone!r}: pass the name of a module, `backbone='encoder'`, or a "
                "list of names."
            )
        is_default = unfreeze_at_epoch is None and unfreeze_at_step is None
        self.start_epoch = _DEFAULT_EPOCH if is_default else unfreeze_at_epoch or 0
        self.start_step = unfreeze_at_step or 0
        self.lr_ratio = lr_ratio

    def wrap_optimizers(
        self, run: Run, optimizers: Mapping[str, Optimizer]
    ) -> Mapping[str, Optimizer]:
        """Divide each optimiser into what it owns of the part, and the rest."""
        trained = [path for optimizer in optimizers.values() for path in optimizer.wrt]
        frozen = {path for part in self.parts for path in _found(part, trained)}
        divided: dict[str, Optimizer] = {}
        for name, optimizer in optimizers.items():
            mine = tuple(path for path in optimizer.wrt if path in frozen)
            rest = tuple(path for path in optimizer.wrt if path not in frozen)
            if rest:
                divided[name] = replace(optimizer, wrt=rest)
            if mine:
                divided[f"{name}.{self._label}" if rest else name] = self._late(optimizer, mine)
        return divided

    @property
    def _label(self) -> str:
        return re.sub(r"\W+", "_", self.parts[0]).strip("_") or "part"

    def _late(self, optimizer: Optimizer, wrt: tuple[str, ...]) -> Optimizer:
        ratio = self.lr_ratio
        scale = optax.scale_by_schedule(ratio) if callable(ratio) else optax.scale(ratio)
        return Optimizer(
            optax.chain(optimizer.tx, scale),
            wrt,
            start_epoch=max(optimizer.start_epoch, self.start_epoch),
            start_step=max(optimizer.start_step, self.start_step),
        )


def _found(part: str, trained: Sequence[str]) -> tuple[str, ...]:
    if found := matching(trained, part):
        return found
    raise ConfigError(
        f"BackboneFinetuning: {part!r} matches no parameter that is trained: {listed(trained)}."
        f"{nearest(part, trained)}"
    )
