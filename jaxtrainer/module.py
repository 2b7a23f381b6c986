"""`TrainModule`: what a user subclasses. A plain class of hyper-parameters and steps.

Holds no arrays while training; the steps are traced, the hooks run on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxtrainer.errors import (
    AttributeChangedError,
    ConfigError,
    LogError,
    StepError,
    checks_options,
)
from jaxtrainer.frozen import changed_names, contents_of, is_same, kept_tracers
from jaxtrainer.metrics import Recorder
from jaxtrainer.types import PyTree, Reduce, Stage
from jaxtrainer.vocabulary import OF_THE_MODULE

_HOST_ONLY = {
    "model": "holds no model while training: use the `model` that the step gets as an argument",
    "run": "counts on the host, and the compiled step would see its first values for ever: pass "
    "what changes in the batch, as an Optax schedule, or as an `nnx.Variable` on the model",
}
_MISSING = object()


class TrainModule:
    """Model, optimiser and steps of one training program.

    Any hook of `Callback` may be written on a module too; it runs after the callbacks'.

    Attributes:
        model: The trained model in evaluation mode after `fit`, also after an exception.
        run: The host's record (a `Run`) of the running or last call of the trainer; None before.
        automatic_optimization: Whether the gradients of the loss that `training_step` returns
            make the update. False leaves the updates to the step, see `minimize`.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> class Line(TrainModule):
        ...     def configure_model(self, rngs):
        ...         return nnx.Linear(1, 1, rngs=rngs)
        ...     def configure_optimizers(self):
        ...         return optax.sgd(0.1)
        ...     def training_step(self, model, batch):
        ...         return ((model(batch["x"]) - batch["y"]) ** 2).mean()
    """

    model: Any = None
    # Typed as `model` is: the methods that a user writes run only where there is one.
    run: Any = None
    automatic_optimization: bool = True
    _tracing: ClassVar[_Trace | None] = None
    _elsewhere: ClassVar[dict[str, str]] = {
        "batch_size": "Pass `weight=`.",
        "sync_dist": "Means are exact over all devices without it.",
    }

    def configure_model(self, rngs: Any) -> Any:
        """Return the model: an `nnx.Module`, or any pytree with arrays (Equinox, Linen params).

        Runs under `jax.jit`, so that each array is made where it will live.

        Args:
            rngs: `nnx.Rngs` seeded by the trainer.
        """
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """Return an `optax.GradientTransformation`; or an `Optimizer`, or several by name.

        An `Optimizer` says which parameters it owns; what none owns is frozen::

            return Optimizer(optax.adam(1e-3), wrt="head")

            return {
                "generator": Optimizer(optax.adam(1e-4), wrt="generator"),
                "critic": Optimizer(optax.adam(4e-4), wrt="critic"),
            }

        From the loss that `training_step` returns each updates its own parameters;
        `gradient_clip_val` is for all gradients together. For a loss each, see `minimize`.
        `self.run.estimated_steps` is known here, for schedules, which count updates::

            schedule = optax.cosine_decay_schedule(1e-3, self.run.estimated_steps)
            return optax.adam(schedule)

        A rate that falls when the training loss no longer does (`ReduceLROnPlateau`) is a
        transformation too; here it looks at the mean over every 100 updates::

            plateau = optax.contrib.reduce_on_plateau(patience=5, accumulation_size=100)
            return optax.chain(optax.adam(1e-3), plateau)
        """
        raise NotImplementedError

    def configure_callbacks(self) -> Any:
        """Return callbacks of this module, one or a list; asked at the start of each call.

        They come after the trainer's, and take the place of those of the same class.
        """
        return []

    def prepare_data(self) -> None:
        """Download or convert what is not there yet; called before `setup`.

        Of several processes the first of each host runs it, and the others wait.
        """

    def train_dataloader(self) -> Any:
        """Return the loader for `fit` without one; called after `setup`."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """Return the loader to validate on, where none is passed."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """Return the loader for `test` without one."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """Return the loader for `predict` without one."""
        raise NotImplementedError

    def training_step(self, model: Any, batch: PyTree) -> Any:
        """Return the scalar loss, or a dict with `"loss"` and whatever callbacks read.

        Traced: pure JAX, with the model in training mode. What the step changes in the model's
        variables (BatchNorm statistics, RNG counters, your own) is carried to the next step.
        A `"weight"` in the dict is the weight of this batch under gradient accumulation. A model
        that cannot be changed in place (Equinox) is returned as `"model"` if the step has changed
        its state. With `automatic_optimization = False` the loss is optional: it is logged.
        """
        raise NotImplementedError

    def validation_step(self, model: Any, batch: PyTree) -> Any:
        """Log with `self.log`, and return a dict for callbacks, or None. Evaluation mode.

        With a third parameter called `loader_name` it also gets the name of the loader that the
        batch is of, a string, where several are given in a dict; it is then traced for each.
        `test_step` and `predict_step` may have it too.
        """
        raise NotImplementedError

    def test_step(self, model: Any, batch: PyTree) -> Any:
        """Like `validation_step`, which is the default."""
        return self.validation_step(model, batch)

    def predict_step(self, model: Any, batch: PyTree) -> Any:
        """Return the predictions for a batch: a pytree of arrays, one row a sample."""
        raise NotImplementedError

    @checks_options
    def log(
        self,
        name: str,
        value: Any,
        *,
        prog_bar: bool = False,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce: Reduce = "mean",
        weight: Any = None,
    ) -> None:
        """Record a scalar of the running step, or a number in a host hook.

        Nothing is fetched from the device until a report is due.

        Under a private name, which begins with `_`, the value may be an array of any shape, such
        as images. It is in no report: after the epoch or the evaluation hooks find its mean over
        the batches in `run.arrays`, by the name of the series (`run.arrays["val/_images"]`).

        Args:
            name: Series name; the stage is put in front (`loss` in validation: `val/loss`).
            value: Scalar array or number.
            prog_bar: Show it in the progress bar.
            on_step: Report single steps. Default: in training.
            on_epoch: Report the exact reduction over the epoch. Default: True.
            reduce: `"mean"`, `"sum"`, `"min"` or `"max"` over the epoch.
            weight: Weight in the epoch mean. Default: the number of samples in the batch.

        Raises:
            LogError: If the value is no scalar, the name was used before in this step, or the
                call is inside a nested transform.
        """
        trace = TrainModule._tracing
        if trace is not None:
            trace.recorder.log(
                name,
                value,
                prog_bar=prog_bar,
                on_step=on_step,
                on_epoch=on_epoch,
                reduce=reduce,
                weight=weight,
            )
        elif self.run is not None:
            self.run.log(name, value, prog_bar=prog_bar)
        else:
            raise LogError(f"log({name!r}) outside a step or hook: there is no run to log to.")

    def log_dict(self, metrics: Mapping[str, Any], **options: Any) -> None:
        """Call `log` for each item, with the same options."""
        for name, value in metrics.items():
            self.log(name, value, **options)

    def make_rng(self) -> jax.Array:
        """Return a fresh key inside a training step, for models without `nnx.Rngs`.

        Derived from the trainer's seed and the step, so that a resumed run draws the same.
        """
        trace = TrainModule._tracing
        if trace is None or trace.key is None:
            raise ConfigError("make_rng() gives keys inside training_step only.")
        trace.num_keys += 1
        return jax.random.fold_in(trace.key, trace.num_keys)

    def minimize(
        self,
        loss_fn: Callable[[Any], Any],
        model: Any,
        optimizer: str | None = None,
        *,
        has_aux: bool = False,
    ) -> tuple[Any, Any]:
        """Make one update inside `training_step`, and return the loss and the updated model.

        For modules with `automatic_optimization = False`. Differentiates with respect to the
        parameters that the optimiser owns. What `loss_fn` changes in the model's variables
        (BatchNorm statistics, RNG counters) is kept. An NNX model, or a dict, is updated in place
        and is itself what comes back; any other pytree is left as it was. The step goes on with
        the model that comes back, and training with the one that the step had last.

        The step may do this as often as it likes, also with one optimiser; together they are one
        step of `run.global_step`. It may change parameters by assignment too, which is kept.
        Gradient accumulation and `gradient_clip_val` are refused: put `optax.MultiSteps` or
        `optax.clip_by_global_norm` into the optimiser.

        Args:
            loss_fn: Returns the scalar loss of the model that it gets, or `(loss, aux)`.
            model: The whole model.
            optimizer: Its name in `configure_optimizers`; may be left out if there is one only.
            has_aux: Whether `loss_fn` returns `(loss, aux)`.

        Returns:
            `(loss, model)`, or `((loss, aux), model)`, as `jax.value_and_grad` has its values.

        Raises:
            ConfigError: Outside such a step, or for an optimiser that does not exist.
            StepError: For a loss without gradient, another model, or inside a nested transform.

        Example:
            >>> from jaxtrainer import TrainModule
            >>> class Adversarial(TrainModule):
            ...     automatic_optimization = False
            ...     def training_step(self, model, batch):
            ...         def critic_loss(model):
            ...             return model.critic(model.generator(batch)).mean()
            ...         def generator_loss(model):
            ...             return -model.critic(model.generator(batch)).mean()
            ...         loss, model = self.minimize(critic_loss, model, "critic")
            ...         self.log("critic_loss", loss)
            ...         loss, model = self.minimize(generator_loss, model, "generator")
            ...         self.log("generator_loss", loss)
        """
        return self._updates("minimize").minimize(loss_fn, model, optimizer, has_aux=has_aux)

    def apply_gradients(
        self, model: Any, grads: PyTree, optimizer: str | None = None, **extra: Any
    ) -> Any:
        """Make one update from gradients that `training_step` took, and return the updated model.

        What is said at `minimize` holds here too.

        Args:
            model: The whole model.
            grads: As `nnx.grad` or `jax.grad` gives them for it; those of parameters that the
                optimiser does not own are ignored.
            optimizer: Its name; may be left out if there is one only.
            extra: Arguments of the Optax update, e.g. `value=loss` for `reduce_on_plateau`.

        Raises:
            ConfigError: Outside such a step, or for an optimiser that does not exist.
            StepError: If a gradient is missing or has another shape than its parameter.
        """
        return self._updates("apply_gradients").apply_gradients(model, grads, optimizer, extra)

    def _updates(self, what: str) -> Any:
        trace, owner = TrainModule._tracing, type(self).__name__
        if trace is None or trace.recorder.stage != "train":
            raise ConfigError(f"{what}() updates the model inside training_step only.")
        if trace.updates is None:
            raise ConfigError(
                f"{what}() is for steps that make the updates themselves: write "
                f"`automatic_optimization = False` in the class {owner}, or return the loss."
            )
        return trace.updates

    def __getattr__(self, name: str) -> Any:
        hint = f" {OF_THE_MODULE[name]}" if name in OF_THE_MODULE else ""
        message = f"{type(self).__name__} has no attribute {name!r}.{hint}"
        raise AttributeError(message, name=name, obj=self)

    def __getattribute__(self, name: str) -> Any:
        trace = TrainModule._tracing
        if trace is not None and not name.startswith("__"):
            # A name that is not there counts too: a hook may set what `getattr` found missing.
            trace.reads.add(name)
            if name in _HOST_ONLY:
                owner = type(self).__name__
                raise StepError(f"{owner}.{name} was read in a traced step. It {_HOST_ONLY[name]}.")
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_change(name, value)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_change(name, _MISSING)
        object.__delattr__(self, name)

    def _refuse_change(self, name: str, value: Any) -> None:
        attribute = f"{type(self).__name__}.{name}"
        if TrainModule._tracing is not None:
            raise AttributeChangedError(
                f"{attribute} was set inside a traced step, which Python runs once, while it is "
                f"compiled. Use `self.log({name!r}, ...)` to report a value, or an `nnx.Variable` "
                "on the model to carry it to the next step."
            )
        is_read = name in self.__dict__.get("_frozen", ())
        if is_read and not is_same(value, getattr(self, name, _MISSING)):
            raise AttributeChangedError(_stale(attribute))


class _Trace:
    """What one traced step records: scalars, keys drawn, module attributes read."""

    def __init__(self, recorder: Recorder, key: jax.Array | None, updates: Any) -> None:
        self.recorder = recorder
        self.updates = updates
        self.key = key
        self.num_keys = 0
        self.reads: set[str] = set()


@contextmanager
def tracing(
    module: TrainModule, recorder: Recorder, key: jax.Array | None, updates: Any = None
) -> Iterator[None]:
    """Let `module.log` and its like act on this trace, and guard the attributes."""
    trace = _Trace(recorder, key, updates)
    own = {k: v for k, v in vars(module).items() if k not in (*_HOST_ONLY, "_frozen")}
    contents = contents_of(own)
    before, TrainModule._tracing = TrainModule._tracing, trace
    try:
        # As in `configure_model`: what Flax makes anew in the step (a bridge does) is alike.
        with nnx.use_eager_sharding(False):
            yield
    finally:
        TrainModule._tracing = before
    # `self.outputs.append(loss)` passes __setattr__ by, and would leak a tracer.
    for name in (*changed_names(vars(module), contents), *kept_tracers(vars(module))):
        raise AttributeChangedError(
            f"{type(module).__name__}.{name} was changed inside a traced step, which Python runs "
            "once, while it is compiled. Use `self.log(...)`: its epoch mean is exact, and needs "
            "no list."
        )
    frozen = module.__dict__.get("_frozen", {})
    read = {name: contents.get(name) for name in trace.reads}
    object.__setattr__(module, "_frozen", {**frozen, **read})


def step_name(module: TrainModule, stage: Stage) -> str:
    """Return the method that runs in a stage; without a `test_step`, tests run another."""
    if stage == "test" and type(module).test_step is TrainModule.test_step:
        return "validation_step"
    stages = {"train": "training", "validate": "validation"}
    return f"{stages.get(stage, stage)}_step"


def refuse_stale(module: TrainModule) -> None:
    """Raise if a list or dict that the compiled steps have read was changed since, in place."""
    read = {k: v for k, v in module.__dict__.get("_frozen", {}).items() if v is not None}
    for name in changed_names(vars(module), read):
        raise AttributeChangedError(_stale(f"{type(module).__name__}.{name}"))


def thaw(module: TrainModule) -> None:
    """Let attributes change again; called when the compiled steps are no longer used."""
    module.__dict__.pop("_frozen", None)


def _stale(attribute: str) -> str:
    return (
        f"{attribute} was changed, but the compiled step has read it and would not see the new "
        "value. Pass what changes in the batch, as an Optax schedule, or as an `nnx.Variable` on "
        "the model."
    )
