"""The MNIST recipe, shrunk to one step an epoch: trains, goes on, reads digits; and its score."""

import json
import re
import sys

import numpy as np
import pytest

import mnist_image
import mnist_mlp
from mnist_image import ImageError, drawing, read_digit

SHRUNK = ["--epochs", "1", "--batch-size", "64", "--hidden-dim", "8"]


pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def noise_digits(monkeypatch):
    """Both splits are the same 64 pictures of noise."""
    rng = np.random.default_rng(0)
    split = {
        "image": rng.integers(0, 256, (64, 28, 28), np.uint8),
        "label": rng.integers(0, 10, 64, np.uint8),
    }
    for module in (mnist_mlp, mnist_image):
        monkeypatch.setattr(module, "load_mnist", lambda: (split, split))
    return split


def saved_steps(tmp_path):
    runs = (tmp_path / mnist_mlp.RUNS).iterdir()
    return [sorted(path.name for path in run.glob("step_*")) for run in runs]


def test_recipe_trains_and_prints_times_and_score(noise_digits, tmp_path, capsys):
    accuracy = mnist_mlp.main(SHRUNK)
    printed = capsys.readouterr().out
    assert f"test accuracy: {accuracy:.4f}" in printed
    assert "compile + epoch 1: " in printed
    assert saved_steps(tmp_path) == [["step_1"]]


def test_recipe_resumes_newest_run_with_its_options(noise_digits, tmp_path):
    mnist_mlp.main(SHRUNK)
    mnist_mlp.main(["--resume", "--epochs", "3"])
    assert saved_steps(tmp_path) == [["step_3"]]
    [path] = (tmp_path / mnist_mlp.RUNS).glob("*/options.json")
    assert json.loads(path.read_text())["hidden_dim"] == 8


def test_recipe_predicts_with_newest_run(noise_digits, capsys):
    mnist_mlp.main(SHRUNK)
    capsys.readouterr()
    digit = mnist_mlp.main(["--predict", "3"])
    *picture, name, odds = capsys.readouterr().out.splitlines()
    assert "\n".join(picture) == drawing(noise_digits["image"][3])
    assert name == f"test digit 3, labelled {noise_digits['label'][3]}: read as {digit}"
    assert re.fullmatch(rf"{digit}: [\d.]+%  \d: [\d.]+%  \d: [\d.]+%", odds)


def test_recipe_refuses_used_run_directory(noise_digits, capsys):
    mnist_mlp.main([*SHRUNK, "--run-dir", "mine"])
    with pytest.raises(SystemExit, match="2"):
        mnist_mlp.main([*SHRUNK, "--run-dir", "mine"])
    assert "mine has a run; add --resume to go on from it" in capsys.readouterr().err


def test_failed_resume_leaves_options_of_run(noise_digits, tmp_path):
    mnist_mlp.main([*SHRUNK, "--run-dir", "mine"])
    before = (tmp_path / "mine" / "options.json").read_text()
    with pytest.raises(ValueError, match="batch_size"):
        mnist_mlp.main(["--run-dir", "mine", "--resume", "--batch-size", "32"])
    assert (tmp_path / "mine" / "options.json").read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "there is no run in runs/mnist_mlp yet"),
        (["--predict", "7"], "there is no run in runs/mnist_mlp yet"),
        (["--epochs", "0"], "argument --epochs: expected at least 1, got 0"),
        (["--hiden-dim", "8"], "unrecognized arguments: --hiden-dim 8"),
    ],
)
def test_recipe_refuses_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        mnist_mlp.main(options)
    assert message in capsys.readouterr().err


def test_probabilities_of_a_row_sum_to_one():
    module = mnist_mlp.MnistMLP()
    y_BC = np.array([[-0.1, 0.9, 0.3], [0.2, 0.2, 1.4]], np.float32)
    p_BC = module.predict_step(lambda y: y, {"image": y_BC})
    np.testing.assert_allclose(p_BC, [[0, 0.75, 0.25], [1 / 7, 1 / 7, 5 / 7]], atol=1e-5)


def test_drawing_has_a_line_for_two_rows_of_pixels():
    image = np.zeros((28, 28), np.uint8)
    image[0, :3] = 255
    image[1, 1:4] = 255, 60, 60
    assert drawing(image) == ":#*" + 13 * "\n"


def test_read_digit_names_its_range(noise_digits):
    with pytest.raises(ImageError, match="received test digit 64, expected an index from 0 to 63"):
        read_digit("64")


def test_read_digit_names_the_package_for_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImageError, match=r"digit.png needs Pillow; .*pip install pillow"):
        read_digit("digit.png")


@pytest.mark.slow
def test_recipe_reaches_its_score():
    assert mnist_mlp.main([]) >= 0.96
