"""What is trained: parameters, loss and data, written once for the trainer and for the references.

Shapes: B batch, P pixels, C classes, S sequence, D model, H heads, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recipes.mnist_data import load_mnist

Params = dict[str, jax.Array]
Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its optimiser and its data.

    Attributes:
        init: Makes the parameters from a key.
        loss: `(params, batch) -> (loss, logits)`; the logits are None where there are no labels.
        prepare: Runs inside the step, on what travels to the device.
        max_batches: Batches of an epoch at most.
        bf16: Compute in bfloat16, with parameters in float32.
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch], tuple[jax.Array, jax.Array | None]]
    tx: optax.GradientTransformation
    arrays: dict[str, np.ndarray]
    batch_size: int
    prepare: Callable[[Batch], Batch] = lambda batch: batch
    max_batches: int | None = None
    bf16: bool = False

    @property
    def num_samples(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def num_batches(self) -> int:
        whole = self.num_samples // self.batch_size
        return min(whole, self.max_batches or whole)

    @property
    def has_labels(self) -> bool:
        return "label" in self.arrays


def linear(batch_size: int = 32, num_batches: int = 10_000) -> Workload:
    """10x10 weights: next to no maths, so that what is left is overhead."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size * num_batches, 10), np.float32)
    y = x @ rng.standard_normal((10, 10), np.float32)
    y += rng.standard_normal(y.shape, np.float32)

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, None]:
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), None

    return Workload(
        init=lambda key: {"w": jnp.zeros((10, 10))},
        loss=loss,
        tx=optax.sgd(0.1),
        arrays={"x": x, "y": y},
        batch_size=batch_size,
    )


def mnist_mlp(batch_size: int = 256, max_batches: int | None = None) -> Workload:
    """784-128-128-128-10 with tanh, squared error to one-hot targets, Adam: the recipe's."""
    sizes, lecun = [784, 128, 128, 128, 10], jax.nn.initializers.lecun_normal()

    def init(key: jax.Array) -> Params:
        params: Params = {}
        for i, shape in enumerate(itertools.pairwise(sizes)):
            params[f"w{i}"] = lecun(jax.random.fold_in(key, i), shape)
            params[f"b{i}"] = jnp.zeros(shape[1:])
        return params

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        x = batch["image"]
        for i in range(4):
            x = x @ params[f"w{i}"] + params[f"b{i}"]
            x = jnp.tanh(x) if i < 3 else x
        error = x - jax.nn.one_hot(batch["label"], 10)
        return jnp.mean(jnp.sum(error**2, axis=-1)), x

    return _mnist(init, loss, batch_size, max_batches, (784,))


def mnist_cnn(batch_size: int = 64, max_batches: int | None = 50) -> Workload:
    """Two 3x3 convolutions of 16 and 32 channels, each with max pooling by 2, and a dense layer."""

    def init(key: jax.Array) -> Params:
        he = jax.nn.initializers.he_normal()
        shapes = {"conv0": (3, 3, 1, 16), "conv1": (3, 3, 16, 32), "dense": (7 * 7 * 32, 10)}
        keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
        weights = {name: he(keys[name], shape) for name, shape in shapes.items()}
        return weights | {f"{name}_b": jnp.zeros(shape[-1:]) for name, shape in shapes.items()}

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        x = batch["image"]
        for name in ("conv0", "conv1"):
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, params[name], (1, 1), "SAME", dimension_numbers=layout
            )
            x = jax.nn.relu(x + params[f"{name}_b"])
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        logits = x.reshape(len(x), -1) @ params["dense"] + params["dense_b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"].astype(np.int32)
        )
        return jnp.mean(losses), logits

    return _mnist(init, loss, batch_size, max_batches, (28, 28, 1))


def _mnist(
    init: Any, loss: Any, batch_size: int, max_batches: int | None, shape: tuple[int, ...]
) -> Workload:
    def prepare(batch: Batch) -> Batch:
        image = batch["image"].reshape(-1, *shape).astype(jnp.float32) / 255
        return {**batch, "image": image}

    return Workload(
        init=init,
        loss=loss,
        tx=optax.adam(1e-3),
        arrays=load_mnist()[0],
        batch_size=batch_size,
        prepare=prepare,
        max_batches=max_batches,
    )
