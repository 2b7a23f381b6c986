"""The hooks of callbacks and module: checked, in order, each called as one.

Knows no concrete callback. May import `callback` and what lies below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtrainer.averaging import Averaging
from jaxtrainer.callback import HOOKS, Callback
from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.guard import Guard
from jaxtrainer.isolation import isolated
from jaxtrainer.run import Run
from jaxtrainer.vocabulary import IN_THE_STEP, RENAMED

_FOREIGN = {"trainer", "pl_module", "stage", "dataloader_idx"}
"""Lightning's parameters, by which a hook that was written for it is known."""


def no_hook(*_: Any) -> None:
    """Stand in for a hook that nobody overrides."""


class CallbackList:
    """The overridden hooks of callbacks and module, each as one callable in the right order.

    `hooks.on_train_epoch_end(run)` calls them all; a hook that nobody overrides is `no_hook`.
    """

    def __init__(self, callbacks: Iterable[Callback], module: object) -> None:
        self.callbacks = list(callbacks)
        early = [c for c in self.callbacks if c.order <= 0]
        late = sorted((c for c in self.callbacks if c.order > 0), key=lambda c: c.order)
        self._owners = [*early, module, *late]
        for owner in self._owners:
            check_hooks(owner)
        self._isolated = isolated(self.callbacks)
        self._wraps = [c.wrap_hook for c in self.callbacks if _overrides(c, "wrap_hook")]
        self._called = {name: self._overrides(name) for name in HOOKS}
        for name, calls in self._called.items():
            setattr(self, name, _in_turn(name, calls))
        self.traced = [c.traced_step for c in self.callbacks if _overrides(c, "traced_step")]
        steps = {c.every_n_train_steps for c in self.callbacks if c.every_n_train_steps}
        self.periods = tuple(sorted(steps))
        self.stops = tuple(sorted({step for c in self.callbacks for step in c.at_train_steps}))
        self.optimizer_wraps = [
            c.wrap_optimizers for c in self.callbacks if _overrides(c, "wrap_optimizers")
        ]
        self.checks = [c.check_batch for c in self.callbacks if _overrides(c, "check_batch")]
        self.traced_updates = [c for c in self.callbacks if _overrides(c, "traced_update")]
        self.accumulations = [c.accumulation for c in self.callbacks if c.accumulation is not None]
        self._averagers = [c for c in self.callbacks if _overrides(c, "averaging")]
        if len(self._averagers) > 1:
            names = " and ".join(type(c).__name__ for c in self._averagers)
            raise ConfigError(
                f"{names} both average the weights, and evaluations can use one average: keep one."
            )
        self._guards = [c for c in self.callbacks if _overrides(c, "guard")]
        if len(self._guards) > 1:
            names = " and ".join(type(c).__name__ for c in self._guards)
            raise ConfigError(
                f"{names} both say what to do about a batch that is not finite: keep one."
            )
        self.tuners = sorted(filter(tunes, self.callbacks), key=lambda c: c.order)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)

    def _overrides(self, name: str) -> list[Callable[..., Any]]:
        return [self._wrapped(name, o) for o in self._owners if _overrides(o, name)]

    def _wrapped(self, name: str, owner: object) -> Callable[..., Any]:
        hook = getattr(owner, name)
        for wrap in self._wraps:
            hook = wrap(name, owner, hook)
        one = self._isolated.get(id(owner))
        return hook if one is None else one.guard(name, hook)

    def has(self, name: str) -> bool:
        """Return whether anybody overrides the hook."""
        return bool(self._called[name])

    @property
    def may_log(self) -> bool:
        """Whether a hook that runs while training may log what no step does."""
        owners = [o for o in self._owners if getattr(o, "may_log", True)]
        hooks = [n for n in HOOKS if n.startswith(("on_train", "on_validation", "on_report"))]
        return any(_overrides(owner, name) for owner in owners for name in hooks)

    @property
    def averages(self) -> bool:
        """Whether a callback averages the weights."""
        return bool(self._averagers)

    def averaging(self, run: Run) -> Averaging | None:
        """Return how weights are averaged, if they are."""
        return self._averagers[0].averaging(run) if self._averagers else None

    def guard(self, run: Run) -> Guard | None:
        """Return what the step does about a batch that is not finite, if anything."""
        return self._guards[0].guard(run) if self._guards else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every callback that has one, by `state_key`."""
        states = {c.state_key: self._guarded(c, "state_dict")() for c in self.callbacks}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Give every callback its state back."""
        for callback in self.callbacks:
            if callback.state_key in states:
                self._guarded(callback, "load_state_dict")(states[callback.state_key])

    def _guarded(self, callback: Callback, name: str) -> Callable[..., Any]:
        one, method = self._isolated.get(id(callback)), getattr(callback, name)
        return method if one is None else one.guard(name, method)


def _overrides(owner: object, name: str) -> bool:
    own = getattr(type(owner), name, None)
    if name in vars(owner):
        return True
    return own is not None and own is not getattr(Callback, name)


def tunes(callback: Callback) -> bool:
    """Return whether the callback wants to choose something before training."""
    return _overrides(callback, "tune")


def _in_turn(name: str, calls: list[Callable[..., Any]]) -> Callable[..., Any]:
    if not calls:
        return no_hook
    if len(calls) == 1 and name != "on_exception":
        return calls[0]

    def call_all(*args: Any) -> int | None:
        results = [call(*args) for call in calls]
        return -1 if -1 in results else None

    def call_every(*args: Any) -> None:
        errors: list[BaseException] = []
        for call in calls:
            try:
                call(*args)
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]

    # What cleans up runs also when what comes before it fails.
    return call_every if name in ("on_exception", "teardown") else call_all


def check_hooks(owner: object) -> None:
    """Raise ConfigError for a misspelt hook, or one whose parameters do not fit."""
    for name in sorted({*dir(type(owner)), *vars(owner)}):
        if name in HOOKS:
            if _overrides(owner, name):
                _check_parameters(owner, name)
        elif why := _why_not_called(name):
            raise ConfigError(f"{type(owner).__name__}.{name} is never called{why}")


def _why_not_called(name: str) -> str:
    """Return what is wrong with a method that looks like a hook, or an empty string."""
    if name in IN_THE_STEP:
        return f", because the whole step is one compiled program: {IN_THE_STEP[name]}."
    if name in RENAMED or (name.endswith(("_start", "_end")) and f"on_{name}" in HOOKS):
        return f"; the hook is `{_definition(RENAMED.get(name, f'on_{name}'))}`."
    if not name.startswith("on_"):
        return ""
    hint = did_you_mean(name.replace("_val_", "_validation_"), HOOKS, cutoff=0.8)
    return f": it is not a hook.{hint}" if hint else ""


def _check_parameters(owner: object, name: str) -> None:
    signature = inspect.signature(getattr(owner, name))
    got = list(signature.parameters)
    try:
        signature.bind(*_parameters(name))
        fits = _FOREIGN.isdisjoint(got)
    except TypeError:
        fits = False
    if not fits:
        hint = " `run.loader_name` says which loader it is." if "dataloader_idx" in got else ""
        raise ConfigError(
            f"{type(owner).__name__}.{name}({', '.join(['self', *got])}) does not fit; write "
            f"`{_definition(name)}`.{hint}"
        )


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(getattr(Callback, name)).parameters)[1:]


def _definition(name: str) -> str:
    return f"def {name}({', '.join(['self', *_parameters(name)])})"
