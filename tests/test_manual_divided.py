"""By law: a step that makes its own updates, by two optimisers, trains on a mesh as on one device.

Reductions are in another order, see `divided.assert_close`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtrainer import Callback, Optimizer, Run, TrainModule
from tests import divided

pytestmark = pytest.mark.usefixtures("compiled_once")

NOISE, HIDDEN = 32, 128


class GAN(TrainModule):
    """A Wasserstein GAN with clipped weights; each kernel but one is large enough to be divided."""

    automatic_optimization = False

    def configure_model(self, rngs: nnx.Rngs) -> Any:
        generator = nnx.Sequential(
            nnx.Linear(NOISE, HIDDEN, rngs=rngs),
            nnx.BatchNorm(HIDDEN, rngs=rngs),
            jnp.tanh,
            nnx.Linear(HIDDEN, divided.WIDTH, rngs=rngs),
        )
        critic = nnx.Sequential(
            nnx.Linear(divided.WIDTH, HIDDEN, rngs=rngs), jnp.tanh, nnx.Linear(HIDDEN, 1, rngs=rngs)
        )
        return nnx.Dict(generator=generator, critic=critic, rngs=rngs)

    def configure_optimizers(self) -> Any:
        return {
            "generator": Optimizer(optax.sgd(0.05, momentum=0.9), wrt="generator"),
            "critic": Optimizer(optax.sgd(0.05, momentum=0.9), wrt="critic"),
        }

    def training_step(self, model: Any, batch: Any) -> None:
        def fake(model: Any) -> Any:
            return model.generator(model.rngs.normal((len(batch["x"]), NOISE)))

        def critic_loss(model: Any) -> Any:
            return (model.critic(fake(model)) - model.critic(batch["x"])).mean()

        loss, model = self.minimize(critic_loss, model, "critic")
        self.log("critic_loss", loss)
        kernel = model.critic.layers[0].kernel
        kernel[...] = jnp.clip(kernel[...], -0.2, 0.2)
        loss, model = self.minimize(lambda m: -m.critic(fake(m)).mean(), model, "generator")
        self.log("generator_loss", loss)


class Look(Callback):
    """Keeps how the arrays of the last state are divided, by their paths."""

    def on_train_end(self, run: Run) -> None:
        flat, _ = jax.tree_util.tree_flatten_with_path(run.state)
        self.specs = {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in flat}


def train(mesh: str, **options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    return divided.train("gan", mesh, module=GAN(), **options)


@pytest.fixture(scope="module")
def alone() -> Any:
    return train("one")


@pytest.mark.parametrize("mesh", ["data", "fsdp", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_gan_on_a_mesh_trains_as_on_one_device(mesh: str, alone: Any):
    look = Look()
    result, state = train(mesh, callbacks=[look])
    divided.assert_close(state, alone[1])
    for name in ("train/critic_loss", "train/generator_loss"):
        got, want = (each.history[name].values for each in (result, alone[0]))
        # Means of the same terms in another order.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    parts = [spec for name, spec in look.specs.items() if "kernel" in name and spec != P()]
    # Three kernels, each with its momentum.
    assert len(parts) == (0 if mesh == "data" else 6)


@pytest.mark.slow
def test_gan_in_parts_is_the_same_step_by_step():
    _, fused = train("fsdp")
    _, single = train("fsdp", steps_per_dispatch=1)
    divided.assert_close(single, fused)


def test_program_of_a_gan_in_parts_never_has_the_whole_state():
    step = divided.traced(GAN(), mesh={"fsdp": 8})
    memory = divided.compiled(step).memory_analysis()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.target))
    # What is not divided, biases and the critic's last layer, is less than a tenth.
    assert memory.argument_size_in_bytes < whole * (1 / 8 + 1 / 10)
