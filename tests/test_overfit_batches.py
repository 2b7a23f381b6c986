"""`overfit_batches`: the same few batches every epoch, in training and in validation.

Batches are known by the number of their first row, which is in the data.
"""

from __future__ import annotations

from typing import Any

import grain
import numpy as np
import pytest

from jaxtrainer import Callback, Run, data
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.errors import ConfigError
from tests import tiny
from tests.bad_input import refused

pytestmark = pytest.mark.usefixtures("compiled_once")

ROWS, SIZE = 64, 8


def arrays() -> dict[str, Any]:
    return {**tiny.make_arrays(ROWS), "index": np.arange(ROWS, dtype=np.int32)}


def batches() -> list[dict[str, Any]]:
    return [{k: a[i : i + SIZE] for k, a in arrays().items()} for i in range(0, ROWS, SIZE)]


class Reshuffles:
    """A loader that gives its batches in another order each time it is iterated."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return ROWS // SIZE

    def __iter__(self):
        return (batches()[i] for i in self.rng.permutation(ROWS // SIZE))


LOADERS: dict[str, Any] = {
    "arrays": lambda: data.from_arrays(arrays(), batch_size=SIZE, shuffle=True),
    "gathered": lambda: data.from_arrays(
        arrays(), batch_size=SIZE, shuffle=True, device_resident=False
    ),
    "map_dataset": lambda: grain.MapDataset.source(batches()).seed(3).shuffle(),
    "endless": lambda: grain.MapDataset.source(batches()).seed(3).shuffle().repeat(),
    "iter_dataset": lambda: grain.MapDataset.source(batches()).shuffle(seed=3).to_iter_dataset(),
    "list": batches,
    "reshuffles": Reshuffles,
    "generator": lambda: iter(batches()),
}


class Seen(Callback):
    """First rows of the batches of each epoch, in training and in validation."""

    def __init__(self) -> None:
        self.train: list[list[int]] = []
        self.val: list[list[int]] = []

    def on_train_epoch_start(self, run: Run) -> None:
        self.train.append([])

    def on_validation_epoch_start(self, run: Run) -> None:
        self.val.append([])

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train[-1].append(int(batch["index"][0]))

    def on_validation_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.val[-1].append(int(batch["index"][0]))


def watch(loader: Any, val_loader: Any = None, **options: Any) -> Seen:
    seen = Seen()
    tiny.fit(loader, val_loader, callbacks=[seen], **{"max_epochs": 3, **options})
    return seen


@pytest.mark.parametrize("name", LOADERS)
def test_overfit_batches_reads_the_same_first_batches_each_epoch(name: str):
    seen = watch(LOADERS[name](), tiny.make_batches(3), overfit_batches=2)
    first = watch(LOADERS[name](), max_epochs=1, limit_train_batches=2).train[0]
    assert len(set(first)) == 2
    assert seen.train == [first] * 3
    assert seen.val == [first] * 3


@pytest.mark.parametrize(("given", "count"), [(3, 3), (0.5, 4), (1.0, 8), (99, 8), (0, None)])
def test_overfit_batches_is_a_number_or_a_fraction(given: Any, count: int | None):
    seen = watch(LOADERS["arrays"](), overfit_batches=given, max_epochs=2)
    if count is None:
        assert seen.train[0] != seen.train[1]
    else:
        assert seen.train[0] == seen.train[1]
        assert len(seen.train[0]) == count


def test_overfit_batches_validates_what_is_trained_on_under_every_name():
    loaders = {"clean": tiny.make_batches(1), "noisy": tiny.make_batches(2)}
    # The last batch is not whole, and so is no part of what is trained on.
    train = [*batches()[:2], {k: a[:3] for k, a in batches()[2].items()}]
    seen = Seen()
    options: Any = {"max_epochs": 1, "overfit_batches": 3}
    result, _ = tiny.fit(train, loaders, callbacks=[seen], **options)
    assert (seen.train, seen.val) == ([[0, 8]], [[0, 8, 0, 8]])
    assert result.metrics["val/clean/loss"] == result.metrics["val/noisy/loss"]


def test_overfit_batches_without_validation_stays_without():
    result, _ = tiny.fit(batches(), overfit_batches=2, max_epochs=1)
    assert set(result.metrics) == {"train/loss"}
    assert result.num_steps == 2
    result, _ = tiny.fit(batches(), batches(), overfit_batches=2, limit_val_batches=0, max_steps=2)
    assert set(result.metrics) == {"train/loss"}


def test_overfit_batches_is_for_fit_only():
    trainer = tiny.make_trainer(overfit_batches=1)
    assert len(trainer.predict(tiny.Tiny(), batches())) == ROWS // SIZE
    whole = tiny.make_trainer().validate(tiny.Tiny(), batches(), verbose=False)
    assert trainer.validate(tiny.Tiny(), batches(), verbose=False) == whole


def test_overfit_batches_brings_the_loss_down():
    module = tiny.Tiny(make=tiny.line)
    result, _ = tiny.fit(LOADERS["arrays"](), module=module, overfit_batches=1, max_epochs=100)
    losses = result.history.epoch["train/loss"].values
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("name", ["arrays", "list"])
def test_overfit_batches_survives_a_resume(name: str, tmp_path):
    options: Any = {"overfit_batches": 5, "max_epochs": 3}
    saver = Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole, state = tiny.fit(LOADERS[name](), callbacks=[saver], **options)
    rest, same = tiny.fit(LOADERS[name](), ckpt_path=tmp_path / "step_6", **options)
    tiny.assert_same_bits(same, state)
    assert rest.metrics == whole.metrics


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"limit_train_batches": 3}, "leave out limit_train_batches=3"),
        ({"limit_val_batches": 0.5}, "leave out limit_val_batches=0.5"),
    ],
)
def test_overfit_batches_refuses_another_number_of_batches(options: Any, part: str):
    with pytest.raises(ConfigError, match=part):
        tiny.make_trainer(overfit_batches=2, max_epochs=1, **options)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (-1, "overfit_batches must be an integer or a fraction of 1, got -1"),
        (1.5, "pass an integer: `overfit_batches=1`"),
        (True, "overfit_batches must be an integer"),
    ],
)
def test_overfit_batches_refuses_a_value(given: Any, part: str):
    refused(ConfigError, part, overfit_batches=given)


def test_overfit_batches_refuses_a_fraction_of_an_unknown_length():
    loader = LOADERS["iter_dataset"]()
    refused(ConfigError, "overfit_batches=0.5 is a fraction", loader=loader, overfit_batches=0.5)


def test_fast_dev_run_takes_the_place_of_overfit_batches():
    seen = watch(batches(), fast_dev_run=3, overfit_batches=1)
    assert seen.train == [[0, 8, 16]]
