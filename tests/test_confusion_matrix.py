"""`ConfusionMatrix`: exact counts over ragged batches, devices, fused steps and a resume."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrainer.callbacks import Accuracy, Checkpoint, ConfusionMatrix, EarlyStopping
from jaxtrainer.callbacks.confusion_matrix import class_scores, macro_scores
from jaxtrainer.errors import ConfigError, DataError
from tests import tiny
from tests.bad_input import refused

pytestmark = pytest.mark.usefixtures("compiled_once")


class Given(tiny.Tiny):
    """Predicts the class that the batch has in its first feature, and learns nothing."""

    def __init__(self) -> None:
        super().__init__(tiny.line, optax.sgd(0.0))

    def training_step(self, model: Any, batch: Any) -> Any:
        outputs = super().training_step(model, batch)
        predicted = batch["x"][:, 0].astype(jnp.int32)
        return {**outputs, "logits": jax.nn.one_hot(predicted, tiny.CLASSES)}


def pairs(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions, of classes of uneven size."""
    rng = np.random.default_rng(seed)
    return tuple(rng.choice(3, size=(2, rows), p=[0.6, 0.3, 0.1]))


def batches(labels: np.ndarray, predicted: np.ndarray, size: int = 8) -> list[dict[str, Any]]:
    x = np.zeros((len(labels), tiny.FEATURES), np.float32)
    x[:, 0] = predicted
    data = {"x": x, "label": labels.astype(np.int32)}
    return [{k: a[i : i + size] for k, a in data.items()} for i in range(0, len(labels), size)]


def counted(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The same counts, one by one."""
    counts = np.zeros((3, 3), int)
    for label, prediction in zip(labels, predicted, strict=True):
        counts[label, prediction] += 1
    return counts


@pytest.mark.parametrize("devices", [1, 4])
def test_counts_of_ragged_batches_are_exact(devices: int):
    confusion, data = ConfusionMatrix(3), pairs(27)
    options: dict[str, Any] = {"mesh": {"data": devices}}
    tiny.make_trainer([confusion], **options).test(Given(), batches(*data), verbose=False)
    np.testing.assert_array_equal(confusion.matrix["test"], counted(*data))
    assert confusion.matrix["test"].dtype == np.int64


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_each_stage_has_the_counts_of_its_epoch(steps: int):
    confusion, train, val = ConfusionMatrix(3), pairs(32), pairs(21, seed=1)
    options: dict[str, Any] = {"steps_per_dispatch": steps, "max_epochs": 2}
    tiny.make_trainer([confusion], **options).fit(Given(), batches(*train), batches(*val))
    assert confusion.matrix.keys() == {"train", "val"}
    np.testing.assert_array_equal(confusion.matrix["train"], counted(*train))
    np.testing.assert_array_equal(confusion.matrix["val"], counted(*val))


def test_scores_are_logged_in_every_stage():
    confusion, data = ConfusionMatrix(3), pairs(32)
    trainer = tiny.make_trainer([confusion], max_epochs=2)
    result = trainer.fit(Given(), batches(*data), batches(*data))
    scores = macro_scores(counted(*data))
    for name, value in scores.items():
        assert result.history.epoch[f"train/{name}"].values == [value, value]
        assert result.history.epoch[f"val/{name}"].epochs == [0, 1]
    assert not [name for name in result.metrics if "confusion" in name]


def test_test_returns_the_scores():
    confusion, data = ConfusionMatrix(3), pairs(16)
    metrics = tiny.make_trainer([confusion]).test(Given(), batches(*data), verbose=False)
    assert metrics["test/f1"] == macro_scores(counted(*data))["f1"]


def test_diagonal_is_the_accuracy():
    confusion, data = ConfusionMatrix(3), pairs(29)
    trainer = tiny.make_trainer([confusion, Accuracy()])
    metrics = trainer.test(Given(), batches(*data), verbose=False)
    share = np.trace(confusion.matrix["test"]) / 29
    # The mean is of float32 batch means: 2 ulp.
    assert metrics["test/accuracy"] == pytest.approx(share, rel=2.4e-7)


def test_several_loaders_have_matrices_of_their_own():
    confusion, clean, noisy = ConfusionMatrix(3), pairs(9), pairs(17, seed=1)
    loaders = {"clean": batches(*clean), "noisy": batches(*noisy)}
    metrics = tiny.make_trainer([confusion]).validate(Given(), loaders, verbose=False)
    np.testing.assert_array_equal(confusion.matrix["val/clean"], counted(*clean))
    np.testing.assert_array_equal(confusion.matrix["val/noisy"], counted(*noisy))
    assert metrics["val/noisy/recall"] == macro_scores(counted(*noisy))["recall"]


def test_two_matrices_have_names():
    callbacks = [ConfusionMatrix(3), ConfusionMatrix(3, name="again")]
    metrics = tiny.make_trainer(callbacks).test(Given(), batches(*pairs(8)), verbose=False)
    assert metrics["test/f1"] == metrics["test/again_f1"]


def test_counts_survive_a_resume_in_the_middle_of_an_epoch(tmp_path: Any):
    data, confusion = pairs(32), ConfusionMatrix(3)
    saver = Checkpoint(tmp_path / "run", every_n_train_steps=3)
    trainer = tiny.make_trainer([ConfusionMatrix(3), saver], max_steps=3)
    trainer.fit(Given(), batches(*data))
    again = tiny.make_trainer([confusion], max_epochs=1)
    again.fit(Given(), batches(*data), ckpt_path=tmp_path / "run")
    np.testing.assert_array_equal(confusion.matrix["train"], counted(*data))


def test_counting_does_not_change_the_training():
    _, without = tiny.fit(max_epochs=1)
    _, counting = tiny.fit(max_epochs=1, callbacks=[ConfusionMatrix(3)])
    names = [name for name in without if "totals" not in name]
    tiny.assert_same_bits({n: counting[n] for n in names}, {n: without[n] for n in names})


def test_sanity_check_leaves_no_matrix():
    confusion, data = ConfusionMatrix(3), pairs(16)
    seen = []
    confusion.on_train_start = lambda run: seen.append(dict(confusion.matrix))
    trainer = tiny.make_trainer([confusion], max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(Given(), batches(*data), batches(*data))
    assert seen == [{}]


def test_score_can_be_monitored():
    stopping = EarlyStopping("val/f1", mode="max", patience=1)
    trainer = tiny.make_trainer([ConfusionMatrix(3), stopping], max_epochs=5)
    result = trainer.fit(Given(), batches(*pairs(16)), batches(*pairs(8)))
    assert result.stop_reason.startswith("early_stopping: val/f1 did not improve")
    assert result.num_epochs == 2


def test_scores_of_a_class():
    matrix = np.array([[2, 1, 0], [0, 3, 0], [2, 2, 0]])
    scores = class_scores(matrix)
    np.testing.assert_allclose(scores["precision"], [2 / 4, 3 / 6, 0.0])
    np.testing.assert_allclose(scores["recall"], [2 / 3, 1.0, 0.0])
    np.testing.assert_allclose(scores["f1"], [4 / 7, 6 / 9, 0.0])


def test_macro_scores_leave_out_a_class_that_does_not_occur():
    matrix = np.array([[4, 0, 0], [2, 2, 0], [0, 0, 0]])
    assert macro_scores(matrix)["recall"] == pytest.approx(0.75)
    assert macro_scores(matrix)["precision"] == pytest.approx((4 / 6 + 1) / 2)


def test_other_number_of_classes_is_refused_before_compilation():
    refused(
        ConfigError,
        "ConfusionMatrix(10) got logits of 3 classes; write `ConfusionMatrix(3)`",
        module=tiny.Tiny(),
        callbacks=[ConfusionMatrix(10)],
    )


def test_label_out_of_range_in_a_later_batch_is_found():
    labels, predicted = pairs(24)
    labels[20] = 3
    with pytest.raises(DataError, match="ConfusionMatrix: 1 labels of the test batches"):
        tiny.make_trainer([ConfusionMatrix(3)]).test(Given(), batches(labels, predicted))


def test_missing_logits_are_named():
    callback = ConfusionMatrix(3, logits="scores")
    refused(ConfigError, "ConfusionMatrix needs the logits", "'scores'", callbacks=[callback])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((1,), {}), (("ten",), {}), ((3,), {"name": "a/b"})],
)
def test_option_that_cannot_work_is_refused(arguments: Any, options: Any):
    with pytest.raises(ConfigError, match=r"num_classes|name="):
        ConfusionMatrix(*arguments, **options)
