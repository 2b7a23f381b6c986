"""The recipe of other kinds of models: both train, draw keys, and evaluate; and their scores."""

import jax
import numpy as np
import pytest

import linen_and_equinox
from jaxtrainer import Trainer, data
from linen_and_equinox import EquinoxDigits, LinenDigits
from mnist_data import to_float

MODULES = [LinenDigits, EquinoxDigits]


def train(module, split, steps=2):
    loader = data.from_arrays(split, batch_size=64, device_transform=to_float)
    trainer = Trainer(max_steps=steps, mesh={"data": 1}, enable_progress_bar=False)
    trainer.fit(module, loader)
    return to_float(split)["image"]


def test_recipe_trains_both(noise_digits, in_tmp_path, capsys):
    accuracies = linen_and_equinox.main(["--epochs", "1"])
    printed = capsys.readouterr().out
    for name in ("Linen", "Equinox"):
        assert f"{name}: test accuracy {accuracies[name]:.4f}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("make", MODULES)
def test_model_evaluates_without_dropout(noise_digits, in_tmp_path, make):
    module = make()
    x_BP = train(module, noise_digits)
    logits_BC = module.logits(module.model, x_BP, training=False)
    assert np.shape(logits_BC) == (256, 10)
    again_BC = module.logits(module.model, x_BP[:1], training=False)
    # A batch of another size is another order of summation, in float32.
    np.testing.assert_allclose(again_BC, logits_BC[:1], rtol=1e-4, atol=1e-5)


def test_statistics_of_linen_are_kept(noise_digits, in_tmp_path):
    module = LinenDigits()
    train(module, noise_digits)
    assert sorted(module.model) == ["batch_stats", "params"]
    mean = module.model["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.mean(np.asarray(mean) > 0) > 0.5


@pytest.mark.slow
def test_equinox_model_comes_back_as_a_module(noise_digits, in_tmp_path):
    module = EquinoxDigits()
    train(module, noise_digits)
    assert isinstance(module.model, linen_and_equinox.EquinoxMLP)
    assert module.model.dropout.inference
    assert len(jax.tree.leaves(module.model.hidden)) == 2


@pytest.mark.slow
def test_recipe_reaches_its_scores(in_tmp_path):
    assert min(linen_and_equinox.main([]).values()) >= 0.97
