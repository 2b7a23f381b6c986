"""What `startup` times in a fresh process: the first step of the MNIST MLP, by both ways."""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

Batch = dict[str, Any]
BATCH_SIZE = 256


class MLP(nnx.Module):
    """The recipe's network, written as users of NNX write it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        sizes = itertools.pairwise([784, 128, 128, 128, 10])
        self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in sizes)

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.layers
        for layer in hidden:
            x = jnp.tanh(layer(x))
        return last(x)


def data() -> dict[str, np.ndarray]:
    """As large as MNIST; what is in it does not matter here."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(60_000, 28, 28), dtype=np.uint8)
    return {"image": images, "label": rng.integers(10, size=60_000, dtype=np.uint8)}


def to_float(batch: Batch) -> Batch:
    return {**batch, "image": batch["image"].reshape(-1, 784).astype(jnp.float32) / 255}


def loss_fn(model: MLP, batch: Batch) -> tuple[jax.Array, jax.Array]:
    logits = model(batch["image"])
    error = logits - jax.nn.one_hot(batch["label"], 10)
    return jnp.mean(jnp.sum(error**2, axis=-1)), logits


def fit(cache: str, *, checkpoint: bool) -> tuple[float, float]:
    """Return the seconds from `fit()` to the end of the first dispatch, and the time then."""
    from rich.console import Console

    from benchmarks.trained import Terminal
    from jaxtrainer import Callback, Trainer, TrainModule
    from jaxtrainer.callbacks import Accuracy, Checkpoint, ProgressBar, Timer
    from jaxtrainer.data import from_arrays

    class Digits(TrainModule):
        def configure_model(self, rngs: nnx.Rngs) -> MLP:
            return MLP(rngs)

        def configure_optimizers(self) -> optax.GradientTransformation:
            return optax.adam(1e-3)

        def training_step(self, model: MLP, batch: Batch) -> dict[str, jax.Array]:
            loss, logits = loss_fn(model, batch)
            return {"loss": loss, "logits": logits}

    class First(Callback):
        ends: tuple[float, float] | None = None

        def on_save_point(self, run: Any) -> None:
            if self.ends is None:
                jax.block_until_ready(run.state)
                self.ends = time.perf_counter(), time.time()
                run.stop("first step done")

    screen = Console(file=Terminal(), force_terminal=True, force_interactive=True, width=100)
    first = First()
    callbacks = [first, ProgressBar(console=screen), Timer(console=screen), Accuracy()]
    options = {"batch_size": BATCH_SIZE, "shuffle": True, "drop_remainder": True}
    loader = from_arrays(data(), device_transform=to_float, **options)
    with tempfile.TemporaryDirectory() as folder:
        callbacks += [Checkpoint(f"{folder}/run")] if checkpoint else []
        trainer = Trainer(max_epochs=1, callbacks=callbacks, compilation_cache=cache or False)
        began = time.perf_counter()
        trainer.fit(Digits(), loader)
    assert first.ends is not None
    return first.ends[0] - began, first.ends[1]


def by_hand(cache: str) -> tuple[float, float]:
    """Return the same for what a user of NNX writes without a trainer."""
    arrays, rng = data(), np.random.default_rng(0)
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    began = time.perf_counter()
    graphdef, params = nnx.split(MLP(nnx.Rngs(0)))
    tx = optax.adam(1e-3)
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        batch = to_float(batch)

        def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
            return loss_fn(nnx.merge(graphdef, params, copy=True), batch)

        (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32))
        return optax.apply_updates(params, updates), opt_state, jnp.stack([loss, accuracy])

    rows = rng.permutation(60_000)[:BATCH_SIZE]
    done = step(params, opt_state, {name: array[rows] for name, array in arrays.items()})
    jax.block_until_ready(done)
    return time.perf_counter() - began, time.time()
