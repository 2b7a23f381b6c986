"""Twenty thousand steps cost no memory, thread, file or array more than the first thousand."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, Run, TrainModule
from jaxtrainer.callbacks import Checkpoint
from tests import tiny

EPOCHS, EPOCH, WARM = 40, 500, 12
MAX_BYTES_A_STEP = 100


class Linear(TrainModule):
    """Ten numbers to ten numbers."""

    def configure_model(self, rngs: nnx.Rngs) -> Any:
        return nnx.Linear(10, 10, rngs=rngs)

    def configure_optimizers(self) -> Any:
        return optax.adam(1e-3)

    def training_step(self, model: Any, batch: Any) -> Any:
        return ((model(batch["x"]) - batch["x"]) ** 2).mean()


class Meter(Callback):
    """What the process holds at the end of each epoch."""

    order = 2

    def __init__(self) -> None:
        self.rss: list[int] = []
        self.counts: list[tuple[int, int, int]] = []

    def on_train_epoch_start(self, run: Run) -> None:
        gc.collect()
        self.rss.append(rss_bytes())
        files = len(os.listdir("/proc/self/fd"))
        self.counts.append((threading.active_count(), files, len(jax.live_arrays())))


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 8], ids=["single", "fused"])
def test_twenty_thousand_steps_leak_nothing(steps: int, tmp_path: Path):
    meter = Meter()
    x = np.random.default_rng(0).normal(size=(8 * EPOCH, 10)).astype(np.float32)
    loader = [{"x": x[i : i + 8]} for i in range(0, len(x), 8)]
    options: Any = {"max_epochs": EPOCHS, "log_every_n_steps": 50, "steps_per_dispatch": steps}
    result = tiny.make_trainer([meter, Checkpoint(tmp_path)], **options).fit(Linear(), loader)
    assert result.num_steps == EPOCHS * EPOCH
    # A save under way has buffers of its own, so that the least of some epochs counts.
    first, last = meter.rss[WARM : WARM + 5], meter.rss[-5:]
    a_step = (min(last) - min(first)) / (EPOCH * (EPOCHS - WARM - 5))
    print(f"{a_step:.1f} bytes a step, {meter.counts[-1]} threads, files, arrays")
    assert a_step < MAX_BYTES_A_STEP
    # A save may be under way, with its threads and files: what is held between saves is the least.
    early, late = meter.counts[WARM : EPOCHS // 2], meter.counts[EPOCHS // 2 :]
    for before, after in zip(zip(*early, strict=True), zip(*late, strict=True), strict=True):
        assert min(after) <= min(before)
