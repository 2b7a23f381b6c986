"""`Trainer.verify_resume` and `verify_determinism`: what they find, and what they leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import EMA, Checkpoint, EarlyStopping, LearningRateFinder, Timer
from jaxtrainer.errors import ConfigError, DataError
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")


def verify(*callbacks: Callback, module: Any = None, loader: Any = None, **options: Any) -> Any:
    asked = {name: options.pop(name) for name in ("steps", "at") if name in options}
    trainer = tiny.make_trainer(callbacks, **{"max_epochs": 5, **options})
    loader = tiny.make_loader() if loader is None else loader
    return trainer.verify_resume(module or tiny.Tiny(), loader, tiny.make_batches(2), **asked)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"accumulate_grad_batches": 3}, marks=pytest.mark.slow),
        pytest.param({"steps_per_dispatch": 1, "val_check_interval": 3}, marks=pytest.mark.slow),
        pytest.param({"steps_per_dispatch": "auto", "at": [2, 9, 11]}, marks=pytest.mark.slow),
    ],
    ids=["fused", "window", "single", "several"],
)
def test_verified_resume_is_equal(options: Any):
    report = verify(EMA(0.9), EarlyStopping("train/loss"), steps=12, **options)
    assert report.is_equal, str(report)
    assert (report.steps, report.at) == (12, tuple(options.get("at", (4,))))
    assert report.num_arrays > 15
    assert str(report).endswith(f"digest {report.digest[:16]}")


class Turning:
    """A loader that begins one batch later each time it is read."""

    def __init__(self) -> None:
        self.batches = tiny.make_batches(8)

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        self.batches.append(self.batches.pop(0))
        return iter([*self.batches])


def test_loader_with_another_order_is_found():
    report = verify(loader=Turning(), steps=6)
    assert not report.is_equal
    text = str(report)
    assert text.startswith("6 steps, resumed after 2: ")
    assert "params/first/kernel: " in text
    assert "a loader that gives other batches when it is read again" in text


def test_difference_is_measured():
    report = verify(loader=Turning(), steps=6)
    [kernel] = [d for d in report.differences if d.name == "params/first/kernel"]
    assert 0 < kernel.count <= kernel.size == 32
    assert 0.0 < kernel.largest < 1.0


class Drawing(tiny.Tiny):
    """Reads the clock of the host, as it were, while it is traced."""

    def training_step(self, model: Any, batch: Any) -> Any:
        outputs = super().training_step(model, batch)
        return {**outputs, "loss": outputs["loss"] * np.float32(1.0 + random.random())}


def test_determinism_is_equal_or_not():
    trainer, batches = tiny.make_trainer(max_epochs=2), tiny.make_batches(8)
    report = trainer.verify_determinism(tiny.Tiny(), batches, steps=6)
    assert report.is_equal
    assert report.at == ()
    assert str(report).startswith("6 steps, run twice: all ")
    assert not trainer.verify_determinism(Drawing(), batches, steps=6).is_equal


class Counting(Callback):
    """Keeps what it has counted on itself."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch_idx)


def test_verification_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    module, counting, timer = tiny.Tiny(), Counting(), Timer(verbose=False)
    finder = LearningRateFinder()
    trainer = tiny.make_trainer([counting, timer, finder, Checkpoint("run")], max_epochs=2)
    before = {**vars(module)}
    assert trainer.verify_resume(module, tiny.make_loader(), steps=6).is_equal
    assert vars(module) == before
    assert module.model is None
    assert counting.batches == []
    assert timer.start_time() is None
    assert [*tmp_path.rglob("*")] == []


def test_module_that_was_trained_is_where_it_starts():
    module = tiny.Tiny()
    tiny.fit(module=module, max_epochs=1)
    trained, model = tiny.params_of(module), module.model
    assert verify(module=module, steps=6).is_equal
    assert module.model is model
    tiny.assert_same_bits(tiny.params_of(module), trained)


def test_module_that_holds_an_open_file_can_be_verified():
    module: Any = tiny.Tiny()
    with open(__file__) as module.opened:
        assert verify(module=module, steps=4).is_equal


@pytest.mark.parametrize("at", [0, 8, [3, 3], [5, 2], 40], ids=str)
def test_interruption_that_cannot_be_is_refused(at: Any):
    with pytest.raises(ConfigError, match=r"rising numbers of steps, from 1 to below 8, where"):
        verify(max_epochs=1, at=at)


def test_loader_that_is_read_once_only_is_refused():
    with pytest.raises(DataError, match=r"a generator, which can be read once only"):
        verify(loader=(batch for batch in tiny.make_batches(8)))
