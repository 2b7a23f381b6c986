"""Narrow precisions reach the scores of float32: MNIST, and a small transformer on text.

Tolerances: of 10,000 digits a network of 96 % misses 400, give or take 20, so that accuracies of
two runs differ by 0.3 % by chance (one standard deviation); twice that is allowed. The
transformer's loss is a mean over 16 thousand bytes; runs of other seeds differ by 1 %, and 2 % are
allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest

import char_lm
import mnist_mlp
from jaxtrainer import Trainer
from jaxtrainer.callbacks import Accuracy
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NARROW = ["bf16-mixed", "16-mixed"]


@pytest.fixture(autouse=True, scope="module")
def mixed_dtypes() -> Iterator[None]:
    """One-hot targets and norms are float32, and mixed with others, as in a user's program."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def accuracy_in(precision: str) -> float:
    train_loader, test_loader = mnist_mlp.make_loaders(256, 0)
    options: Any = {"precision": precision, "steps_per_dispatch": 16}
    trainer = tiny.make_trainer([Accuracy()], max_epochs=3, **options)
    module = mnist_mlp.MnistMLP()
    trainer.fit(module, train_loader)
    return trainer.test(module, test_loader, verbose=False)["test/accuracy"]


@pytest.fixture(scope="module")
def accuracy_in_float32() -> float:
    return accuracy_in("32-true")


@pytest.mark.parametrize("precision", NARROW)
def test_accuracy_on_mnist_is_that_of_float32(precision: str, accuracy_in_float32: float):
    accuracy = accuracy_in(precision)
    print(f"MNIST, 3 epochs: 32-true {accuracy_in_float32:.4f}, {precision} {accuracy:.4f}")
    assert accuracy_in_float32 > 0.95
    assert accuracy == pytest.approx(accuracy_in_float32, abs=0.005)


@pytest.fixture
def small_text(in_tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    sizes = {"DEPTH": 2, "FEATURES": 64, "HEADS": 2, "WINDOW": 64, "BATCH": 16}
    for name, size in sizes.items():
        monkeypatch.setattr(char_lm, name, size)
    return char_lm.standard_library()


def loss_in(text: Any, precision: str) -> float:
    train_loader, val_loader = char_lm.make_loaders(text, 0)
    trainer = Trainer(
        max_steps=200,
        gradient_clip_val=1.0,
        precision=precision,
        enable_progress_bar=False,
        compilation_cache=False,
    )
    return trainer.fit(char_lm.CharLM(), train_loader, val_loader).metrics["val/loss"]


def test_loss_of_a_transformer_is_that_of_float32(small_text: Any):
    # Not float16: the attention of JAX asks for float32 sums, which XLA's CPU backend refuses.
    losses = {precision: loss_in(small_text, precision) for precision in ("32-true", "bf16-mixed")}
    print(f"transformer, 200 steps: {losses}")
    # Of bytes at random it is 5.5; 200 steps learn which letters follow which.
    assert losses["32-true"] < 3.0
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.02)
