"""Loaders and batches that cannot be trained on: what was got, what was expected, what to write."""

from __future__ import annotations

from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer import Callback, Run, data
from jaxtrainer.callbacks import Accuracy
from jaxtrainer.errors import BatchSpecError, ConfigError, DataError
from tests import tiny
from tests.bad_input import assert_says, frames_of, loss_of, module_with, refused

ROWS = 8
FROM_ARRAYS = "data.from_arrays(arrays, batch_size=...)"


def batch(rows: int = ROWS, **leaves: Any) -> dict[str, Any]:
    return {**tiny.make_arrays(rows), **leaves}


class Loader:
    """What a PyTorch loader looks like from outside."""

    def __init__(self, batches: list[Any], length: int) -> None:
        self.batches = batches
        self.length = length

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("loader", "part"),
    [
        ([], "the train loader has no batches"),
        (Loader([], 0), "the train loader has no batches"),
        (Loader([], 3), "yielded no batch in epoch 0"),
        ((b for b in ()), "yielded no batch in epoch 0"),
        (grain.MapDataset.range(3).batch(ROWS, drop_remainder=True), "no batches"),
        (grain.MapDataset.range(3).to_iter_dataset().batch(ROWS, drop_remainder=True), "no batch"),
    ],
    ids=["list", "sized", "wrong-length", "generator", "grain-map", "grain-iter"],
)
def test_loader_without_a_batch_is_refused(loader, part):
    refused(DataError, part, "use a smaller batch size", loader=loader)


def test_empty_validation_loader_is_refused_before_training():
    refused(DataError, "the validate loader has no batches", val_loader=[])


def test_from_arrays_refuses_fewer_samples_than_a_batch():
    with pytest.raises(DataError, match=r"3 samples make no batch of 8.*`batch_size=3` or less"):
        data.from_arrays(tiny.make_arrays(3), batch_size=ROWS, drop_remainder=True)


def test_from_arrays_refuses_arrays_without_a_row():
    with pytest.raises(DataError, match=r"without a row; pass at least one. Did a selection"):
        data.from_arrays(tiny.make_arrays(0), batch_size=1)


@pytest.mark.parametrize(
    ("loader", "parts"),
    [
        (batch(), ("of type dict", FROM_ARRAYS)),
        (np.ones((ROWS, 3)), ("an array", FROM_ARRAYS)),
        (jnp.ones((ROWS, 3)), ("an array", FROM_ARRAYS)),
        ((np.ones((ROWS, 3)), np.ones(ROWS)), ("arrays of shapes [[8, 3], [8]]", FROM_ARRAYS)),
        ("mnist.npz", ("of type str", FROM_ARRAYS)),
        (5, ("of type int", FROM_ARRAYS)),
        (Loader, ("the class Loader", "`Loader(...)`")),
        (lambda: iter([batch()]), ("a function", "call it")),
    ],
    ids=["dict", "numpy", "jax", "pair-of-arrays", "path", "number", "class", "function"],
)
def test_what_is_no_loader_is_refused(loader, parts):
    refused(DataError, "the train loader is", *parts, loader=loader)


@pytest.mark.parametrize(
    ("first", "parts"),
    [
        ({}, ("has no arrays, got {}", "`{'image': images, 'label': labels}`")),
        (None, ("has no arrays, got None",)),
        (7, ("share their first axis", "got (the batch itself): int32[]")),
        (batch(0), ("at least one; got label: int32[0], x: float32[0, 4]",)),
        (batch(scale=2.0), ("share their first axis", "scale: float32[]")),
        (batch(x=np.ones((2, 4), np.float32)), ("got label: int32[8], x: float32[2, 4]",)),
        (batch(name=np.array(["a"] * ROWS)), ("leaf name has dtype <U1", "encode it")),
        (batch(name=np.array([None] * ROWS)), ("leaf name has dtype object", "encode it")),
    ],
    ids=["empty", "none", "number", "no-rows", "scalar-leaf", "unequal-rows", "text", "objects"],
)
def test_batch_that_no_step_could_take_is_refused(first, parts):
    refused(DataError, "train batch 0 of epoch 0", *parts, loader=[first])


@pytest.mark.parametrize(
    ("third", "parts"),
    [
        ({"x": batch()["x"]}, ("another structure", "label (int32[8]) is missing")),
        (batch(extra=np.ones(ROWS, np.float32)), ("extra (float32[8]) is new",)),
        (batch(x=np.ones((ROWS, 4), np.int32)), ("leaf x", "expected float32[8, 4], got int32[8")),
        (batch(x=np.ones((ROWS, 5), np.float32)), ("leaf x", "got float32[8, 5]", "or crop")),
        (batch(x=np.ones((ROWS, 4, 1), np.float32)), ("leaf x", "got float32[8, 4, 1]")),
        (batch(x=np.float32(1)), ("leaf x", "got float32[]")),
        (batch(2 * ROWS), ("leaf label", "expected int32[8], got int32[16]")),
    ],
    ids=["leaf-missing", "leaf-new", "dtype", "shape", "rank", "scalar", "more-rows"],
)
def test_batch_unlike_the_first_is_refused_with_the_leaf(third, parts):
    loader = [batch(), batch(), third, batch()]
    where = "train batch 2 of epoch 0"
    refused(BatchSpecError, where, *parts, loader=loader, compiled=["train step"])


def test_batch_of_another_container_is_refused_with_both_structures():
    loader = [(batch()["x"], batch()["label"]), [batch()["x"], batch()["label"]]]
    module = module_with(training_step=lambda self, model, batch: loss_of(model, {"x": batch[0]}))
    parts = ("expected PyTreeDef((*, *)), got PyTreeDef([*, *])",)
    refused(BatchSpecError, *parts, module=module, loader=loader, compiled=["train step"])


def test_smaller_batch_before_the_last_is_refused():
    parts = ("train batch 1 of epoch 0 has 2 rows, expected 8", "only the last batch")
    loader = [batch(), batch(2), batch()]
    refused(BatchSpecError, *parts, loader=loader, compiled=["train step"])


def test_later_batch_without_rows_is_refused():
    parts = ("train batch 1 of epoch 0", "at least one; got label: int32[0]")
    refused(DataError, *parts, loader=[batch(), batch(0)], compiled=["train step"])


def test_validation_batch_unlike_the_first_is_refused():
    val_loader = [batch(), batch(x=np.ones((ROWS, 5), np.float32))]
    parts = ("validate batch 1 of epoch 0", "leaf x: expected float32[8, 4], got float32[8, 5]")
    refused(BatchSpecError, *parts, val_loader=val_loader, compiled=["train step"])


def test_batch_that_does_not_divide_over_the_devices_is_refused():
    parts = ("a batch of 6 rows does not divide over 4 devices", 'Trainer(mesh={"data": 1})')
    refused(ConfigError, *parts, loader=[batch(6)], mesh={"data": 4})


class Epochs(Callback):
    """Epochs that were run to their end."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def on_train_epoch_end(self, run: Run) -> None:
        self.ended.append(run.epoch)


@pytest.mark.parametrize("make", [lambda b: (x for x in b), iter], ids=["generator", "iterator"])
def test_one_shot_loader_trains_one_epoch_and_is_refused_in_the_second(make):
    epochs = Epochs()
    parts = ("can be read once only", "a list, a Grain dataset", "while reading the train loader")
    loader = make(tiny.make_batches(3))
    refused(DataError, *parts, loader=loader, callbacks=[epochs], compiled=["train step"])
    assert epochs.ended == [0]


def test_one_shot_loader_is_enough_for_one_epoch_with_validation():
    loader, val_loader = iter(tiny.make_batches(3)), iter(tiny.make_batches(2))
    result, _ = tiny.fit(loader, val_loader, max_epochs=1, num_sanity_val_steps=2)
    assert result.num_steps == 3
    assert len(result.history["val/loss"]) == 1


def test_object_with_iter_and_len_is_a_loader():
    result, _ = tiny.fit(Loader(tiny.make_batches(3), 3), max_epochs=2)
    assert result.num_steps == 6


def failing_batches():
    yield batch()
    yield batch()
    raise OSError("the disk is gone")


def test_error_in_a_loader_names_the_batch_and_ends_in_the_loader():
    notes = ("the disk is gone", "while reading train batch 2 of epoch 0")
    error = refused(OSError, *notes, loader=failing_batches(), compiled=["train step"])
    assert frames_of(error)[-1] == "test_bad_data.py:failing_batches"


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (np.full(ROWS, 3), ("run from 3 to 3", "3 logits; expected 0 to 2")),
        (np.full(ROWS, -1), ("run from -1 to -1", "expected 0 to 2")),
        (np.ones(ROWS, np.float32), ("got float32[8]", "`labels.astype(np.int32)`")),
        (np.ones(ROWS, bool), ("got bool[8]", "`labels.astype(np.int32)`")),
        (np.eye(ROWS, 3, dtype=np.float32), ("got float32[8, 3]", "one-hot", ".argmax(-1)")),
        (np.eye(ROWS, 3, dtype=np.int32), ("got int32[8, 3]", "one-hot", ".argmax(-1)")),
    ],
    ids=["too-large", "negative", "float", "bool", "one-hot-float", "one-hot-int"],
)
def test_accuracy_refuses_labels_of_the_first_batch(labels, parts):
    def training_step(self, model, batch):
        return {"loss": loss_of(model, batch), "logits": model(batch["x"])}

    module, loader = module_with(training_step=training_step), [batch(label=labels)] * 2
    refused(DataError, "Accuracy", *parts, module=module, loader=loader, callbacks=[Accuracy()])


@pytest.mark.parametrize(
    ("stage", "compiled"),
    [("fit", "train step"), ("validate", "validate step"), ("test", "test step")],
)
def test_accuracy_refuses_later_labels_at_the_end_of_the_epoch(stage, compiled):
    later = np.array([0, 1, 2, 0, 1, 2, 7, -1])
    loader = [batch(), batch(label=later)]
    parts = ("2 labels of the", "in epoch 0 are out of range", "3 logits, expected 0 to 2")
    refused(
        DataError, *parts, loader=loader, stage=stage, callbacks=[Accuracy()], compiled=[compiled]
    )


@pytest.mark.parametrize(
    ("callback", "part"),
    [
        (Accuracy(labels="labl"), "in the batch ('label', 'x'); pass `Accuracy(labels='...')`"),
        (Accuracy(labels="labl"), "Did you mean 'label'?"),
        (Accuracy(logits="logit"), "returned 'loss', 'logits'"),
        (Accuracy(logits="logit"), "Did you mean 'logits'?"),
        (Accuracy(top_k=3), "Accuracy(top_k=3) is always right with 3 classes"),
    ],
)
def test_accuracy_refuses_what_is_not_there(callback, part):
    refused(ConfigError, part, callbacks=[callback])


def test_accuracy_refuses_labels_that_are_no_array():
    accuracy = Accuracy(labels=lambda batch: [0])
    refused(DataError, "needs an array of labels, got a list", callbacks=[accuracy])


def test_accuracy_refuses_a_step_that_returns_the_loss_alone():
    module = module_with(training_step=lambda self, model, batch: loss_of(model, batch))
    error = refused(
        ConfigError,
        "return `{'loss': loss, 'logits': logits}`",
        module=module,
        callbacks=[Accuracy()],
    )
    assert_says(error, "training_step returns under 'logits', but it returned 'loss'")
    assert "Did you mean" not in str(error)


@pytest.mark.parametrize("resident", [True, False])
def test_integer_beyond_32_bits_is_refused(resident: bool):
    arrays = {**tiny.make_arrays(16), "id": np.arange(16) + 2**40}
    loader = data.from_arrays(arrays, batch_size=8, device_resident=resident)
    refused(DataError, "leaf id holds 1099511627776", "`jax_enable_x64`", loader=loader)
