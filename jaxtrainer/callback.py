"""`Callback`: the hooks of a run.

Runs on the host only. May import `run` and what lies below it; knows no concrete callback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtrainer.averaging import Averaging
from jaxtrainer.guard import Guard
from jaxtrainer.optim import Optimizer
from jaxtrainer.probe import Probe
from jaxtrainer.run import Run
from jaxtrainer.types import LogFn, PyTree, Stage

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
        critical: Whether the run ends if a hook raises. If not, the callback warns once, with the
            traceback, and is left out from there on; only its `teardown` still runs. Set it on
            what a run can do without: a logger, a plot. What acts before training, or is traced
            into the step, ends the run in any case.

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
    critical: bool = True
    # Of one that has no hook within a step, and that other processes do not need.
    _of_first_process: bool = False

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

    def guard(self, run: Run) -> Guard:
        """Return what the compiled step does about a batch that is not finite.

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
