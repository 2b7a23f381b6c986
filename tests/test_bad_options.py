"""Options, modules, callbacks and hooks that are misspelt, foreign or impossible."""

from __future__ import annotations

from typing import Any

import grain
import pytest
from flax import nnx

from jaxtrainer import Callback, Trainer, TrainModule
from jaxtrainer.callbacks import Accuracy, Checkpoint, ProgressBar, Timer
from jaxtrainer.errors import ConfigError, OptionError
from tests import tiny
from tests.bad_input import assert_says, loss_of, module_with, refused

STEP = "write `def training_step(self, model, batch)`"
HOOK = "write `def on_train_epoch_end(self, run)`"


@pytest.mark.parametrize(
    ("make", "option", "part"),
    [
        (Trainer, "max_epoch", "Did you mean 'max_epochs'?"),
        (Trainer, "epochs", "Did you mean 'max_epochs' or 'min_epochs'?"),
        (Trainer, "val_interval", "Did you mean 'val_check_interval'?"),
        (Trainer, "accelerator", "JAX takes the GPU or TPU it finds"),
        (Trainer, "devices", "`mesh={'data': number_of_devices}`"),
        (Trainer, "zzz", "Options: max_epochs, max_steps"),
        (Accuracy, "topk", "Did you mean 'top_k'?"),
        (Checkpoint, "dir", "Did you mean 'dirpath'?"),
        (ProgressBar, "refresh_rate", "Did you mean 'refresh_per_second'?"),
        (Timer, "durration", "Did you mean 'duration'?"),
    ],
)
def test_unknown_option_is_refused_with_the_close_match(make, option, part):
    with pytest.raises(OptionError) as caught:
        make(**{option: 1})
    assert_says(caught.value, f"{make.__name__} got an unknown option {option!r}", part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 2**32}, "seed must be below 2**32"),
        ({"seed": None}, "seed must be an integer of at least 0, got None"),
        ({"log_every_n_steps": 0}, "log_every_n_steps must be an integer of at least 1, got 0"),
        ({"accumulate_grad_batches": 1.5}, "accumulate_grad_batches must be an integer"),
        ({"num_sanity_val_steps": -1}, "num_sanity_val_steps must be an integer"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch must be an integer"),
        ({"gradient_clip_val": 0}, "gradient_clip_val must be a number above 0, or None"),
        ({"gradient_clip_val": "1"}, "gradient_clip_val must be a number above 0, or None"),
        ({"gradient_clip_algorithm": "l2"}, "use 'norm' or 'value'"),
        ({"precision": "bf16-mixd"}, "Did you mean 'bf16-mixed'?"),
        ({"fast_dev_run": "yes"}, "fast_dev_run must be an integer of at least 0, got 'yes'"),
        ({"max_time": "1h"}, "write `'DD:HH:MM:SS'`"),
        ({"callbacks": "bar"}, "callbacks must be Callback instances, got 'bar'"),
        ({"callbacks": Timer}, "write `Timer()`"),
        ({"callbacks": [None]}, "callbacks must be Callback instances, got None"),
    ],
)
def test_trainer_refuses_a_value(options, part):
    with pytest.raises(ConfigError) as caught:
        Trainer(max_epochs=1, **{"enable_progress_bar": False, **options})
    assert_says(caught.value, part)


@pytest.mark.parametrize("value", [0, "Auto", True])
def test_trainer_refuses_steps_per_dispatch(value):
    with pytest.raises(OptionError, match="pass 'auto' or a positive integer"):
        Trainer(steps_per_dispatch=value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_epochs": None}, "pass `Trainer(max_epochs=...)`, `max_steps=...` or `max_time=...`"),
        ({"max_epochs": -2}, "max_epochs must be an integer of at least 0, got -2"),
        ({"max_epochs": 2.5}, "max_epochs must be an integer of at least 0, got 2.5"),
        ({"max_epochs": True}, "max_epochs must be an integer of at least 0, got True"),
        ({"min_epochs": 3}, "min_epochs=3 is more than max_epochs=2"),
        ({"min_steps": None}, "min_steps must be an integer of at least 0, got None"),
        ({"limit_train_batches": 0}, "limit_train_batches=0 leaves no batch"),
        ({"limit_train_batches": 1.5}, "pass an integer: `limit_train_batches=1`"),
        ({"limit_train_batches": "3"}, "limit_train_batches must be an integer or a fraction"),
        ({"limit_val_batches": -1}, "limit_val_batches must be an integer or a fraction"),
        ({"val_check_interval": 0}, "val_check_interval=0: pass an integer"),
        ({"val_check_interval": 1.5}, "pass an integer: `val_check_interval=1`"),
        ({"val_check_interval": 9}, "more than the 3 batches of an epoch"),
        ({"mesh": {"dat": 1}}, "no axis is called 'dat'. Did you mean 'data'?"),
        ({"mesh": {"data": 99}}, "does not fit the 8 devices"),
        ({"mesh": 8}, "mesh=8: pass axis sizes"),
    ],
)
def test_fit_refuses_a_value_before_compiling(options, part):
    refused(ConfigError, part, val_loader=tiny.make_batches(1), **options)


@pytest.mark.parametrize("name", ["limit_train_batches", "val_check_interval"])
def test_fraction_of_a_loader_without_a_length_is_refused(name):
    loader = grain.MapDataset.source(tiny.make_batches(3)).to_iter_dataset()
    options: dict[str, Any] = {name: 0.5}
    refused(ConfigError, f"{name}=0.5 is a fraction of", loader=loader, **options)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dirpath": None}, "Checkpoint needs a run directory, got None"),
        ({"mode": "maximum"}, "use 'min' or 'max'"),
        ({"every_n_epochs": 1, "every_n_train_steps": 3}, "takes one of every_n_epochs"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a positive integer, got 0"),
        ({"save_top_k": 3}, "`monitor='val/loss'`"),
        ({"save_top_k": -2}, "save_top_k must be -1 (all), 0 or more, got -2"),
        ({"save_top_k": 0, "save_last": False}, "saves nothing"),
        ({"train_time_interval": "1h"}, "write `'DD:HH:MM:SS'`"),
        ({"train_time_interval": 0}, "must be positive"),
    ],
)
def test_checkpoint_refuses_a_value(options, part):
    with pytest.raises(ConfigError) as caught:
        Checkpoint(**{"dirpath": "runs", **options})
    assert_says(caught.value, part)


@pytest.mark.parametrize("top_k", [0, 1.5, True])
def test_accuracy_refuses_top_k(top_k):
    with pytest.raises(ConfigError, match="top_k must be a positive integer"):
        Accuracy(top_k=top_k)


@pytest.mark.parametrize(
    ("module", "part"),
    [
        (tiny.Tiny, "got the class Tiny; write `Tiny()`"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "got a Linear; write `class MyModule(TrainModule)`"),
        ([1], "got a list; write `class MyModule(TrainModule)`"),
    ],
    ids=["class", "model", "loader"],
)
def test_what_is_no_module_is_refused(module, part):
    refused(ConfigError, part, module=module)


class NoStep(TrainModule):
    def configure_model(self, rngs: Any) -> Any:
        return tiny.line(rngs)


@pytest.mark.parametrize(
    ("missing", "similar"),
    [
        ("configure_optimizers", "configure_optimizer"),
        ("training_step", "train_step"),
        ("validation_step", "val_step"),
    ],
)
def test_missing_step_is_refused_with_the_close_match(missing, similar):
    wanted = ("configure_optimizers", "training_step", "validation_step")
    members: dict[str, Any] = {n: getattr(tiny.Tiny, n) for n in wanted if n != missing}
    members[similar] = getattr(tiny.Tiny, missing)
    module = type("Mine", (NoStep,), members)()
    parts = (f"Mine has no `{missing}`", f"It has `{similar}`, which is never called: rename it")
    refused(ConfigError, *parts, module=module, val_loader=tiny.make_batches(1))


@pytest.mark.parametrize(
    ("step", "got"),
    [
        (lambda self, batch, batch_idx: 0.0, "(self, batch, batch_idx)"),
        (lambda self, batch: 0.0, "(self, batch)"),
        (lambda self, batch, model: 0.0, "(self, batch, model)"),
        (lambda self, model, batch, batch_idx: 0.0, "(self, model, batch, batch_idx)"),
    ],
)
def test_step_with_other_parameters_is_refused(step, got):
    module = module_with(training_step=step)
    refused(ConfigError, f"Mine.training_step{got} does not fit", STEP, module=module)


@pytest.mark.parametrize(
    ("stage", "name"),
    [("validate", "validation_step"), ("test", "validation_step"), ("predict", "predict_step")],
)
def test_lightning_signature_is_refused_in_every_stage(stage, name):
    module = module_with(**{name: lambda self, batch, batch_idx: None})
    part = f"write `def {name}(self, model, batch)`"
    refused(ConfigError, part, module=module, stage=stage)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("configure_model", "(self, rngs)"), ("configure_optimizers", "(self)")],
)
def test_configure_method_with_other_parameters_is_refused(name, parameters):
    module = module_with(**{name: lambda self, a, b: None})
    refused(ConfigError, f"write `def {name}{parameters}`", module=module)


def test_steps_may_name_their_parameters_as_they_like():
    module = module_with(training_step=lambda self, net, data: loss_of(net, data))
    result, _ = tiny.fit(tiny.make_batches(3), module=module, max_epochs=1)
    assert result.num_steps == 3


def callback_with(**members: Any) -> Callback:
    return type("Mine", (Callback,), members)()


OWNERS = {
    "module": lambda **members: {"module": module_with(**members)},
    "callback": lambda **members: {"callbacks": [callback_with(**members)]},
}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("on_trian_epoch_end", "Did you mean 'on_train_epoch_end'?"),
        ("on_val_epoch_end", "Did you mean 'on_validation_epoch_end'?"),
        ("train_epoch_end", "the hook is `def on_train_epoch_end(self, run)`"),
        ("training_epoch_end", "the hook is `def on_train_epoch_end(self, run)`"),
        ("on_epoch_end", "the hook is `def on_train_epoch_end(self, run)`"),
        ("on_before_optimizer_step", "write it into an Optax transform"),
        ("optimizer_step", "write it into an Optax transform"),
    ],
)
def test_hook_that_would_never_be_called_is_refused(owner, name, part):
    hook = owner(**{name: lambda self, run: None})
    refused(ConfigError, f"Mine.{name} is never called", part, **hook)


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize(
    ("hook", "got"),
    [
        (lambda self, trainer, pl_module: None, "(self, trainer, pl_module)"),
        (lambda self, trainer: None, "(self, trainer)"),
        (lambda self, stage: None, "(self, stage)"),
        (lambda self: None, "(self)"),
    ],
)
def test_hook_with_lightnings_parameters_is_refused(owner, hook, got):
    parts = (f"Mine.on_train_epoch_end{got} does not fit", HOOK)
    refused(ConfigError, *parts, **owner(on_train_epoch_end=hook))


def test_hook_may_name_its_parameter_as_it_likes():
    seen: list[int] = []
    callback = callback_with(on_train_epoch_end=lambda self, r: seen.append(r.epoch))
    tiny.fit(tiny.make_batches(3), module=module_with(), callbacks=[callback], max_epochs=1)
    assert seen == [0]
