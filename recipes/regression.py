"""Fits a curve through noisy points: the smallest complete program.

    python recipes/regression.py

4096 points of a sine with noise; 1 hidden layer of 64, Adam with a cosine schedule. On 2 CPU cores
the 20 epochs take under 0.1 s, compilation before them some seconds. The noise has a variance of
0.01. The table at the end has this line:

    │ train/loss │ 0.010468 │ █▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ │
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxtrainer import Trainer, TrainModule, data


class Curve(TrainModule):
    def configure_model(self, rngs):
        first, last = nnx.Linear(1, 64, rngs=rngs), nnx.Linear(64, 1, rngs=rngs)
        return nnx.Sequential(first, jnp.tanh, last)

    def configure_optimizers(self):
        return optax.adam(optax.cosine_decay_schedule(3e-2, self.run.estimated_steps))

    def training_step(self, model, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


rng = np.random.default_rng(0)
x = rng.uniform(-3, 3, (4096, 1)).astype(np.float32)
y = np.sin(x) + rng.normal(0, 0.1, x.shape).astype(np.float32)
loader = data.from_arrays({"x": x, "y": y}, batch_size=64, shuffle=True)
module = Curve()
result = Trainer(max_epochs=20, seed=0).fit(module, loader)
print(result)
