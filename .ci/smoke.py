"""Trains a linear model for two steps with an installed jaxtrainer.

Runs away from the source tree; fails when the package comes from elsewhere or brings strays.
"""

import importlib.metadata
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtrainer
from jaxtrainer import Trainer, TrainModule, data


class Tiny(TrainModule):
    def configure_model(self, rngs):
        return nnx.Linear(4, 1, rngs=rngs)

    def configure_optimizers(self):
        return optax.sgd(0.1)

    def training_step(self, model, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def check_package():
    """The imported package is the one installed here, typed, and alone in its wheel."""
    package = Path(jaxtrainer.__file__).resolve()
    assert package.is_relative_to(Path(sys.prefix).resolve()), f"imported from {package}"
    files = importlib.metadata.files("jaxtrainer") or []
    assert any(file.as_posix() == "jaxtrainer/py.typed" for file in files), "py.typed is missing"
    tops = {file.parts[0] for file in files} - {".."}  # scripts are recorded as ../../../bin
    strays = {top for top in tops if top != "jaxtrainer" and not top.endswith(".dist-info")}
    assert not strays, f"the wheel also holds {sorted(strays)}"


def main():
    check_package()
    x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    loader = data.from_arrays({"x": x, "y": x.sum(axis=1, keepdims=True)}, batch_size=8)
    result = Trainer(max_epochs=1, enable_progress_bar=False).fit(Tiny(), loader)
    assert result.num_steps == 2, f"expected 2 steps, got {result.num_steps}"
    version = importlib.metadata.version("jaxtrainer")
    print(f"jaxtrainer {version} from the wheel: trained {result.num_steps} steps")


if __name__ == "__main__":
    main()
