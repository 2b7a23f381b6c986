"""A model, data and a way to train that fit into a fraction of a second, for the tests.

The model has what makes a resume hard: BatchNorm statistics and a Dropout stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxtrainer import Callback, FitResult, Run, Trainer, TrainModule, data
from jaxtrainer.state import flat_items

FEATURES, CLASSES = 4, 3


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(jax.nn.relu(self.norm(self.first(x)))))


class Tiny(TrainModule):
    """Classifies with `Net`; `make` replaces the model, `tx` the optimiser."""

    def __init__(self, make: Any = Net, tx: Any = None) -> None:
        self.make = make
        self.tx = tx or optax.adam(1e-2)

    def configure_model(self, rngs: nnx.Rngs) -> Any:
        return self.make(rngs)

    def configure_optimizers(self) -> Any:
        return self.tx

    def training_step(self, model: Any, batch: Any) -> Any:
        logits = model(batch["x"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return {"loss": loss, "logits": logits}

    def validation_step(self, model: Any, batch: Any) -> Any:
        return self.training_step(model, batch)

    def predict_step(self, model: Any, batch: Any) -> Any:
        return model(batch["x"])


def line(rngs: nnx.Rngs) -> nnx.Linear:
    """A model without state or randomness, where a law must hold to the last bits."""
    return nnx.Linear(FEATURES, CLASSES, rngs=rngs)


class Probe(Callback):
    """Keeps a host copy of the whole state at the end, and the epoch means."""

    order = 1

    def __init__(self) -> None:
        self.state: dict[str, np.ndarray] = {}

    def on_train_end(self, run: Run) -> None:
        self.state = host_state(run.state)


def host_state(state: Any) -> dict[str, np.ndarray]:
    """Every array of a `TrainState` by its path, keys as their words."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): host_array(leaf) for path, leaf in flat}


def host_array(leaf: jax.Array) -> np.ndarray:
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if is_key else leaf)


def params_of(module: TrainModule) -> dict[str, np.ndarray]:
    """The trained parameters by name."""
    params = nnx.to_pure_dict(nnx.state(module.model, nnx.Param))
    return {name: np.array(leaf) for name, leaf in flat_items(params)}


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Compare bytes, so that -0.0 is not 0.0 and a NaN is itself."""
    assert got.keys() == want.keys()
    assert want, "nothing to compare"
    differing = [k for k in want if got[k].tobytes() != want[k].tobytes()]
    assert not differing, f"these differ: {differing}"


def make_arrays(rows: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Separable data: `x` `[rows, features]` float32, `label` `[rows]` int32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    weights = np.random.default_rng(99).normal(size=(FEATURES, CLASSES))
    return {"x": x, "label": (x @ weights).argmax(1).astype(np.int32)}


def make_batches(num: int = 8, size: int = 8, ragged: int = 0) -> list[dict[str, np.ndarray]]:
    """A plain list of batches; with `ragged` one more, of that many rows."""
    arrays = make_arrays(num * size + ragged)
    starts = range(0, num * size + ragged, size)
    return [{k: a[i : i + size] for k, a in arrays.items()} for i in starts]


def make_loader(rows: int = 64, size: int = 8, **options: Any) -> Any:
    """A shuffled loader over arrays in memory."""
    return data.from_arrays(make_arrays(rows), batch_size=size, **{"shuffle": True, **options})


def make_trainer(callbacks: Callback | Iterable[Callback] = (), **options: Any) -> Trainer:
    """A quiet trainer on one device, with as little to compile as possible."""
    defaults = {
        "mesh": {"data": 1},
        "steps_per_dispatch": 4,
        "enable_progress_bar": False,
        "compilation_cache": False,
        "log_every_n_steps": 4,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=callbacks, **{**defaults, **options})


def fit(
    loader: Any = None,
    val_loader: Any = None,
    *,
    module: TrainModule | None = None,
    callbacks: Sequence[Callback] = (),
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[FitResult, dict[str, np.ndarray]]:
    """Train, and return the result and the whole state at the end."""
    probe = Probe()
    trainer = make_trainer([*callbacks, probe], **options)
    loader = make_loader() if loader is None else loader
    result = trainer.fit(module or Tiny(), loader, val_loader, ckpt_path=ckpt_path)
    return result, probe.state
