"""`configure_callbacks`: a module brings callbacks of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Checkpoint, EarlyStopping
from jaxtrainer.errors import ConfigError
from tests import tiny
from tests.bad_input import module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")


class Named(Callback):
    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def on_fit_start(self, run: Run) -> None:
        self.seen.append(self.name)


class Other(Named):
    """Another class, so that it replaces nothing of `Named`'s place but its own."""


def bringing(callbacks: Any) -> tiny.TrainModule:
    return module_with(configure_callbacks=lambda self: callbacks)


def test_callbacks_of_the_module_come_after_those_of_the_trainer():
    seen: list[str] = []

    class Third(Callback):
        def on_fit_start(self, run: Run) -> None:
            seen.append("module's")

    trainer = tiny.make_trainer([Named("trainer's", seen)], max_steps=1)
    trainer.fit(bringing(Third()), tiny.make_batches(1))
    assert seen == ["trainer's", "module's"]


def test_callbacks_of_the_module_replace_those_of_the_same_class():
    seen: list[str] = []
    trainer = tiny.make_trainer([Named("replaced", seen), Other("kept", seen)], max_steps=1)
    trainer.fit(bringing([Named("new", seen)]), tiny.make_batches(1))
    assert seen == ["kept", "new"]
    seen.clear()
    # Only for the module that brings it.
    trainer.fit(module_with(), tiny.make_batches(1))
    assert seen == ["replaced", "kept"]


def test_callback_of_a_subclass_takes_the_place_too():
    seen: list[str] = []
    trainer = tiny.make_trainer([Named("replaced", seen)], max_steps=1)
    trainer.fit(bringing([Other("new", seen)]), tiny.make_batches(1))
    assert seen == ["new"]


def test_checkpoint_of_the_module_is_found_by_name(tmp_path: Path):
    module = bringing([Checkpoint("saved")])
    trainer = tiny.make_trainer(default_root_dir=tmp_path, max_epochs=1)
    result = trainer.fit(module, tiny.make_batches(2))
    assert result.last_checkpoint == str(tmp_path / "saved" / "step_2")
    assert set(trainer.test(module, tiny.make_batches(1), ckpt_path="best")) == {"test/loss"}


def test_checkpoint_of_the_module_is_left_out_of_a_dev_run(tmp_path: Path):
    trainer = tiny.make_trainer(fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(bringing([Checkpoint("saved")]), tiny.make_batches(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "Mine.configure_callbacks returned None; return a list."),
        ([EarlyStopping], "got <class 'jaxtrainer.callbacks.early_stopping.EarlyStopping'>; write"),
        (["timer"], "callbacks must be Callback instances, got 'timer'"),
    ],
)
def test_what_is_no_callback_is_refused(returned: Any, message: str):
    refused(ConfigError, message, module=bringing(returned))
