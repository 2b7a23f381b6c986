"""Checks of the user's module, in words that say what to write instead.

Run before anything is traced, except for `configured_model`. May import levels 0 to 2.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from flax import nnx

from jaxtrainer.errors import AttributeChangedError, ConfigError
from jaxtrainer.frozen import kept_tracers
from jaxtrainer.module import TrainModule, step_name
from jaxtrainer.types import Stage

_OPTIONAL = (
    "configure_callbacks",
    "prepare_data",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
)
_PARAMETERS = {
    "configure_model": ("rngs",),
    "configure_optimizers": (),
    **dict.fromkeys(_OPTIONAL, ()),
}
_STEP = ("model", "batch")
_EVALUATES = ("validation_step", "test_step", "predict_step")


def require(module: Any, names: tuple[str, ...]) -> None:
    """Raise ConfigError unless the module is a TrainModule that has the steps asked for."""
    if not isinstance(module, TrainModule):
        raise ConfigError(f"expected an instance of a TrainModule, got {_described(module)}")
    for name in names:
        if not is_overridden(module, name):
            own = [n for n in vars(type(module)) if not hasattr(TrainModule, n)]
            close = difflib.get_close_matches(name, own, n=1)
            rename = f" It has `{close[0]}`, which is never called: rename it." if close else ""
            raise ConfigError(
                f"{type(module).__name__} has no `{name}`; write `{_definition(name)}`.{rename}"
            )
    for name in (*names, *_OPTIONAL):
        _check_parameters(module, name)


def _described(given: Any) -> str:
    if isinstance(given, type) and issubclass(given, TrainModule):
        return f"the class {given.__name__}; write `{given.__name__}()`."
    return (
        f"a {type(given).__name__}; write `class MyModule(TrainModule)`, whose `configure_model` "
        "returns the model, and pass the module first: `fit(MyModule(), loader)`."
    )


def _check_parameters(module: TrainModule, name: str) -> None:
    if name == "test_step" and not _differs(module, name):
        name = "validation_step"
    signature = inspect.signature(getattr(module, name))
    wanted, got = _PARAMETERS.get(name, _STEP), list(signature.parameters)
    takes_name = name in _EVALUATES and "loader_name" in got
    try:
        signature.bind(*wanted, **({"loader_name": ""} if takes_name else {}))
    except TypeError:
        fits = False
    else:
        # Lightning's `(self, batch, batch_idx)` takes as many arguments, but other ones.
        fits = not wanted[1:] or (got[0] != "batch" and "batch_idx" not in got[:2])
        fits = fits and "dataloader_idx" not in got
    if not fits:
        hint = " The index of the batch is an argument of the hooks." if "batch_idx" in got else ""
        if "dataloader_idx" in got and name in _EVALUATES:
            hint = " For the loader's name add a parameter `loader_name`."
        raise ConfigError(
            f"{type(module).__name__}.{name}({', '.join(['self', *got])}) does not fit; write "
            f"`{_definition(name)}`.{hint}"
        )


def _definition(name: str) -> str:
    return f"def {name}({', '.join(('self', *_PARAMETERS.get(name, _STEP)))})"


def loader_arguments(module: TrainModule, stage: Stage, loader_name: str | None) -> dict[str, str]:
    """Return what an evaluation step gets beside model and batch: the loader's name, if it asks.

    Raises:
        ConfigError: If it asks, and the loader has none.
    """
    name = step_name(module, stage)
    parameter = inspect.signature(getattr(module, name)).parameters.get("loader_name")
    if parameter is None:
        return {}
    if loader_name is not None:
        return {"loader_name": loader_name}
    if parameter.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(module).__name__}.{name} takes `loader_name`, but the {stage} loader has no "
            "name; pass it in a dict, `{'clean': loader}`, or write `loader_name=None`."
        )
    return {}


def configured_model(module: TrainModule, rngs: Any) -> Any:
    """Return what `configure_model` returns (traced), unless it kept arrays on the module.

    Raises:
        ConfigError: If it returned None.
        AttributeChangedError: If it set e.g. `self.model` or `self.net`.
    """
    before = dict(vars(module))
    try:
        # Annotations of its variables are for the layout; Flax would ask for a mesh here.
        with nnx.use_eager_sharding(False):
            model = module.configure_model(rngs)
    finally:
        # Not left there: the next call would take a leaked tracer for a trained model.
        kept = {name: vars(module).pop(name) for name in [*kept_tracers(vars(module))]}
        vars(module).update({name: before[name] for name in kept if name in before})
    for name in kept:
        raise AttributeChangedError(
            f"{type(module).__name__}.configure_model set `self.{name}` to a model or array that "
            "is being traced. Return the model; each step gets it as its argument `model`, and "
            "`self.model` is there after training."
        )
    if model is None:
        raise ConfigError(
            f"{type(module).__name__}.configure_model returned None; end it with `return model`."
        )
    return model


def is_overridden(module: TrainModule, name: str) -> bool:
    """Return whether the user's class has its own version of a step."""
    if name == "test_step" and not _differs(module, "test_step"):
        return _differs(module, "validation_step")
    return _differs(module, name)


def _differs(module: TrainModule, name: str) -> bool:
    return getattr(type(module), name) is not getattr(TrainModule, name)
