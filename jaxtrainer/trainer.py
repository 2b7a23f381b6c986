"""`Trainer`: checks the options, assembles a run once, calls one loop, returns its result.

The host side of a run is in `loops/`, the device side in `step.py`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from jax.sharding import Mesh
from rich.console import Console

from jaxtrainer.assemble import eval_plan, fit_plan, predict_plan, step_plan
from jaxtrainer.cache import default_directory
from jaxtrainer.callback import Callback
from jaxtrainer.callbacks.checkpoint import Checkpoint
from jaxtrainer.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from jaxtrainer.callbacks.progress_bar import ProgressBar
from jaxtrainer.checkpoint import find_checkpoint
from jaxtrainer.checks import require
from jaxtrainer.duration import parse_duration
from jaxtrainer.errors import (
    CheckpointNotFoundError,
    ConfigError,
    checks_options,
    did_you_mean,
)
from jaxtrainer.loops.evaluate import evaluate
from jaxtrainer.loops.fit import fit
from jaxtrainer.loops.predict import predict
from jaxtrainer.module import TrainModule
from jaxtrainer.options import Options, check_count, check_limits
from jaxtrainer.plan import Plan
from jaxtrainer.precision import parse_precision
from jaxtrainer.result import FitResult, metrics_table
from jaxtrainer.run import Limits
from jaxtrainer.session import Session
from jaxtrainer.types import Clock, PyTree


class Trainer:
    """Trains, validates, tests and predicts with a `TrainModule`.

    Args:
        max_epochs: Stop after this many epochs.
        max_steps: Stop after this many optimiser updates.
        max_time: Stop after this time: `"DD:HH:MM:SS"`, a timedelta, or seconds.
        min_epochs: A callback cannot stop the run before this many epochs.
        min_steps: Nor before this many optimiser updates.
        seed: Seed of parameters, dropout and step keys.
        callbacks: A callback or several, called in this order.
        log_every_n_steps: Report step values every this many batches.
        val_check_interval: Validate every this many batches (int), or after each such fraction
            of an epoch (float).
        check_val_every_n_epoch: Validate in every n-th epoch only.
        limit_train_batches: Batches an epoch (int), or a fraction of the epoch (float).
        limit_val_batches: The same for validation; 0 turns it off in `fit`.
        limit_test_batches: The same for testing.
        limit_predict_batches: The same for prediction.
        num_sanity_val_steps: Validation batches to run before training.
        fast_dev_run: Run this many batches (True: 1) of everything, and save nothing.
        accumulate_grad_batches: Batches to one optimiser update, weighted by their samples.
        gradient_clip_val: Clip gradients at this norm or value.
        gradient_clip_algorithm: `"norm"` of all gradients together, or each `"value"`.
        precision: `"32-true"`, `"bf16-mixed"` or `"bf16-true"`.
        mesh: Device mesh as axis sizes; `{"data": -1}`, all devices, is the default.
        steps_per_dispatch: Steps that one call of the compiled program runs at most, or
            `"auto"`: found by measurement at the start, so that two processes may differ in it,
            and with some models in the last bits then. A resumed run keeps what it had.
        enable_progress_bar: Show a `ProgressBar`, unless `callbacks` has one.
        compilation_cache: Directory of the cache of compiled programs; None for the default one
            in the user's cache directory, False for none.
        default_root_dir: Directory that relative run directories of callbacks are in.
        clock: Seconds that never go back, `time.monotonic` if None; for tests.

    Raises:
        OptionError: For an option that does not exist, naming the close match.
        ConfigError: For a value that cannot work.

    Example:
        >>> trainer = Trainer(max_epochs=5, seed=0)
    """

    _elsewhere: ClassVar[dict[str, str]] = {
        "accelerator": "JAX takes the GPU or TPU it finds; the variable JAX_PLATFORMS chooses.",
        "devices": "Pass `mesh={'data': number_of_devices}`; all of them is the default.",
        "strategy": "How work is divided is said by `mesh=`.",
        "enable_checkpointing": "Checkpoints are made by a `Checkpoint` in `callbacks`, if any.",
    }

    @checks_options
    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        max_time: Any = None,
        min_epochs: int = 0,
        min_steps: int = 0,
        seed: int = 0,
        callbacks: Callback | Iterable[Callback] = (),
        log_every_n_steps: int = 50,
        val_check_interval: int | float | None = None,
        check_val_every_n_epoch: int = 1,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        num_sanity_val_steps: int = 2,
        fast_dev_run: bool | int = False,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        precision: str = "32-true",
        mesh: Mapping[str, int] | Mesh | None = None,
        steps_per_dispatch: int | Literal["auto"] = "auto",
        enable_progress_bar: bool = True,
        compilation_cache: str | os.PathLike[str] | bool | None = None,
        default_root_dir: str | os.PathLike[str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        dev_batches = check_count(
            "fast_dev_run", int(fast_dev_run) if isinstance(fast_dev_run, bool) else fast_dev_run, 0
        )
        if dev_batches:
            max_epochs, max_steps, num_sanity_val_steps = 1, dev_batches, 0
            min_epochs, min_steps, val_check_interval, check_val_every_n_epoch = 0, 0, None, 1
            limit_train_batches = limit_val_batches = dev_batches
            limit_test_batches = limit_predict_batches = dev_batches
        self.callbacks = _callbacks(callbacks, enable_progress_bar, saves=not dev_batches)
        self.options = Options(
            limits=Limits(
                max_epochs=max_epochs,
                max_steps=max_steps,
                max_time_s=None if max_time is None else parse_duration(max_time),
                min_epochs=min_epochs,
                min_steps=min_steps,
            ),
            seed=seed,
            log_every_n_steps=log_every_n_steps,
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
            batch_limits={
                "train": limit_train_batches,
                "validate": limit_val_batches,
                "test": limit_test_batches,
                "predict": limit_predict_batches,
            },
            num_sanity_val_steps=num_sanity_val_steps,
            accumulate=accumulate_grad_batches,
            clip_value=gradient_clip_val,
            clip_algorithm=gradient_clip_algorithm,
            precision=parse_precision(precision),
            mesh=mesh,
            steps_per_dispatch=steps_per_dispatch,
            cache_dir=_cache_dir(compilation_cache),
            clock=clock or time.monotonic,
        )
        self.root = Path(default_root_dir or ".")
        for callback in self.callbacks:
            if isinstance(callback, Checkpoint | OnExceptionCheckpoint):
                callback.dirpath = str(self.root / callback.given_dirpath)

    def fit(
        self,
        module: TrainModule,
        train_loader: Any,
        val_loader: Any = None,
        *,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> FitResult:
        """Train the module.

        Args:
            module: What to train. If it has a trained `model`, training starts from it.
            train_loader: Iterable of batches, each a pytree of `[batch, ...]` arrays.
            val_loader: The same, for validation.
            ckpt_path: Go on from a checkpoint: `"last"` or `"best"` of the `Checkpoint` callback,
                a run directory, or a step directory in one.

        Returns:
            History, metrics, counters, timings and checkpoints of the run.

        Raises:
            JaxTrainerError: One of its classes, for input that cannot work.

        The order of operations, hooks included::

            setup
            on_fit_start
            on_sanity_check_start
                on_validation_start ... on_validation_end
            on_sanity_check_end
            on_train_start
            for each epoch:
                on_train_epoch_start
                for each batch:
                    on_train_batch_start
                    training_step, gradients, optimiser        (one compiled program)
                    on_train_batch_end
                    if validation is due:
                        on_validation_start
                        on_validation_epoch_start
                        for each batch:
                            on_validation_batch_start
                            validation_step                    (one compiled program)
                            on_validation_batch_end
                        on_validation_epoch_end
                        on_validation_end
                    if another batch follows:
                        on_save_point
                on_train_epoch_end
                on_save_point
            on_train_end
            on_fit_end
            teardown

        Where several steps are fused into one dispatch, `on_train_batch_end` runs once for each
        of them when it is dispatched, and what follows it once. Compilation, reports, saving,
        loading and exceptions have hooks of their own, which come when they happen.
        """
        require(module, ("configure_model", "configure_optimizers", "training_step"))
        if self.options.batch_limits["validate"] == 0:
            val_loader = None
        if val_loader is not None:
            require(module, ("validation_step",))
        check_limits(self.options.limits)
        path = self._find(ckpt_path)
        with Session(self.options, self.callbacks, module, "fit", path) as session:
            fit(session.run, fit_plan(session, train_loader, val_loader))
            session.hooks.on_fit_end(session.run)
        if session.interrupts.received == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        return FitResult.of(session.run)

    def validate(
        self,
        module: TrainModule,
        loader: Any,
        *,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
    ) -> dict[str, float]:
        """Run `validation_step` over the loader and return the exact means of what it logged."""
        return self._evaluate("validate", module, loader, ckpt_path, verbose)

    def test(
        self,
        module: TrainModule,
        loader: Any,
        *,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
    ) -> dict[str, float]:
        """Run `test_step` over the loader and return the exact means of what it logged.

        Args:
            module: Its `model` is tested, or the checkpoint's.
            loader: Iterable of batches.
            ckpt_path: `"best"`, `"last"` or a path, as in `fit`.
            verbose: Print a table of the metrics.
        """
        return self._evaluate("test", module, loader, ckpt_path, verbose)

    def predict(
        self,
        module: TrainModule,
        loader: Any,
        *,
        ckpt_path: str | os.PathLike[str] | None = None,
        stream: bool = False,
    ) -> Any:
        """Run `predict_step` over the loader.

        Args:
            module: Its `model` predicts, or the checkpoint's.
            loader: Iterable of batches.
            ckpt_path: `"best"`, `"last"` or a path, as in `fit`.
            stream: Return an iterator that yields the predictions of each batch, and keeps none.

        Returns:
            A list with the predictions of each batch as NumPy arrays, or an iterator over them.
        """
        require(module, ("configure_model", "predict_step"))
        batches = self._predictions(module, loader, self._find(ckpt_path))
        return batches if stream else list(batches)

    def plan(self, module: TrainModule, batch: Any) -> Plan:
        """Return what a training step costs, without allocating model or state.

        Args:
            module: What would be trained.
            batch: A loader, or one batch of arrays or of `jax.ShapeDtypeStruct`.

        Returns:
            Parameters, bytes, operations and peak memory of the compiled step; it prints well.
        """
        require(module, ("configure_model", "configure_optimizers", "training_step"))
        return step_plan(Session(self.options, self.callbacks, module, "fit", None), batch)

    def _predictions(self, module: TrainModule, loader: Any, path: Path | None) -> Iterator[PyTree]:
        with Session(self.options, self.callbacks, module, "predict", path) as session:
            variables = session.variables
            plan = predict_plan(session, loader, variables)
            yield from predict(session.run, plan, *variables)

    def _evaluate(
        self,
        stage: Literal["validate", "test"],
        module: TrainModule,
        loader: Any,
        ckpt_path: Any,
        verbose: bool,
    ) -> dict[str, float]:
        step = "validation_step" if stage == "validate" else "test_step"
        require(module, ("configure_model", step))
        with Session(self.options, self.callbacks, module, stage, self._find(ckpt_path)) as session:
            plan = eval_plan(session, stage, loader)
            metrics = evaluate(session.run, plan, *session.variables)
        metrics = {k: v for k, v in metrics.items() if "/_" not in k}
        if verbose:
            Console().print(metrics_table(stage, metrics))
        return metrics

    def _find(self, ckpt_path: str | os.PathLike[str] | None) -> Path | None:
        if ckpt_path is None:
            return None
        if not isinstance(ckpt_path, str | os.PathLike):
            raise ConfigError(f"ckpt_path={ckpt_path!r}: pass 'last', 'best' or a directory.")
        if ckpt_path not in ("last", "best"):
            hint = did_you_mean(os.fspath(ckpt_path), ("last", "best"))
            if hint and not os.path.exists(ckpt_path):
                raise CheckpointNotFoundError(f"ckpt_path={ckpt_path!r} is no directory.{hint}")
            return find_checkpoint(ckpt_path)
        saver = next((c for c in self.callbacks if isinstance(c, Checkpoint)), None)
        if saver is None:
            raise CheckpointNotFoundError(
                f"ckpt_path={ckpt_path!r} means a checkpoint of the `Checkpoint` callback, and "
                "there is none; pass `Trainer(callbacks=[Checkpoint('runs/...')])`, or a path."
            )
        return saver.find(str(ckpt_path))


def _callbacks(given: Any, with_bar: bool, *, saves: bool) -> list[Callback]:
    several = isinstance(given, Iterable) and not isinstance(given, str | type)
    callbacks: list[Any] = list(given) if several else [given]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = f"; write `{callback.__name__}()`" if isinstance(callback, type) else ""
            raise ConfigError(f"callbacks must be Callback instances, got {callback!r}{hint}.")
    if not saves:
        savers = (Checkpoint, OnExceptionCheckpoint)
        callbacks = [c for c in callbacks if not isinstance(c, savers)]
    if with_bar and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(ProgressBar())
    keys = [c.state_key for c in callbacks if c.state_dict()]
    if twice := {k for k in keys if keys.count(k) > 1}:
        raise ConfigError(
            f"several callbacks keep their state under {', '.join(twice)}; override `state_key`, "
            "or give Checkpoints directories of different names."
        )
    return callbacks


def _cache_dir(option: str | os.PathLike[str] | bool | None) -> Path | None:
    if option is False:
        return None
    if option is None or option is True:
        return default_directory()
    return Path(option)
