"""What `processes` times in each process: a small classifier, by the trainer and by hand.

The batch grows with the devices (weak scaling), so that each computes the same.
"""

from __future__ import annotations

import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrainer import Callback, Run, Trainer, TrainModule
from jaxtrainer.ending import ENDING

ROWS, FEATURES = 16, 32


def num_devices() -> int:
    return jax.device_count()


def batch() -> dict[str, np.ndarray]:
    rng, rows = np.random.default_rng(0), ROWS * num_devices()
    x = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    return {"x": x, "y": x[:, :1]}


def loss_of(model: Any, batch: Any) -> jax.Array:
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


class Line(TrainModule):
    def configure_model(self, rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(FEATURES, 1, rngs=rngs)

    def configure_optimizers(self) -> Any:
        return optax.sgd(1e-3)

    def training_step(self, model: Any, batch: Any) -> jax.Array:
        return loss_of(model, batch)


class Half(Callback):
    """Takes the time of the second epoch, and that of the watchdog's threads on a processor."""

    seconds = cpu_s = 0.0
    chosen = 1

    def on_train_start(self, run: Run) -> None:
        found = [re.match(r"(?:up to )?(\w+) steps? a dispatch", line) for line in run.notices]
        words = [match[1] for match in found if match]
        self.chosen = int(words[0]) if words and words[0].isdecimal() else 1

    def on_train_epoch_start(self, run: Run) -> None:
        jax.block_until_ready(run.state)
        self.began, self.cpu_began_s = time.perf_counter(), _cpu_s()

    def on_train_epoch_end(self, run: Run) -> None:
        jax.block_until_ready(run.state)
        self.seconds = time.perf_counter() - self.began
        self.cpu_s = _cpu_s() - self.cpu_began_s


def _cpu_s() -> float:
    alive = [t.ident for t in ENDING.threads if t.is_alive() and t.ident]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in alive)


def train(steps: int, k: int | str = 1) -> Half:
    """Train two epochs of so many steps, and return the times of the second.

    Args:
        steps: Of an epoch.
        k: Steps of a dispatch.
    """
    half = Half()
    options: dict[str, Any] = {"steps_per_dispatch": k, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, callbacks=[half], compilation_cache=False, **options)
    trainer.fit(Line(), [batch()] * steps)
    return half


def by_hand(steps: int, *, is_resident: bool = False) -> float:
    """Return the seconds of a jitted step in a plain loop, with the same data on the same mesh.

    The next batch is put on the devices while a step runs, as a careful loop does it: each process
    its own rows, from the host's arrays.

    Args:
        steps: Of an epoch.
        is_resident: Put nothing, but use one batch again and again: what no feed can be below.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    graphdef, params = nnx.split(nnx.Linear(FEATURES, 1, rngs=nnx.Rngs(0)))
    tx = optax.sgd(1e-3)
    state = jax.device_put((params, tx.init(params)), whole)

    def update(state: Any, data: Any) -> tuple[Any, jax.Array]:
        params, opt_state = state
        merge = nnx.merge
        loss, grads = jax.value_and_grad(lambda p: loss_of(merge(graphdef, p, copy=True), data))(
            params
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    step, data = jax.jit(update, donate_argnums=0), batch()
    count, each = jax.process_count(), ROWS * len(mesh.local_devices)
    mine = slice(jax.process_index() * each, (jax.process_index() + 1) * each)

    def put() -> Any:
        if count == 1:
            return jax.device_put(data, split)
        make = jax.make_array_from_process_local_data
        return jax.tree.map(lambda x: make(split, x[mine], x.shape), data)

    loss, seconds = None, 0.0
    for _ in range(2):
        following = put()
        began = time.perf_counter()
        for _ in range(steps):
            state, loss = step(state, following)
            following = following if is_resident else put()
            # Programs of several CPU devices must not queue up, see `sharding.is_lockstep`.
            if len(mesh.local_devices) > 1:
                jax.block_until_ready(loss)
        jax.block_until_ready((state, loss))
        seconds = time.perf_counter() - began
    return seconds / steps
