"""What the tests of divided states share: three models, how each is divided, a few steps of it.

The models have arrays large enough to be divided by themselves, and are small enough to compile
in seconds. Tolerances are those of `assert_close`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtrainer import TrainModule
from jaxtrainer.collectives import Collective, collectives
from jaxtrainer.session import Session
from jaxtrainer.traced import TracedStep
from tests import tiny

WIDTH, ROWS, CLASSES = 64, 16, 8

MESHES: dict[str, Mapping[str, int]] = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "hybrid": {"data": 2, "fsdp": 4},
    "tensor": {"data": 2, "model": 4},
    "mix": {"data": 2, "fsdp": 2, "model": 2},
}


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.down(jnp.tanh(self.up(x))))


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(4, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.second = nnx.Conv(32, 32, (3, 3), strides=2, rngs=rngs)
        self.last = nnx.Linear(32 * 4, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.norm(self.first(x.reshape(-1, 4, 4, 4))))
        return self.last(jnp.tanh(self.second(x)).reshape(x.shape[0], -1))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(WIDTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List(Block(rngs) for _ in range(2))
        self.last = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(jnp.argsort(x.reshape(len(x), 4, 16)[:, :, :8], -1).reshape(len(x), -1))
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(1))


MODELS: dict[str, Any] = {"mlp": MLP, "cnn": CNN, "transformer": Transformer}


def rules_for(mesh: str) -> Any:
    """How each model is divided along `model`: columns first, then rows (Megatron-LM, 2019)."""
    if mesh not in ("tensor", "mix"):
        return None
    other = "fsdp" if mesh == "mix" else None
    return {
        "*up/kernel": P(other, "model"),
        "*up/bias": P("model"),
        "*down/kernel": P("model", other),
        "*attention/out/kernel": P("model", None, other),
        "*attention/*/kernel": P(other, "model"),
        "first/kernel": P(None, None, None, "model"),
        "second/kernel": P(None, None, "model", other),
    }


def used_rules(model: str, mesh: str) -> Any:
    """The rules that a model needs: one that matches nothing is an error."""
    parts = {"mlp": ("*up", "*down"), "cnn": ("first", "second")}.get(model, ("*",))
    rules = rules_for(mesh)
    return rules and {name: spec for name, spec in rules.items() if name.startswith(parts)}


class Classify(tiny.Tiny):
    """Trains one of the models by SGD with momentum, which has state and no division by noise."""

    def __init__(self, model: str = "mlp", tx: Any = None) -> None:
        super().__init__(MODELS[model], tx or optax.sgd(0.05, momentum=0.9))


def batches(num: int = 4, rows: int = ROWS) -> list[dict[str, np.ndarray]]:
    """`x`: `[rows, WIDTH]`, float32; `label`: `[rows]`, int32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, rows, WIDTH)).astype(np.float32)
    label = rng.integers(0, CLASSES, (num, rows)).astype(np.int32)
    return [{"x": a, "label": b} for a, b in zip(x, label, strict=True)]


def options_for(model: str, mesh: str) -> dict[str, Any]:
    return {"mesh": MESHES[mesh], "sharding": used_rules(model, mesh)}


def train(model: str, mesh: str, **options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Result and state after four steps."""
    module = options.pop("module", None) or Classify(model)
    given = {"max_epochs": 1, "log_every_n_steps": 1, **options_for(model, mesh), **options}
    return tiny.fit(batches(), module=module, **given)


def assert_close(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    """Compare states whose sums were taken in another order.

    Each device adds up its rows or features, and then the sums are added up: float32 rounding,
    1e-7 of the terms, whose sum may be smaller than they are. Four steps do not blow it up.
    """
    assert got.keys() == want.keys()
    for name in want.keys() - {".totals"}:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=2e-6, err_msg=name)


def traced(model: str | TrainModule, **options: Any) -> TracedStep:
    """The traced step of one batch at a time, with nothing allocated."""
    module = Classify(model) if isinstance(model, str) else model
    trainer = tiny.make_trainer(**{"max_epochs": 1, "steps_per_dispatch": 1, **options})
    session = Session(trainer.options, (), module, "fit", None)
    module.run = session.run
    spec = session.train_feed(batches(1)).spec
    return TracedStep(session, replace(spec, fed=spec.batch, resident=None), None, 1)


def compiled(step: TracedStep) -> Any:
    return step.lower(step.program.single).compile()


def exchanged(program: Any) -> list[Collective]:
    """What its devices send each other that is more than a number or two."""
    return [c for c in collectives(program.as_text()) if c.size_bytes > 64]
