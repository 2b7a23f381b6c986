"""The recipe with a loop of its own: what it drops and keeps, and its score."""

import jax
import numpy as np
import pytest

import custom_loop
from custom_loop import Tuned, with_rate
from jaxtrainer import build_step
from mnist_mlp import make_loaders


def test_recipe_halves_its_runs_each_epoch(noise_digits, in_tmp_path, capsys):
    accuracy = custom_loop.main([])
    *rounds, score = capsys.readouterr().out.splitlines()
    assert [line.count("e-0") for line in rounds] == [8, 4, 2, 1]
    assert score == f"test accuracy: {accuracy:.4f}"


def test_rate_is_that_of_the_state(noise_digits, in_tmp_path):
    step, feed = build_step(Tuned(), make_loaders(256, 0)[0])
    with feed:
        batches = next(iter(feed))
        before = jax.tree.map(np.array, step.init().params)
        still, _ = step(with_rate(step.init(), 0.0), batches)
        moved, _ = step(with_rate(step.init(), 1e-2), batches)
    kernels = [tree["layers"]["0"]["kernel"] for tree in (before, still.params, moved.params)]
    np.testing.assert_array_equal(kernels[1], kernels[0])
    # Adam's first step is the rate, up to its epsilon; pixels without a gradient stay.
    assert np.max(np.abs(kernels[2] - kernels[0])) == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.slow
def test_recipe_reaches_its_score(in_tmp_path):
    assert custom_loop.main([]) >= 0.95
