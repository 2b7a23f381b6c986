"""The predictive coding recipe: its learning rule against backpropagation's, and its score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mnist_pc
from mnist_mlp import MLP, NUM_CLASSES, NUM_PIXELS
from mnist_pc import energy, forward, infer


@pytest.fixture
def model():
    return MLP(16, nnx.Rngs(0))


@pytest.fixture
def batch():
    """Images [8, pixels], and one-hot targets [8, classes]."""
    x_BP = jax.random.uniform(jax.random.key(1), (8, NUM_PIXELS))
    return x_BP, jax.nn.one_hot(jnp.arange(8), NUM_CLASSES)


def gradients_of_rule(model, batch, steps):
    x_BP, target_BC = batch
    *nodes, _ = forward(model, x_BP)
    nodes = infer(model, [*nodes, target_BC], steps, 0.01)
    return nnx.grad(lambda model: energy(model, nodes))(model)["layers"]


def test_without_inference_the_output_layer_learns_as_by_backpropagation(model, batch):
    x_BP, target_BC = batch
    coding = gradients_of_rule(model, batch, 0)
    half_error = lambda model: 0.5 * jnp.sum((model(x_BP) - target_BC) ** 2)  # noqa: E731
    backprop = nnx.grad(half_error)(model)["layers"]
    for name in ("kernel", "bias"):
        got, want = (layers[3][name][...] for layers in (coding, backprop))
        # Sums of 8 products in float32, in two orders.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_without_inference_hidden_layers_learn_nothing(model, batch):
    coding = gradients_of_rule(model, batch, 0)
    for depth in range(3):
        np.testing.assert_array_equal(coding[depth]["kernel"][...], 0.0)


def test_each_step_of_inference_reaches_one_layer_further_down(model, batch):
    for steps in range(1, 4):
        coding = gradients_of_rule(model, batch, steps)
        is_moved = [bool(np.any(coding[depth]["kernel"][...])) for depth in range(4)]
        assert is_moved == [depth >= 3 - steps for depth in range(4)]


def test_inference_lowers_the_energy_and_leaves_the_clamped_nodes(model, batch):
    x_BP, target_BC = batch
    *nodes, y_BC = forward(model, x_BP)
    np.testing.assert_allclose(y_BC, model(x_BP), rtol=1e-6)
    energies = []
    for steps in range(5):
        image, *_, target = settled = infer(model, [*nodes, target_BC], steps, 0.01)
        energies.append(float(energy(model, settled)))
        assert image is x_BP
        assert target is target_BC
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < energies[0]


def test_recipe_trains_and_compares(noise_digits, in_tmp_path, capsys):
    accuracy = mnist_pc.main(["--epochs", "1", "--batch-size", "64", "--compare"])
    printed = capsys.readouterr().out
    assert f"test accuracy: {accuracy:.4f}" in printed
    *_, heading, backprop, coding, ratio = printed.splitlines()
    assert heading.split() == ["test", "accuracy", "s", "an", "epoch"]
    assert backprop.startswith("backpropagation ")
    assert coding.split()[:3] == ["predictive", "coding", f"{accuracy:.4f}"]
    assert ratio.startswith("ratio ")


@pytest.mark.slow
def test_recipe_reaches_its_score(in_tmp_path):
    assert mnist_pc.main([]) >= 0.95
