"""The CNN recipe: one step on noise, its augmentation, its optimiser and its score."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mnist_cnn
from mnist_cnn import MnistCNN, augment, move


@pytest.fixture
def noise_digits(monkeypatch):
    """Both splits are the same 48 pictures of noise; 16 of them are for validation."""
    rng = np.random.default_rng(0)
    split = {
        "image": rng.integers(0, 256, (48, 28, 28), np.uint8),
        "label": rng.integers(0, 10, 48, np.uint8),
    }
    monkeypatch.setattr(mnist_cnn, "load_mnist", lambda: (split, split))
    monkeypatch.setattr(mnist_cnn, "NUM_VALIDATION", 16)
    monkeypatch.setattr(mnist_cnn, "MnistCNN", partial(MnistCNN, channels=(2, 2, 2)))


def test_recipe_trains_prints_its_score_and_draws_its_curves(noise_digits, in_tmp_path, capsys):
    accuracy = mnist_cnn.main(["--epochs", "1", "--batch-size", "16", "--plot", "curves.svg"])
    assert "val/accuracy" in (in_tmp_path / "curves.svg").read_text()
    printed = capsys.readouterr().out
    assert "stopped by max_epochs after 1 epochs" in printed
    assert f"test accuracy: {accuracy:.4f}" in printed


def test_an_image_that_is_not_moved_is_the_same():
    image_HW = np.random.default_rng(0).random((28, 28), np.float32)
    moved_HW = move(image_HW, jnp.float32(0), jnp.zeros(2))
    # Interpolation weights are differences of coordinates up to 28, in float32.
    np.testing.assert_allclose(moved_HW, image_HW, atol=1e-5)


def test_a_whole_pixel_moves_the_image_and_a_quarter_turns_it():
    image_HW = np.random.default_rng(0).random((28, 28), np.float32)
    moved_HW = move(image_HW, jnp.float32(0), jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(moved_HW[:-1, 2:], image_HW[1:, :-2], atol=1e-5)
    turned_HW = move(image_HW, jnp.float32(jnp.pi / 2), jnp.zeros(2))
    np.testing.assert_allclose(turned_HW[1:-1, 1:-1], np.rot90(image_HW, -1)[1:-1, 1:-1], atol=1e-4)


def test_each_image_is_augmented_in_a_way_of_its_own():
    image_BHWC = jnp.ones((2, 28, 28, 1)).at[:, 4:24, 4:24].set(0.5)
    first, second = augment(jax.random.key(0), image_BHWC)
    assert first.shape == (28, 28, 1)
    assert not np.allclose(first, second)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_recipe_reaches_its_score():
    assert mnist_cnn.main([]) >= 0.993
