"""`Trainer`: checks the options, assembles a run once, calls one loop, returns its result.

The host side of a run is in `loops/`, the device side in `step.py`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Never

from jax.sharding import Mesh
from rich.console import Console

from jaxtrainer.accelerators import Accelerator
from jaxtrainer.assemble import fit_plan
from jaxtrainer.cache import default_directory
from jaxtrainer.callback import Callback
from jaxtrainer.callbacks.prediction_writer import PredictionWriter
from jaxtrainer.checks import require
from jaxtrainer.datamodule import DataModule, Loaders
from jaxtrainer.distributed import initialize_if_needed, is_first
from jaxtrainer.duration import Duration, parse_duration
from jaxtrainer.errors import ConfigError, checks_options, refuse_unknown
from jaxtrainer.evaluation import eval_plan, predictions_of, streamed
from jaxtrainer.every import Every, as_interval
from jaxtrainer.lineup import Lineup, find_saved
from jaxtrainer.loggers.logger import Logger
from jaxtrainer.loggers.together import Loggers
from jaxtrainer.loops.evaluate import evaluate
from jaxtrainer.loops.fit import fit
from jaxtrainer.metrics import is_private
from jaxtrainer.module import TrainModule
from jaxtrainer.options import Options, accumulation_schedule, check_count, check_limits
from jaxtrainer.partition import Rules, check_sharding
from jaxtrainer.plan import Plan
from jaxtrainer.planning import plan_on
from jaxtrainer.precision import Precision, check_matmul_precision, parse_precision
from jaxtrainer.remat import parse_remat
from jaxtrainer.remote import refuse_url
from jaxtrainer.result import FitResult, metrics_table
from jaxtrainer.run import Limits, Run
from jaxtrainer.session import Session
from jaxtrainer.settings import plain, settings_of
from jaxtrainer.traced import step_plan
from jaxtrainer.tuning import tune
from jaxtrainer.types import Clock, PyTree
from jaxtrainer.verify import Subject, Verification, compare_runs, copies_of
from jaxtrainer.vocabulary import OF_THE_CALLS, OF_THE_TRAINER


class Trainer:
    """Trains, validates, tests and predicts with a `TrainModule`.

    Args:
        max_epochs: Stop after this many epochs; -1 for no limit, also where there is no other.
        max_steps: Stop after this many optimiser updates; -1 likewise.
        max_time: Stop after this time: `"DD:HH:MM:SS"`, a timedelta, or seconds.
        min_epochs: A callback cannot stop the run before this many epochs.
        min_steps: Nor before this many optimiser updates.
        seed: Seed of parameters, dropout and step keys.
        callbacks: A callback or several, called in this order.
        logger: A logger or several, `CSVLogger("runs/x")`. None or False for none, the default:
            nothing is written unless asked for.
        log_every_n_steps: Report step values every this many batches.
        val_check_interval: Validate after every this many batches of an epoch (int), each such
            fraction of it (float), or with a unit of its own: `Every(steps=500)`. A span of time
            (timedelta, `"DD:HH:MM:SS"`, dict) is `Every(minutes=...)`. Where training stops
            within an epoch, its last state is validated too, unless a signal stops it.
        check_val_every_n_epoch: Validate in every n-th epoch only.
        limit_train_batches: Batches an epoch (int), or a fraction of the epoch (float).
        limit_val_batches: The same for validation; 0 turns it off in `fit`.
        limit_test_batches: The same for testing.
        limit_predict_batches: The same for prediction.
        overfit_batches: Train every epoch on the first batches of the first epoch, this many (int)
            or this fraction (float), in the same order, and validate on them too.
        num_sanity_val_steps: Validation batches to run before training.
        fast_dev_run: Run this many batches (True: 1) of everything; save and tune nothing.
        accumulate_grad_batches: Batches to one optimiser update, weighted by their samples; or a
            dict of such by epoch, `{0: 1, 4: 2}`: from epoch 4 on, 2.
        gradient_clip_val: Clip gradients at this norm or value.
        gradient_clip_algorithm: `"norm"` of all gradients together, or each `"value"`.
        precision: `"32-true"`, `"bf16-mixed"`, `"bf16-true"` or `"16-mixed"`, which scales the
            loss as it finds; or a `Precision`, which has exceptions by module.
        matmul_precision: What matrix products and convolutions of float32 may be shortened to:
            `"default"`, `"tensorfloat32"`, `"high"`, `"highest"`, or another word of
            `jax.default_matmul_precision`, whose value holds if None.
        remat: Modules whose activations are computed again in the backward pass, by patterns of
            their paths: `"blocks/*"`, or with what to keep by a name of `jax.checkpoint_policies`
            or one of its policies, `{"blocks/*": "dots_with_no_batch_dims_saveable"}`. Of nested
            modules that a pattern covers the outermost counts. NNX models only.
        offload_optimizer: Keep the optimiser's state in the host's memory between steps, and copy
            it to the device and back in each, so that the memory of activations can be used for
            it. Steps run one by one then.
        mesh: Device mesh as axis sizes, or a `jax.sharding.Mesh`; `{"data": -1}`, all devices, is
            the default. The batch is divided over the axes `"data"` and `"fsdp"`. Of several hosts
            these are the axes that lie across them, as far as they can.
        sharding: How parameters are divided; optimiser state and averages follow them. `"ddp"`:
            each device has all of them. `"fsdp"`: each has its part, along the axis `"fsdp"` of
            the mesh, or `"data"` where there is none; of each parameter of 4,096 numbers or more
            the largest dimension that the axis divides, of equal ones the first. Or rules, by
            patterns of the names that `ModelSummary` shows, as in `Optimizer(wrt=...)`:
            `{"*/up/kernel": jax.P(None, "model")}`; the first that matches counts. A key that is
            the name of a logical axis, `{"mlp": "model", "embed": None}`, says where the axes go
            that NNX parameters are annotated with (`nnx.with_partitioning`). What neither a rule
            nor an annotation divides is divided as by `"fsdp"` if the mesh has that axis, and else
            whole; without rules (None, the default) that is so, too.
        steps_per_dispatch: Steps that one call of the compiled program runs at most, or
            `"auto"`: found by measurement at the start, so that two processes may differ in it,
            and with some models in the last bits then. A resumed run keeps what it had.
        deterministic: The same program gives the same bits in every process: nothing is chosen by
            measurement (`steps_per_dispatch="auto"` is 1), and on a GPU XLA uses deterministic
            operations only, which may be slower. On a CPU they always are.
        max_recompiles: Shapes of batches beside the first one that a loader may have, as with
            sequences in buckets of lengths. The step is compiled for each on first use, which is
            reported, and a batch of one more shape ends the call with an error. 0, the default,
            refuses any other; structure and dtypes never change. The last batch of an evaluation
            may have fewer rows free of charge; that of training is left out with 0, and otherwise
            trained on as a shape of its own.
        enable_progress_bar: Show a `ProgressBar`, unless `callbacks` has one.
        compilation_cache: Directory of the cache of compiled programs; None for the default one
            in the user's cache directory, False for none.
        default_root_dir: Directory that relative directories of callbacks and loggers are in.
        data_timeout: A loader that yields no batch for this long is stuck: the call ends with an
            error that says where, and its worker processes are killed. None waits for ever.
        peer_timeout: A process that keeps the others waiting for this long, in a hook, a save or on
            its devices, is stuck: all leave with code 75 and a line that names it. From the first
            step on, and not while something is compiled. None waits for ever.
        clock: Seconds that never go back, `time.monotonic` if None; for tests.

    Raises:
        OptionError: For an option that does not exist, naming the close match.
        ConfigError: For a value that cannot work.

    Example:
        >>> trainer = Trainer(max_epochs=5, seed=0)
    """

    _elsewhere: ClassVar[dict[str, str]] = {**OF_THE_TRAINER, **OF_THE_CALLS}

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
        logger: Logger | Iterable[Logger] | bool | None = None,
        log_every_n_steps: int = 50,
        val_check_interval: int | float | Every | Duration | None = None,
        check_val_every_n_epoch: int = 1,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float | None = None,
        num_sanity_val_steps: int = 2,
        fast_dev_run: bool | int = False,
        accumulate_grad_batches: int | Mapping[int, int] = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        precision: str | int | Precision = "32-true",
        matmul_precision: str | None = None,
        remat: str | Iterable[str] | Mapping[str, Any] | None = None,
        offload_optimizer: bool = False,
        mesh: Mapping[str, int] | Mesh | None = None,
        sharding: str | Rules | Sequence[tuple[str, Any]] | None = None,
        steps_per_dispatch: int | Literal["auto"] = "auto",
        deterministic: bool = False,
        max_recompiles: int = 0,
        enable_progress_bar: bool = True,
        compilation_cache: str | os.PathLike[str] | bool | None = None,
        default_root_dir: str | os.PathLike[str] | None = None,
        data_timeout: Duration | None = 600.0,
        peer_timeout: Duration | None = 1800.0,
        clock: Clock | None = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "logger", "clock")}
        dev_batches = check_count(
            "fast_dev_run", int(fast_dev_run) if isinstance(fast_dev_run, bool) else fast_dev_run, 0
        )
        if dev_batches:
            max_epochs, max_steps, num_sanity_val_steps = 1, dev_batches, 0
            min_epochs, min_steps, val_check_interval, check_val_every_n_epoch = 0, 0, None, 1
            limit_train_batches = limit_val_batches = dev_batches
            limit_test_batches = limit_predict_batches = dev_batches
            overfit_batches = None
        if (deterministic or offload_optimizer is True) and steps_per_dispatch == "auto":
            steps_per_dispatch = 1
        refuse_url("default_root_dir", default_root_dir)
        initialize_if_needed()
        chosen = parse_precision(precision)
        root = Path(default_root_dir or ".")
        self._lineup = Lineup(
            callbacks,
            with_bar=enable_progress_bar,
            with_guard=chosen.loss_scale is not None,
            saves=not dev_batches,
            root=root,
        )
        self._loggers = Loggers(logger, root, plain(given), writes=not dev_batches)
        self.options = Options(
            limits=Limits(
                max_epochs=None if max_epochs == -1 else max_epochs,
                max_steps=None if max_steps == -1 else max_steps,
                max_time_s=None if max_time is None else parse_duration(max_time),
                min_epochs=min_epochs,
                min_steps=min_steps,
                is_endless=-1 in (max_epochs, max_steps),
            ),
            seed=seed,
            log_every_n_steps=log_every_n_steps,
            val_check_interval=as_interval(val_check_interval),
            check_val_every_n_epoch=check_val_every_n_epoch,
            batch_limits={
                "train": limit_train_batches,
                "validate": limit_val_batches,
                "test": limit_test_batches,
                "predict": limit_predict_batches,
            },
            overfit=None if overfit_batches == 0 else overfit_batches,
            num_sanity_val_steps=num_sanity_val_steps,
            accumulate=accumulation_schedule("accumulate_grad_batches", accumulate_grad_batches),
            clip_value=gradient_clip_val,
            clip_algorithm=gradient_clip_algorithm,
            precision=chosen,
            matmul_precision=check_matmul_precision(matmul_precision),
            remat=parse_remat(remat),
            offload_optimizer=offload_optimizer,
            mesh=mesh,
            sharding=check_sharding(sharding),
            steps_per_dispatch=steps_per_dispatch,
            deterministic=deterministic,
            max_recompiles=max_recompiles,
            cache_dir=_cache_dir(compilation_cache),
            data_timeout_s=None if data_timeout is None else parse_duration(data_timeout),
            peer_timeout_s=None if peer_timeout is None else parse_duration(peer_timeout),
            clock=clock or time.monotonic,
        )

    @property
    def callbacks(self) -> list[Callback]:
        """Return the callbacks, in the order in which they are called."""
        return self._lineup.callbacks

    @property
    def loggers(self) -> list[Logger]:
        """Return the loggers."""
        return self._loggers.loggers

    def fit(
        self,
        module: TrainModule,
        train_loader: Any = None,
        val_loader: Any = None,
        *,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        **unknown: Never,
    ) -> FitResult:
        """Train the module.

        Args:
            module: What to train. If it has a trained `model`, training starts from it.
            train_loader: Iterable of batches, each a pytree of `[batch, ...]` arrays, or a
                `DataModule`. None: the module's `train_dataloader()`.
            val_loader: The same, for validation, or a dict of several by name: of
                `{"clean": a, "noisy": b}` the series are `val/clean/loss` and `val/noisy/loss`.
                None: the module's `val_dataloader()`, if any.
            datamodule: A `DataModule` in place of the loaders.
            ckpt_path: Go on from a checkpoint: `"last"` or `"best"` of the `Checkpoint` callback,
                a run directory, or a step directory in one.
            **unknown: There are no other options; a misspelt one is named in the error.

        Returns:
            History, metrics, counters, timings and checkpoints of the run.

        Raises:
            JaxTrainerError: One of its classes, for input that cannot work.
            SystemExit: With code 143, after a SIGTERM.
            KeyboardInterrupt: After a Ctrl-C before the first step, or a second one.

        The first Ctrl-C or SIGTERM stops training after the steps that run, and the state is
        saved; the second one leaves at once. Before the first step there is nothing to save, and
        the first leaves at once.

        The order of operations, hooks included::

            configure_callbacks
            prepare_data
            setup
            train_dataloader, val_dataloader
            configure_model, configure_optimizers
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
        loading and exceptions have hooks of their own, which come when they happen. Finders run
        after `setup`, and ask for the training loader by then. Of several validation loaders the
        batches run loader by loader, each from index 0, and `run.loader_name` says which. Where a
        hook stops training at the end of an epoch, a last validation that is still due comes
        before `on_save_point`.
        """
        refuse_unknown(self.fit, unknown)
        require(module, ("configure_model", "configure_optimizers", "training_step"))
        loaders = Loaders("fit", module, datamodule, train=train_loader, validate=val_loader)
        loaders.require("train")
        validates = self.options.batch_limits["validate"] != 0 and loaders.has("validate")
        if validates:
            require(module, ("validation_step",))
        check_limits(self.options.limits)
        earlier: Run | None = None
        while True:
            with self._session("fit", module, loaders, ckpt_path) as session:
                session.run.take_over(earlier)
                tune(session)
                train_loader = session.loader("train")
                val_loader = session.loader("validate") if validates else None
                # What a finder has set is a part of it.
                callbacks = session.hooks.callbacks
                session.run.config = settings_of(self.options, module, callbacks)
                fit(session.run, fit_plan(session, train_loader, val_loader))
                if session.run.stop_reason != "restore":
                    session.hooks.on_fit_end(session.run)
            earlier, ckpt_path = session.run, session.run.last_checkpoint
            if earlier.stop_reason != "restore" or session.interrupts.received is not None:
                break
        if session.interrupts.received == signal.SIGTERM:
            if is_first():
                session.interrupts.say_farewell()
            raise SystemExit(128 + signal.SIGTERM)
        return FitResult.of(session.run)

    @checks_options
    def tune(
        self,
        module: TrainModule,
        train_loader: Any = None,
        *,
        datamodule: DataModule | None = None,
    ) -> None:
        """Run the finders among the callbacks, as `fit` does before it trains, and train nothing.

        What they found is on them (`finder.suggestion`, `finder.batch_size`), and set on the
        module. A `fit` of the same trainer runs them again.

        Args:
            module: As in `fit`.
            train_loader: As in `fit`.
            datamodule: As in `fit`.

        Raises:
            ConfigError: If there is no finder.

        Example:
            >>> from jaxtrainer.callbacks import LearningRateFinder
            >>> finder = LearningRateFinder()
            >>> trainer = Trainer(callbacks=[finder])  # trainer.tune(module, loader)
        """
        require(module, ("configure_model", "configure_optimizers", "training_step"))
        loaders = Loaders("tune", module, datamodule, train=train_loader)
        loaders.require("train")
        with self._session("tune", module, loaders, None) as session:
            if not session.hooks.tuners:
                raise ConfigError(
                    "tune: no callback of the trainer finds anything; pass "
                    "`Trainer(callbacks=[LearningRateFinder()])`, or a `BatchSizeFinder`."
                )
            tune(session)

    @checks_options
    def validate(
        self,
        module: TrainModule,
        loader: Any = None,
        *,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
    ) -> dict[str, float]:
        """Run `validation_step` over the loader and return the exact means of what it logged.

        Arguments as in `test`; without a loader the module's `val_dataloader()` is read.
        """
        loaders = Loaders("validate", module, datamodule, validate=loader)
        return self._evaluate("validate", module, loaders, ckpt_path, verbose)

    @checks_options
    def test(
        self,
        module: TrainModule,
        loader: Any = None,
        *,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
    ) -> dict[str, float]:
        """Run `test_step` over the loader and return the exact means of what it logged.

        Args:
            module: Its `model` is tested, or the checkpoint's.
            loader: Iterable of batches, a dict of several by name as in `fit`, or a `DataModule`.
                None: the module's `test_dataloader()`.
            datamodule: A `DataModule` in place of the loader.
            ckpt_path: `"best"`, `"last"` or a path, as in `fit`.
            verbose: Print a table of the metrics.
        """
        loaders = Loaders("test", module, datamodule, test=loader)
        return self._evaluate("test", module, loaders, ckpt_path, verbose)

    @checks_options
    def predict(
        self,
        module: TrainModule,
        loader: Any = None,
        *,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        stream: bool = False,
        return_predictions: bool | None = None,
    ) -> Any:
        """Run `predict_step` over the loader.

        Args:
            module: Its `model` predicts, or the checkpoint's.
            loader: Iterable of batches, a dict of several by name, or a `DataModule`. None: the
                module's `predict_dataloader()`.
            datamodule: A `DataModule` in place of the loader.
            ckpt_path: `"best"`, `"last"` or a path, as in `fit`.
            stream: Return an iterator that yields the predictions of each batch, and keeps none.
            return_predictions: Whether to keep and return them. Default: True, but False where a
                `PredictionWriter` puts them on disk.

        Returns:
            A list with the predictions of each batch as NumPy arrays, or an iterator over them,
            or None. Of a dict of loaders a dict of such lists, by name; streamed, an iterator over
            pairs of name and predictions.
        """
        require(module, ("configure_model", "predict_step"))
        if stream and return_predictions is False:
            raise ConfigError(
                "predict(stream=True) returns an iterator over the predictions; leave out "
                "`return_predictions=False`, or for none of them `stream=True`."
            )
        loaders = Loaders("predict", module, datamodule, predict=loader)
        loaders.require("predict")
        session = self._session("predict", module, loaders, ckpt_path)
        predictions = predictions_of(session)
        if return_predictions is None:
            writers = [c for c in session.hooks.callbacks if isinstance(c, PredictionWriter)]
            return_predictions = not writers
        if stream:
            return streamed(predictions)
        kept: dict[str | None, list[PyTree]] = {}
        for name, values in predictions:
            if return_predictions:
                kept.setdefault(name, []).append(values)
        return kept.get(None, kept) if return_predictions else None

    def plan(
        self,
        module: TrainModule,
        batch: Any,
        *,
        mesh: Mapping[str, int] | Mesh | Literal["auto"] | None = None,
        sharding: str | Rules | Sequence[tuple[str, Any]] | None = None,
        num_devices: int | None = None,
        accelerator: str | Accelerator | None = None,
    ) -> Plan:
        """Return what a training step costs, without allocating model or state.

        With `mesh` also on more devices than there are, up to 2,048: the step is compiled for
        virtual ones, which takes a few seconds, whatever their number. What it says then is by
        XLA's backend for CPUs: parameters and state are exact, collectives those of its
        partitioner (see `Plan.traffic`), temporaries a fair guess of what another backend needs.

        Args:
            module: What would be trained.
            batch: A loader, or one batch of arrays or of `jax.ShapeDtypeStruct`: the whole batch
                of a step, of all devices together.
            mesh: Axis sizes; the trainer's if None. `"auto"`: the one with the shortest step of
                those that fit, over `data`, and over `fsdp` and `model` as far as the trainer's
                `sharding` divides something along them. Each is compiled.
            sharding: How parameters are divided over it, as in `Trainer`; as the trainer's if None.
            num_devices: Devices of the mesh, where it is `"auto"` or one of its sizes is -1; those
                of this host if None.
            accelerator: Estimate the time of a step on this kind of device: `"h100"`,
                `"a100-80gb"`, `"tpu-v5p"` or another of `accelerators.ACCELERATORS`.

        Returns:
            Parameters, bytes, operations, collectives and peak memory of the compiled step, and
            `plan.on(accelerator)`, the least time that it takes; it prints well.

        Raises:
            ConfigError: For a mesh that does not divide devices or batch, or an accelerator that
                is not known.

        Example:
            >>> import jax, numpy as np
            >>> from jaxtrainer.testing import TinyModule, tiny_loader
            >>> batch = next(iter(tiny_loader(batch_size=64)))
            >>> plan = Trainer().plan(TinyModule(), batch, mesh={"data": 64}, accelerator="h100")
            >>> plan.num_devices, plan.estimate.bound, [row.op for row in plan.traffic]
            (64, 'communication', ['all-reduce'])
        """
        require(module, ("configure_model", "configure_optimizers", "training_step"))
        callbacks = self._lineup.for_module(module)

        def make(options: Options, chosen: Accelerator | None) -> Plan:
            return step_plan(Session(options, callbacks, module, "fit", None), batch, chosen)

        options = self.options
        if sharding is not None:
            options = replace(options, sharding=check_sharding(sharding))
        asked = {"mesh": mesh, "num_devices": num_devices, "accelerator": accelerator}
        return plan_on(make, options, **asked)

    def verify_resume(
        self,
        module: TrainModule,
        train_loader: Any = None,
        val_loader: Any = None,
        *,
        datamodule: DataModule | None = None,
        steps: int = 20,
        at: int | Sequence[int] | None = None,
    ) -> Verification:
        """Train a few steps with and without an interruption, and compare every array.

        Runs on copies of module and callbacks, with a checkpoint in a temporary directory; the
        loaders are read three times or more. Callbacks that save, show or find something take no
        part. What hooks of yours write, they write here too.

        Args:
            module: As in `fit`.
            train_loader: As in `fit`; one that can be read again.
            val_loader: As in `fit`.
            datamodule: As in `fit`.
            steps: Optimiser updates of each run, as far as the trainer's limits allow them.
            at: After how many to interrupt and resume; several, one after the other. Where batches
                are accumulated it is one batch later, within a window. None: after a third.

        Returns:
            Whether all arrays are equal, or which differ and by how much; it prints well.

        Raises:
            ConfigError: If the run ends before it could be interrupted.

        Example:
            >>> trainer = Trainer(max_epochs=5)
            >>> # assert trainer.verify_resume(module, loader).is_equal
        """
        given = {"train": train_loader, "validate": val_loader}
        return compare_runs(self._copies(module, datamodule, given), steps=steps, at=at)

    def verify_determinism(
        self,
        module: TrainModule,
        train_loader: Any = None,
        val_loader: Any = None,
        *,
        datamodule: DataModule | None = None,
        steps: int = 20,
    ) -> Verification:
        """Train a few steps twice, and compare every array.

        As `verify_resume`, without an interruption. Print the `digest` of the report to compare
        two processes or machines.
        """
        given = {"train": train_loader, "validate": val_loader}
        return compare_runs(self._copies(module, datamodule, given), steps=steps, at=())

    def _copies(
        self, module: TrainModule, datamodule: DataModule | None, given: Mapping[str, Any]
    ) -> Callable[[], Subject]:
        require(module, ("configure_model", "configure_optimizers", "training_step"))
        Loaders("fit", module, datamodule, **given).require("train")
        check_limits(self.options.limits)
        return copies_of(self.options, self._lineup, module, datamodule, given)

    def _session(
        self,
        call: Literal["fit", "tune", "validate", "test", "predict"],
        module: TrainModule,
        loaders: Loaders,
        ckpt_path: Any,
    ) -> Session:
        callbacks = self._lineup.for_module(module)
        path = find_saved(ckpt_path, callbacks, may_fall_back=call == "fit")
        callbacks += self._loggers.of_call(call)
        session = Session(self.options, callbacks, module, call, path, loaders)
        self._loggers.begin(session.run, module, session.record)
        return session

    def _evaluate(
        self,
        stage: Literal["validate", "test"],
        module: TrainModule,
        loaders: Loaders,
        ckpt_path: Any,
        verbose: bool,
    ) -> dict[str, float]:
        step = "validation_step" if stage == "validate" else "test_step"
        require(module, ("configure_model", step))
        loaders.require(stage)
        with self._session(stage, module, loaders, ckpt_path) as session:
            plan = eval_plan(session, stage, session.loader(stage))
            metrics = evaluate(session.run, plan, *session.variables)
            # Hooks may have logged more. A pass that a signal has ended reports nothing.
            if session.run.stop_reason != "interrupted":
                metrics = {**metrics, **session.run.metrics}
        metrics = {k: v for k, v in metrics.items() if not is_private(k)}
        if verbose and is_first():
            Console().print(metrics_table(stage, metrics))
        return metrics


def _cache_dir(option: str | os.PathLike[str] | bool | None) -> Path | None:
    if option is False:
        return None
    if option is None or option is True:
        return default_directory()
    refuse_url("compilation_cache", option)
    return Path(option)
