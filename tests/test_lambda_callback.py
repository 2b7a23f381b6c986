"""`LambdaCallback`: given hooks are called, others are not there, slips are named."""

from __future__ import annotations

import pytest

from jaxtrainer import TrainModule
from jaxtrainer.callbacks import LambdaCallback
from jaxtrainer.errors import ConfigError, OptionError
from jaxtrainer.hooks import CallbackList
from tests.tiny import Tiny, make_batches, make_trainer


def test_lambda_hooks_are_called_in_a_run():
    seen = []
    callback = LambdaCallback(
        on_train_start=lambda run: seen.append("start"),
        on_train_batch_end=lambda run, outputs, batch, batch_idx: seen.append(batch_idx),
        on_train_epoch_end=lambda run: seen.append(run.metrics["train/loss"] > 0),
    )
    make_trainer([callback], max_epochs=1).fit(Tiny(), make_batches(3))
    assert seen == ["start", 0, 1, 2, True]


def test_only_given_hooks_are_overridden():
    hooks = CallbackList(
        [LambdaCallback(on_fit_end=print), LambdaCallback(setup=print)], TrainModule()
    )
    assert hooks.has("on_fit_end")
    assert hooks.has("setup")
    assert not hooks.has("on_train_batch_end")
    assert not hooks.has("on_train_batch_start")


def test_misspelt_hook_is_suggested():
    with pytest.raises(ConfigError, match="'on_train_epoch_end'"):
        LambdaCallback(on_train_epoch_ends=print)
    with pytest.raises(OptionError, match=r"'teardwon'. Did you mean 'teardown'\?"):
        LambdaCallback(teardwon=print)


def test_hook_of_lightning_says_what_takes_its_place():
    with pytest.raises(ConfigError, match="Optax transform"):
        LambdaCallback(on_after_backward=lambda run: None)


def test_hook_with_other_parameters_is_refused():
    with pytest.raises(ConfigError, match="def on_train_start"):
        LambdaCallback(on_train_start=lambda trainer, pl_module: None)


def test_hook_that_is_no_function_is_refused():
    with pytest.raises(ConfigError, match="pass a function"):
        LambdaCallback(on_train_start="hello")  # pyright: ignore[reportArgumentType]
