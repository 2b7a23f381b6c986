"""The run whose checkpoint is kept in `tests/data`, for later versions to read.

`python -m tests.golden FOLDER` trains it, and writes the checkpoint and what it must give. Run
once for a format, on the oldest JAX that is supported; the files are never changed afterwards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxtrainer import Trainer, TrainModule, data
from jaxtrainer.callbacks import EMA, Checkpoint

STEPS, EPOCHS = 8, 2
"""Batches an epoch, and epochs: the checkpoint is taken within the second one."""

STEP = 11


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(jax.nn.relu(self.norm(self.first(x)))))


class Golden(TrainModule):
    def configure_model(self, rngs: nnx.Rngs) -> Any:
        return Net(rngs)

    def configure_optimizers(self) -> Any:
        return optax.adam(1e-2)

    def training_step(self, model: Any, batch: Any) -> Any:
        logits = model(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def predict_step(self, model: Any, batch: Any) -> Any:
        return model(batch["x"])


def samples() -> dict[str, np.ndarray]:
    """Numbers that no generator has to give again: `x` `[64, 4]` float32, `label` `[64]` int32."""
    x = np.sin(np.arange(STEPS * 8 * 4, dtype=np.float32)).reshape(-1, 4)
    return {"x": x, "label": (np.arange(STEPS * 8) % 3).astype(np.int32)}


def loader() -> Any:
    return data.from_arrays(samples(), batch_size=8)


def trainer(*callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=EPOCHS,
        callbacks=[EMA(0.9), *callbacks],
        mesh={"data": 1},
        steps_per_dispatch=4,
        enable_progress_bar=False,
        compilation_cache=False,
        num_sanity_val_steps=0,
    )


def expected(path: Path) -> dict[str, Any]:
    """What the checkpoint must give: predictions, and the loss at the end of its epoch."""
    (batch, *_) = trainer().predict(Golden(), loader(), ckpt_path=path)
    result = trainer().fit(Golden(), loader(), ckpt_path=path)
    return {"predictions": batch.tolist(), "train/loss": result.metrics["train/loss"]}


def main(folder: Path) -> None:
    saver = Checkpoint(folder, every_n_train_steps=STEP, save_top_k=-1, save_last=False)
    trainer(saver).fit(Golden(), loader())
    (folder / "expected.json").write_text(json.dumps(expected(folder / f"step_{STEP}")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
