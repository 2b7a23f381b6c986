"""The GAN recipe: one step on noise, its pictures, its two optimisers, its distance, its score."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

import mnist_gan
from jaxtrainer import Trainer, data
from jaxtrainer.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger
from jaxtrainer.records import Image, grid
from mnist_data import to_float
from mnist_gan import MnistGAN, frechet_distance, make_noise
from tests.logged import Keeps, read_lines, read_png


@pytest.fixture
def noise_digits(in_tmp_path, monkeypatch):
    """Both splits are the same 64 pictures of noise; files are kept nowhere else."""
    images = np.random.default_rng(0).integers(0, 256, (64, 28, 28), np.uint8)
    monkeypatch.setattr(mnist_gan, "load_mnist", lambda: ({"image": images}, {"image": images}))
    monkeypatch.setattr(mnist_gan, "NUM_SCORED", 1000)
    return images


@pytest.fixture
def loader(noise_digits):
    return data.from_arrays({"image": noise_digits}, batch_size=64, device_transform=to_float)


@pytest.fixture
def make_trainer():
    return partial(Trainer, mesh={"data": 1}, enable_progress_bar=False)


def test_recipe_trains_scores_and_draws_each_epoch(noise_digits, capsys):
    distance = mnist_gan.main(["--epochs", "2", "--batch-size", "64", "--hidden-dim", "8"])
    assert f"Frechet distance to the test digits: {distance:.2f}" in capsys.readouterr().out
    run = Path(mnist_gan.RUN)
    files = [row["file"] for row in read_lines(run / "metrics.jsonl", "image")]
    assert files == ["images/drawings_1.png", "images/drawings_2.png"]
    first, second = (read_png((run / file).read_bytes()) for file in files)
    assert first.shape == (280, 280, 1)
    assert (first != second).any()


def test_loggers_get_what_the_generator_draws(loader, make_trainer):
    keeps = Keeps()
    trainer = make_trainer(max_steps=1, logger=[keeps, CSVLogger("x"), JSONLinesLogger("x")])
    module = MnistGAN(hidden_dim=8)
    trainer.fit(module, loader, make_noise(20, 20, seed=0))
    [drawn_NHW] = trainer.predict(module, make_noise(20, 20, seed=0))
    want = grid(np.asarray(drawn_NHW)[..., None], columns=10)
    [logged] = keeps.of(Image)
    # Rounded to 256 shades, and summed over the rows in between.
    np.testing.assert_allclose(logged.pixels / 255, want, atol=0.6 / 255)
    written = read_png(Path("x/images/drawings_1.png").read_bytes())
    np.testing.assert_array_equal(written, logged.pixels)


@pytest.mark.loggers
@pytest.mark.filterwarnings("default")  # other people's packages warn about each other
def test_tensorboard_gets_what_the_generator_draws(loader, make_trainer):
    from tensorboard.backend.event_processing import (  # pyright: ignore[reportMissingImports]
        event_accumulator,
    )

    keeps = Keeps()
    trainer = make_trainer(max_epochs=2, logger=[keeps, TensorBoardLogger("x")])
    trainer.fit(MnistGAN(hidden_dim=8), loader, make_noise(20, 20, seed=0))
    reader = event_accumulator.EventAccumulator("x", size_guidance={"images": 0})
    reader.Reload()
    for event, record in zip(reader.Images("drawings"), keeps.of(Image), strict=True):
        assert event.step == record.axes.step
        np.testing.assert_array_equal(read_png(event.encoded_image_string), record.pixels)


@pytest.mark.slow
def test_each_optimizer_changes_its_own_network(loader, make_trainer):
    trainer = make_trainer(max_steps=1, log_every_n_steps=1)
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
