"""`TrainModule`: what a user subclasses. A plain class of hyper-parameters and steps.

Holds no arrays while training; the steps are traced, the hooks run on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import jax

from jaxtrainer.errors import AttributeChangedError, ConfigError, LogError, did_you_mean
from jaxtrainer.metrics import Recorder
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree, Reduce

_OWN = ("run", "model")
_MISSING = object()


class TrainModule:
    """Model, optimiser and steps of one training program.

    Any hook of `Callback` may be written on a module too; it runs after the callbacks'.

    Attributes:
        model: The trained model in evaluation mode after `fit`, also after an exception.
        run: The host's record of the running or last call of the trainer.

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
    run: Run | None = None
    _tracing: ClassVar[_Trace | None] = None

    def configure_model(self, rngs: Any) -> Any:
        """Return the model: an `nnx.Module`, or any pytree with arrays (Equinox, Linen params).

        Runs under `jax.jit`, so that each array is made where it will live.

        Args:
            rngs: `nnx.Rngs` seeded by the trainer.
        """
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """Return an `optax.GradientTransformation`.

        `self.run.estimated_steps` is known here, for schedules.
        """
        raise NotImplementedError

    def training_step(self, model: Any, batch: PyTree) -> Any:
        """Return the scalar loss, or a dict with `"loss"` and whatever callbacks read.

        Traced: pure JAX, with the model in training mode. What the step changes in the model's
        variables (BatchNorm statistics, RNG counters, your own) is carried to the next step.
        A `"weight"` in the dict is the weight of this batch under gradient accumulation.
        """
        raise NotImplementedError

    def validation_step(self, model: Any, batch: PyTree) -> Any:
        """Log with `self.log`, and return a dict for callbacks, or None. Evaluation mode."""
        raise NotImplementedError

    def test_step(self, model: Any, batch: PyTree) -> Any:
        """Like `validation_step`, which is the default."""
        return self.validation_step(model, batch)

    def predict_step(self, model: Any, batch: PyTree) -> Any:
        """Return the predictions for a batch: a pytree of arrays, one row a sample."""
        raise NotImplementedError

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
            self.run.log(name, float(value), prog_bar=prog_bar)
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

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        trace = TrainModule._tracing
        if trace is not None and name in object.__getattribute__(self, "__dict__"):
            trace.reads.add(name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if TrainModule._tracing is not None:
            raise AttributeChangedError(
                f"{type(self).__name__}.{name} was set inside a traced step, where it would keep a "
                f"tracer. Use `self.log({name!r}, ...)` to report a value, or an `nnx.Variable` "
                "on the model to carry it to the next step."
            )
        frozen = self.__dict__.get("_frozen", ())
        if name in frozen and value is not self.__dict__.get(name, _MISSING):
            raise AttributeChangedError(
                f"{type(self).__name__}.{name} is read by the compiled step, which would not see "
                "the new value. Pass what changes in the batch, as an Optax schedule, or as an "
                "`nnx.Variable` on the model."
            )
        object.__setattr__(self, name, value)


class _Trace:
    """What one traced step records: scalars, keys drawn, module attributes read."""

    def __init__(self, recorder: Recorder, key: jax.Array | None) -> None:
        self.recorder = recorder
        self.key = key
        self.num_keys = 0
        self.reads: set[str] = set()


@contextmanager
def tracing(module: TrainModule, recorder: Recorder, key: jax.Array | None) -> Iterator[None]:
    """Let `module.log` and `module.make_rng` act on this trace, and guard the attributes."""
    trace = _Trace(recorder, key)
    before, TrainModule._tracing = TrainModule._tracing, trace
    try:
        yield
    finally:
        TrainModule._tracing = before
    _refuse_kept_tracers(module)
    frozen = module.__dict__.get("_frozen", frozenset())
    object.__setattr__(module, "_frozen", frozen | trace.reads)


def thaw(module: TrainModule) -> None:
    """Let attributes change again; called when the compiled steps are no longer used."""
    module.__dict__.pop("_frozen", None)


def _refuse_kept_tracers(module: TrainModule) -> None:
    # `self.outputs.append(loss)` passes __setattr__ by, and would leak a tracer.
    for name, value in vars(module).items():
        if name in _OWN or not isinstance(value, list | dict | set | tuple):
            continue
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            raise AttributeChangedError(
                f"{type(module).__name__}.{name} got a traced value added inside a step. "
                f"Use `self.log(...)`: its epoch mean is exact, and needs no list."
            )


def is_overridden(module: TrainModule, name: str) -> bool:
    """Return whether the user's class has its own version of a step."""
    if name == "test_step" and not _differs(module, "test_step"):
        return _differs(module, "validation_step")
    return _differs(module, name)


def _differs(module: TrainModule, name: str) -> bool:
    return getattr(type(module), name) is not getattr(TrainModule, name)


def require(module: Any, names: tuple[str, ...]) -> None:
    """Raise ConfigError unless the module is a TrainModule that has the steps asked for."""
    if not isinstance(module, TrainModule):
        raise ConfigError(
            f"expected a TrainModule instance, got {module!r}; "
            "write `class MyModule(TrainModule): ...` and pass `MyModule()`."
        )
    for name in names:
        if not is_overridden(module, name):
            own = [n for n in dir(type(module)) if not n.startswith("_") and not hasattr(TrainModule, n)]
            raise ConfigError(
                f"{type(module).__name__} has no `{name}`; "
                f"write `def {name}(self{_PARAMETERS.get(name, '')})`.{did_you_mean(name, own)}"
            )


_PARAMETERS = {
    "configure_model": ", rngs",
    "training_step": ", model, batch",
    "validation_step": ", model, batch",
    "test_step": ", model, batch",
    "predict_step": ", model, batch",
}
