"""`Callback`, the hooks of a run, and the list that calls them in order.

Runs on the host only. May import `run` and what lies below it; knows no concrete callback.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtrainer.averaging import Averaging
from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.optim import Optimizer
from jaxtrainer.probe import Probe
from jaxtrainer.run import Run
from jaxtrainer.types import LogFn, PyTree, Stage
from jaxtrainer.vocabulary import IN_THE_STEP, RENAMED

Hook = Callable[..., None]


class Callback:
    """Base of all callbacks: override the hooks you need, the others cost nothing.

    Every hook gets the `Run`, the host's record of what has happened. At each hook callbacks
    come first, in list order, then the module; a callback with `order` 1 (it acts on metrics,
    as EarlyStopping) or 2 (it saves, as Checkpoint) comes after the module.

    Attributes:
        order: 0, 1 or 2, see above; of two that tune, the lower one goes first.
        every_n_train_steps: If set, fused dispatches end at every multiple of this many
            optimiser steps, so that `on_train_batch_end` sees the state of exactly that step.
        at_train_steps: They end at these optimiser steps too.
        traced_update_every: `traced_update` runs near multiples of this many batches, itself a
            multiple of `log_every_n_steps`, which is the default.
        accumulation: If set, batches to an update from each epoch on, `{0: 1, 4: 2}`, in place of
            the trainer's `accumulate_grad_batches`.
        may_log: Whether its hooks may log series. If no hook does, a monitored series that no
            step logs is refused before anything compiles.

    Example:
        >>> class Print(Callback):
        ...     def on_train_epoch_end(self, run):
        ...         print(run.epoch, run.metrics["train/loss"])
    """

    order: int = 0
    every_n_train_steps: int | None = None
    at_train_steps: Sequence[int] = ()
    traced_update_every: int | None = None
    accumulation: Mapping[int, int] | None = None
    may_log: bool = True

    def setup(self, run: Run) -> None:
        """Start of `fit`, `validate`, `test` or `predict`, before anything compiles."""

    def teardown(self, run: Run) -> None:
        """End of the same, also after an exception."""

    def on_fit_start(self, run: Run) -> None:
        """The state is initialised or restored."""

    def on_fit_end(self, run: Run) -> None:
        """Training has ended and its last values are reported."""

    def on_compile_start(self, run: Run, name: str) -> None:
        """A program (`"train step"`, `"validate step"`, ...) is about to compile."""

    def on_compile_end(self, run: Run, name: str, seconds: float) -> None:
        """The program is compiled."""

    def on_sanity_check_start(self, run: Run) -> None:
        """A few validation batches are about to run, before training."""

    def on_sanity_check_end(self, run: Run) -> None:
        """They have run; nothing of them is kept."""

    def on_train_start(self, run: Run) -> None:
        """The first epoch of this call is about to start."""

    def on_train_end(self, run: Run) -> None:
        """The last step has run."""

    def on_train_epoch_start(self, run: Run) -> None:
        """`run.epoch` starts; not called when a run resumes in the middle of an epoch."""

    def on_train_epoch_end(self, run: Run) -> None:
        """`run.metrics` has the epoch's exact means."""

    def on_train_batch_start(self, run: Run, batch: PyTree, batch_idx: int) -> int | None:
        """A batch is about to run; return -1 to skip the rest of the epoch.

        An accumulation window that is open then goes on in the next epoch.

        Overriding this asks for control between any two steps: each dispatch is then one step.
        """

    def on_train_batch_end(
        self, run: Run, outputs: Mapping[str, Any], batch: PyTree, batch_idx: int
    ) -> None:
        """A batch has been dispatched; `outputs` are its logged scalars, still on the device."""

    def on_validation_start(self, run: Run) -> None:
        """Validation starts."""

    def on_validation_end(self, run: Run) -> None:
        """Validation has ended and its values are reported."""

    def on_validation_epoch_start(self, run: Run) -> None:
        """The validation batches are about to run."""

    def on_validation_epoch_end(self, run: Run) -> None:
        """`run.metrics` has the exact validation means."""

    def on_validation_batch_start(self, run: Run, batch: PyTree, batch_idx: int) -> None:
        """A validation batch is about to run."""

    def on_validation_batch_end(
        self, run: Run, outputs: Mapping[str, Any], batch: PyTree, batch_idx: int
    ) -> None:
        """A validation batch has been dispatched."""

    def on_test_start(self, run: Run) -> None:
        """Testing starts."""

    def on_test_end(self, run: Run) -> None:
        """Testing has ended."""

    def on_test_epoch_start(self, run: Run) -> None:
        """The test batches are about to run."""

    def on_test_epoch_end(self, run: Run) -> None:
        """`run.metrics` has the exact test means."""

    def on_test_batch_start(self, run: Run, batch: PyTree, batch_idx: int) -> None:
        """A test batch is about to run."""

    def on_test_batch_end(
        self, run: Run, outputs: Mapping[str, Any], batch: PyTree, batch_idx: int
    ) -> None:
        """A test batch has been dispatched."""

    def on_predict_start(self, run: Run) -> None:
        """Prediction starts."""

    def on_predict_end(self, run: Run) -> None:
        """Prediction has ended."""

    def on_predict_epoch_start(self, run: Run) -> None:
        """The batches to predict are about to run."""

    def on_predict_epoch_end(self, run: Run) -> None:
        """All batches are predicted."""

    def on_predict_batch_start(self, run: Run, batch: PyTree, batch_idx: int) -> None:
        """A batch is about to be predicted."""

    def on_predict_batch_end(
        self, run: Run, outputs: PyTree, batch: PyTree, batch_idx: int
    ) -> None:
        """`outputs` is what `predict_step` returned, as NumPy arrays."""

    def on_report(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        """The values of optimiser step `step` have reached the host.

        One report interval late: `run.global_step` is a later step.
        """

    def on_save_point(self, run: Run) -> None:
        """The state is complete: after each dispatch and its validation, and after each epoch."""

    def on_exception(self, run: Run, exception: BaseException) -> None:
        """The run ends by an exception; `teardown` follows."""

    def on_save_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written; JSON data put into `checkpoint` is kept."""

    def on_load_checkpoint(self, run: Run, checkpoint: Mapping[str, Any]) -> None:
        """A checkpoint was read; `checkpoint` has what `on_save_checkpoint` put there."""

    def state_dict(self) -> dict[str, Any]:
        """Return what this callback needs to go on after a resume, as JSON data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint; unique among the callbacks."""
        return type(self).__name__

    def traced_step(self, stage: Stage, outputs: Mapping[str, Any], batch: PyTree, log: LogFn):
        """Add to the compiled step: pure JAX on what the step returned, recorded with `log`.

        Runs while tracing only. `outputs` is what the step returned (`{"loss": ..., ...}`),
        `batch` the batch after the device transform.
        """

    def traced_update(self, grads: PyTree, params: PyTree, updates: PyTree, log: LogFn) -> None:
        """Add to the compiled step a look at an update: pure JAX, recorded with `log`.

        Runs on the device where a report will show what it logs, and nowhere else: values are
        reported for steps only, have no epoch mean, and are -inf in `on_train_batch_end` where
        they were not computed. Under accumulation they are those of the latest update.

        Args:
            grads: Gradients before clipping, nested dicts; under accumulation the window's mean.
            params: The parameters before the update, those that some optimiser owns.
            updates: What is added to them.
            log: As `TrainModule.log`.
        """

    def averaging(self, run: Run) -> Averaging:
        """Return how the compiled step averages weights; evaluations then use the average.

        Asked before the step is traced, of one callback at most.
        """
        raise NotImplementedError

    def tune(self, probe: Probe) -> None:
        """Choose what the run is made of, before its step is compiled: a rate, a batch size.

        Comes after `setup`, in `fit` and in `Trainer.tune`. On a resumed run `load_state_dict`
        was called before it, and what was chosen is to be set, not chosen again.
        """

    def wrap_optimizers(
        self, run: Run, optimizers: Mapping[str, Optimizer]
    ) -> Mapping[str, Optimizer]:
        """Return the optimisers to train with, in place of those that it gets.

        Runs before anything is traced, with `run.num_batches` and `run.accumulate` known. The
        `wrt` of each is a tuple of parameter names. A transformation may be wrapped
        (`dataclasses.replace(optimizer, tx=optax.chain(optimizer.tx, ...))`), and an optimiser may
        be divided: `"gan.encoder"` belongs to `"gan"`, and is updated with it. What a
        transformation counts belongs into its state, which is saved and restored.
        """
        return optimizers

    def wrap_hook(self, name: str, owner: object, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return what is called in place of a hook, e.g. the hook with a clock around it.

        Asked for every hook that somebody overrides, when a call of the trainer begins.

        Args:
            name: Name of the hook.
            owner: The callback or module that has it.
            hook: The hook; its first argument is the run.
        """
        return hook

    def check_batch(self, stage: Stage, batch: PyTree, outputs: Mapping[str, Any]) -> None:
        """Look at the first batch (NumPy) and the shapes of what the step returns for it.

        Runs before compilation; raise an error that says what is wrong with them.
        """


def _hook_names() -> tuple[str, ...]:
    return ("setup", "teardown", *(n for n in vars(Callback) if n.startswith("on_")))


HOOKS = _hook_names()
"""All hooks, in the order in which `Callback` lists them."""

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
        self.tuners = sorted(filter(tunes, self.callbacks), key=lambda c: c.order)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)

    def _overrides(self, name: str) -> list[Callable[..., Any]]:
        return [self._wrapped(name, o) for o in self._owners if _overrides(o, name)]

    def _wrapped(self, name: str, owner: object) -> Callable[..., Any]:
        hook = getattr(owner, name)
        for wrap in self._wraps:
            hook = wrap(name, owner, hook)
        return hook

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

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every callback that has one, by `state_key`."""
        states = {c.state_key: c.state_dict() for c in self.callbacks}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Give every callback its state back."""
        for callback in self.callbacks:
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])


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
