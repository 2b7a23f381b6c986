"""A module, data and a clock that fit into a test.

May import levels 0 to 2.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxtrainer import data
from jaxtrainer.module import TrainModule

FEATURES, CLASSES = 4, 3


class _Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(jax.nn.relu(self.norm(self.first(x)))))


class TinyModule(TrainModule):
    """A classifier of 83 parameters, with BatchNorm and Dropout: what makes a resume hard.

    Args:
        learning_rate: Of Adam.

    Example:
        >>> module, loader = TinyModule(), tiny_loader()  # Trainer(max_epochs=1).fit(...)
    """

    def __init__(self, learning_rate: float = 1e-2) -> None:
        self.learning_rate = learning_rate

    def configure_model(self, rngs: nnx.Rngs) -> Any:
        """See `TrainModule`."""
        return _Net(rngs)

    def configure_optimizers(self) -> Any:
        """See `TrainModule`."""
        return optax.adam(self.learning_rate)

    def training_step(self, model: Any, batch: Any) -> Any:
        """See `TrainModule`."""
        logits = model(batch["x"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return {"loss": loss, "logits": logits}

    def validation_step(self, model: Any, batch: Any) -> Any:
        """See `TrainModule`."""
        return self.training_step(model, batch)

    def predict_step(self, model: Any, batch: Any) -> Any:
        """See `TrainModule`."""
        return model(batch["x"])


def tiny_arrays(rows: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Return separable data: `x` `[rows, 4]`, float32, and `label` `[rows]`, int32.

    Example:
        >>> {name: array.shape for name, array in tiny_arrays(8).items()}
        {'x': (8, 4), 'label': (8,)}
    """
    rng = np.random.default_rng([seed, 1])
    x = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    weights = np.random.default_rng(0).normal(size=(FEATURES, CLASSES))
    return {"x": x, "label": (x @ weights).argmax(1).astype(np.int32)}


def tiny_loader(rows: int = 64, batch_size: int = 8, **options: Any) -> Any:
    """Return a shuffled loader of `tiny_arrays`; options as in `data.from_arrays`."""
    options = {"shuffle": True, **options}
    return data.from_arrays(tiny_arrays(rows), batch_size=batch_size, **options)


class ManualClock:
    """A clock for `Trainer(clock=...)` that only moves when it is told to.

    Example:
        >>> clock = ManualClock()
        >>> clock.advance(30.0)
        >>> clock()
        30.0
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time, in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let that much time pass."""
        self.now += seconds
