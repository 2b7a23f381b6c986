"""The fine-tuning recipe: what is loaded, what is frozen and for how long, and its score."""

import numpy as np
import pytest

import finetune
from finetune import Digits, loader, pretrain
from jaxtrainer import load_params
from mnist_data import to_float_maps
from tests import tiny


@pytest.fixture
def shrunk(noise_digits, in_tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "NUM_EPOCHS", 2)
    monkeypatch.setattr(finetune, "FROZEN_EPOCHS", 1)
    return noise_digits


def test_recipe_trains_both_ways(shrunk, in_tmp_path, capsys):
    finetuned, from_scratch = finetune.main([])
    printed = capsys.readouterr().out
    assert "6 arrays loaded" in printed
    assert f"from scratch: {from_scratch:.4f}\nfine-tuned:   {finetuned:.4f}\n" in printed


@pytest.mark.slow
def test_head_is_fresh_and_the_rest_is_loaded(shrunk):
    pretrain(shrunk, "pretrained", seed=0)
    module, untrained = Digits(10), Digits(10)
    report = load_params(module, "pretrained", exclude="head", verbose=False)
    assert report.fresh == ("head/bias", "head/kernel")
    load_params(untrained, "pretrained", include=[], seed=0, verbose=False)
    got, fresh = tiny.params_of(module), tiny.params_of(untrained)
    is_fresh = {name: np.array_equal(got[name], fresh[name]) for name in got}
    assert [name for name in got if is_fresh[name]] == ["head/bias", "head/kernel"]


def test_loader_takes_the_first_pictures_of_each_digit(noise_digits):
    [batch] = loader(noise_digits, range(5, 10), of_each=3, batch_size=15)
    assert batch["label"].tolist() == [digit for digit in range(5, 10) for _ in range(3)]
    np.testing.assert_array_equal(batch["image"][:3], noise_digits["image"][5:26:10])
    assert np.shape(to_float_maps(batch)["image"]) == (15, 28, 28, 1)


@pytest.mark.slow
def test_recipe_reaches_its_score(in_tmp_path):
    finetuned, from_scratch = finetune.main([])
    assert finetuned >= 0.87
    assert finetuned > from_scratch + 0.05
