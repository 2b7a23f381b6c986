"""The VAE recipe: one step on noise, what its bound and its schedule are, its score."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mnist_vae
from jaxtrainer import Trainer, data
from mnist_data import to_float
from mnist_vae import VAE, MnistVAE
from tests.logged import read_lines, read_png


@pytest.fixture
def noise_digits(in_tmp_path, monkeypatch):
    """Both splits are the same 64 pictures of noise; files are kept nowhere else."""
    images = np.random.default_rng(0).integers(0, 256, (64, 28, 28), np.uint8)
    monkeypatch.setattr(mnist_vae, "load_mnist", lambda: ({"image": images}, {"image": images}))
    return images


def test_recipe_trains_scores_and_draws(noise_digits, capsys):
    bound = mnist_vae.main(["--epochs", "1", "--batch-size", "64", "--latent-dim", "2"])
    printed = capsys.readouterr().out
    assert f"test bound: {bound:.2f} nats" in printed
    assert f"samples after each epoch: {mnist_vae.RUN}/images\n" in printed
    [row] = read_lines(Path(mnist_vae.RUN) / "metrics.jsonl", "image")
    assert row["name"] == "samples"
    assert read_png((Path(mnist_vae.RUN) / row["file"]).read_bytes()).shape == (280, 280, 1)


def test_code_is_drawn_anew_in_each_call():
    model = VAE(8, 2, nnx.Rngs(0))
    x_BP = jnp.ones((4, 784))
    (first, *moments), (second, *same) = model(x_BP), model(x_BP)
    np.testing.assert_array_equal(moments, same)
    assert (first != second).any()


@pytest.mark.slow
def test_weight_of_the_divergence_rises_to_one_in_a_fifth_of_the_steps(noise_digits):
    loader = data.from_arrays({"image": noise_digits}, batch_size=8, device_transform=to_float)
    trainer = Trainer(max_steps=10, log_every_n_steps=1, enable_progress_bar=False)
    history = trainer.fit(MnistVAE(8, 2), loader).history
    assert history.step["train/kl_weight"].values == [0.0, 0.5, *8 * [1.0]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_recipe_reaches_its_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mnist_vae.main([]) <= 105.5
