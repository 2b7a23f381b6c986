"""`DataModule` and loaders of the module: who is asked for what, when, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrainer import DataModule
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.checkpoint import find_checkpoint, read_record
from jaxtrainer.errors import CheckpointError, ConfigError, DataError, OptionError
from tests import tiny
from tests.bad_input import module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")


class Split(DataModule):
    """Draws a split at its first `setup`, and keeps it in checkpoints."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        self.order = np.random.default_rng(self.seed).permutation(8)

    def train_dataloader(self) -> Any:
        batches = tiny.make_batches(8)
        return [batches[i] for i in self.order]

    def val_dataloader(self) -> Any:
        return tiny.make_batches(2, ragged=3)

    def test_dataloader(self) -> Any:
        return tiny.make_batches(3)

    def predict_dataloader(self) -> Any:
        return tiny.make_batches(1, ragged=5)

    def teardown(self, stage: str) -> None:
        self.stages.append(f"end {stage}")

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.tolist()}

    def load_state_dict(self, state: Any) -> None:
        self.order = np.array(state["order"])


def train_with(*data: Any, **options: Any) -> dict[str, np.ndarray]:
    probe = tiny.Probe()
    tiny.make_trainer(probe, max_epochs=1).fit(tiny.Tiny(), *data, **options)
    return probe.state


def test_fit_with_a_datamodule_is_that_with_its_loaders():
    datamodule = Split()
    by_position, by_name = train_with(datamodule), train_with(datamodule=Split())
    loaders = (datamodule.train_dataloader(), datamodule.val_dataloader())
    tiny.assert_same_bits(by_position, train_with(*loaders))
    tiny.assert_same_bits(by_name, by_position)
    assert datamodule.stages == ["fit", "end fit"]


def test_evaluation_with_a_datamodule_is_that_with_its_loaders():
    module, datamodule, trainer = tiny.Tiny(), Split(), tiny.make_trainer()
    val, test = datamodule.val_dataloader(), datamodule.test_dataloader()
    quiet: Any = {"verbose": False}
    assert trainer.validate(module, datamodule, **quiet) == trainer.validate(module, val, **quiet)
    by_name = trainer.test(module, datamodule=datamodule, **quiet)
    assert by_name == trainer.test(module, test, **quiet)
    predicted = trainer.predict(module, datamodule)
    assert [len(rows) for rows in predicted] == [8, 5]
    calls = ("validate", "test", "predict")
    assert datamodule.stages == [stage for call in calls for stage in (call, f"end {call}")]


class WithLoaders(tiny.Tiny):
    """A module with loaders of its own."""

    def train_dataloader(self) -> Any:
        return tiny.make_batches(3)

    def val_dataloader(self) -> Any:
        return tiny.make_batches(1)

    def test_dataloader(self) -> Any:
        return tiny.make_batches(2)

    def predict_dataloader(self) -> Any:
        return tiny.make_batches(2)


def test_module_gives_the_loaders_that_are_not_passed():
    module, trainer = WithLoaders(), tiny.make_trainer(max_epochs=1)
    result = trainer.fit(module)
    assert result.num_steps == 3
    assert "val/loss" in result.metrics
    assert set(trainer.validate(module, verbose=False)) == {"val/loss"}
    assert set(trainer.test(module, verbose=False)) == {"test/loss"}
    assert len(trainer.predict(module)) == 2


def test_loader_that_is_passed_comes_before_that_of_the_module():
    result = tiny.make_trainer(max_epochs=1).fit(WithLoaders(), tiny.make_batches(5))
    assert result.num_steps == 5
    assert "val/loss" in result.metrics


def test_module_gives_what_the_datamodule_lacks():
    class OnlyTrain(DataModule):
        def train_dataloader(self) -> Any:
            return tiny.make_batches(4)

    result = tiny.make_trainer(max_epochs=1).fit(WithLoaders(), OnlyTrain())
    assert result.num_steps == 4
    assert "val/loss" in result.metrics


def test_datamodule_may_give_several_validation_loaders():
    class Named(Split):
        def val_dataloader(self) -> Any:
            return {"clean": tiny.make_batches(1), "noisy": tiny.make_batches(2)}

    result = tiny.make_trainer(max_epochs=1).fit(tiny.Tiny(), Named())
    assert {"val/clean/loss", "val/noisy/loss"} <= set(result.metrics)


def test_limit_of_zero_asks_for_no_validation_loader():
    class NoValidation(Split):
        def val_dataloader(self) -> Any:
            raise AssertionError("asked for")

    trainer = tiny.make_trainer(max_epochs=1, limit_val_batches=0)
    assert set(trainer.fit(tiny.Tiny(), NoValidation()).metrics) == {"train/loss"}


def test_datamodule_keeps_its_state_over_a_resume(tmp_path: Path):
    probe, resumed = tiny.Probe(), tiny.Probe()
    tiny.make_trainer(probe, max_epochs=2).fit(tiny.Tiny(), Split(seed=1))
    tiny.make_trainer(Checkpoint(tmp_path), max_steps=5).fit(tiny.Tiny(), Split(seed=1))
    # Another seed, so that what it draws at first must be replaced by what was saved.
    again, trainer = Split(seed=2), tiny.make_trainer([Checkpoint(tmp_path), resumed], max_epochs=2)
    trainer.fit(tiny.Tiny(), again, ckpt_path="last")
    tiny.assert_same_bits(resumed.state, probe.state)
    record = read_record(find_checkpoint(tmp_path))
    assert record["callbacks"]["DataModule"] == again.state_dict()


def test_datamodule_state_that_is_no_json_is_refused(tmp_path: Path):
    class Unsaveable(Split):
        def state_dict(self) -> dict[str, Any]:
            return {"order": self.order}

    with pytest.raises(CheckpointError, match="JSON data; got ndarray"):
        tiny.make_trainer(Checkpoint(tmp_path), max_epochs=1).fit(tiny.Tiny(), Unsaveable())


def wrong(**members: Any) -> Any:
    """A data module called `Wrong` with some methods replaced."""
    return type("Wrong", (DataModule,), members)()


MISSING = "fit got no loader, and Mine has no `train_dataloader`. Write `fit(module, train_loader)`"
RETURNS_NONE = "Wrong.train_dataloader returned None; end it with `return loader`."
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "class": (lambda: Split, DataError, "the train loader is the class Split; make one"),
    "no_loader": (wrong, ConfigError, "Wrong has no `train_dataloader`"),
    "other_name": (
        lambda: wrong(train_loader=lambda self: []),
        ConfigError,
        "Did you mean 'train_loader'?",
    ),
    "returns_none": (lambda: wrong(train_dataloader=lambda self: None), DataError, RETURNS_NONE),
    "setup_with_run": (
        lambda: wrong(setup=lambda self, run: None),
        ConfigError,
        "Wrong.setup(self, run) does not fit; write `def setup(self, stage)`.",
    ),
    "transfer_hook": (
        lambda: wrong(on_after_batch_transfer=lambda self, batch: batch),
        ConfigError,
        "on_after_batch_transfer is never called: pass `device_transform=` to the loader",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_datamodule_that_cannot_work_is_refused(make: Any, kind: Any, message: str):
    refused(kind, message, loader=make())


def test_fit_without_any_loader_is_refused():
    with pytest.raises(ConfigError) as caught:
        tiny.make_trainer(max_epochs=1).fit(module_with())
    assert MISSING in str(caught.value)


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_evaluation_without_any_loader_is_refused(call: str):
    hook = {"validate": "val"}.get(call, call)
    with pytest.raises(ConfigError, match=rf"no `{hook}_dataloader`. Write `{call}\(module, load"):
        getattr(tiny.make_trainer(), call)(module_with())


def test_loader_and_datamodule_together_are_refused():
    trainer, batches = tiny.make_trainer(max_epochs=1), tiny.make_batches(1)
    cases: Any = (
        ((batches,), {"datamodule": Split()}),
        ((Split(), batches), {}),
        ((Split(),), {"datamodule": Split()}),
    )
    for loaders, options in cases:
        with pytest.raises(ConfigError, match=r"both .* data module Split; pass one of them: `fit"):
            trainer.fit(module_with(), *loaders, **options)


@pytest.mark.parametrize("given", [Split, [1]], ids=["class", "list"])
def test_datamodule_option_takes_a_datamodule(given: Any):
    hint = r"; write `Split\(\)`" if given is Split else r"=\[1\] is no DataModule\."
    trainer: Any = tiny.make_trainer(max_epochs=1)
    with pytest.raises(ConfigError, match=hint):
        trainer.fit(module_with(), datamodule=given)


def test_validation_loader_without_a_validation_step_is_refused():
    class NoStep(tiny.Tiny):
        validation_step = tiny.TrainModule.validation_step

    refused(ConfigError, "NoStep has no `validation_step`", module=NoStep(), loader=Split())


@pytest.mark.parametrize("name", ["train_dataloaders", "val_dataloaders", "dataloaders"])
def test_arguments_of_lightning_are_named(name: str):
    instead = {"train_dataloaders": "train_loader", "val_dataloaders": "val_loader"}
    trainer: Any = tiny.make_trainer(max_epochs=1)
    with pytest.raises(OptionError, match=f"Write `{instead.get(name, 'loader')}=`"):
        trainer.fit(module_with(), **{name: tiny.make_batches(1)})


def test_hook_of_the_module_with_arguments_is_refused():
    def train_dataloader(self, run):
        return []

    module = module_with(train_dataloader=train_dataloader)
    refused(ConfigError, "write `def train_dataloader(self)`", module=module)
