"""The GAN recipe: one step on noise, its two optimisers, its distance, its score."""

import numpy as np
import pytest

import mnist_gan
from jaxtrainer import Trainer, data
from mnist_gan import MnistGAN, frechet_distance


@pytest.fixture
def noise_digits(in_tmp_path, monkeypatch):
    """Both splits are the same 64 pictures of noise; files are kept nowhere else."""
    images = np.random.default_rng(0).integers(0, 256, (64, 28, 28), np.uint8)
    monkeypatch.setattr(mnist_gan, "load_mnist", lambda: ({"image": images}, {"image": images}))
    monkeypatch.setattr(mnist_gan, "NUM_SCORED", 1000)
    return images


def test_recipe_trains_scores_and_draws_each_epoch(noise_digits, capsys):
    distance = mnist_gan.main(["--epochs", "2", "--batch-size", "64", "--hidden-dim", "8"])
    assert f"Frechet distance to the test digits: {distance:.2f}" in capsys.readouterr().out
    names = [path.name for path in sorted(mnist_gan.PICTURES.iterdir())]
    assert names == ["epoch_01.png", "epoch_02.png"]


@pytest.mark.slow
def test_each_optimizer_changes_its_own_network(noise_digits):
    loader = data.from_arrays(
        {"image": noise_digits}, batch_size=64, device_transform=mnist_gan.to_float
    )
    trainer = Trainer(max_steps=1, enable_progress_bar=False, log_every_n_steps=1)
    history = trainer.fit(MnistGAN(hidden_dim=8), loader).history
    # What a critic thinks that has learnt nothing: one half, of each of two batches.
    assert history.step["train/critic_loss"].values[0] == pytest.approx(2 * np.log(2), rel=0.2)
    assert history.step["train/generator_loss"].values[0] == pytest.approx(np.log(2), rel=0.2)


def test_distance_is_that_of_two_normal_distributions():
    rng = np.random.default_rng(0)
    a_NP = rng.normal(size=(50_000, 3))
    b_NP = 1.0 + 2.0 * rng.normal(size=(50_000, 3))
    # In each of 3 dimensions (1 - 0)^2 + (2 - 1)^2, up to what 50,000 samples tell of moments.
    assert frechet_distance(a_NP, b_NP) == pytest.approx(6.0, rel=0.02)
    assert frechet_distance(a_NP, a_NP) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_recipe_reaches_its_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mnist_gan.main([]) <= 20
