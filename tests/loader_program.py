"""A program for `test_loader_faults`: trains on a loader whose workers or threads fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from jaxtrainer import Callback, Run, waiting
from tests import tiny


class Executor:
    """A loader that waits for a thread which the interpreter waits for, too."""

    def __iter__(self) -> Iterator[Any]:
        yield from tiny.make_batches(4)
        ThreadPoolExecutor(1).submit(time.sleep, 1000).result()


class Fault(Callback):
    """Does something to the worker process after a few steps, and looks at what is left."""

    def __init__(self, signals: list[signal.Signals]) -> None:
        self.signals = signals
        self.began = 0.0

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.global_step == 4:
            self.began = time.monotonic()
            for number in self.signals:
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, number)

    def teardown(self, run: Run) -> None:
        print(f"children: {len(multiprocessing.active_children())}")
        print(f"seconds: {time.monotonic() - self.began}")


def record(row: int) -> dict[str, Any]:
    time.sleep(0.001)
    return {"x": np.ones(tiny.FEATURES, np.float32), "label": np.int32(row % 3)}


def failing(row: int) -> dict[str, Any]:
    if row == 400:
        raise ZeroDivisionError("on purpose")
    return record(row)


def main(fault: str) -> None:
    from absl import flags

    flags.FLAGS(sys.argv[:1])
    signals = {"kill": [signal.SIGKILL], "stop": [signal.SIGSTOP]}.get(fault, [])
    read = failing if fault == "raise" else record
    loader: Any = Executor()
    if fault != "executor":
        dataset = grain.MapDataset.range(100_000).map(read).to_iter_dataset().batch(8)
        loader = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=1))
    else:
        waiting._EXIT_S = 0.5
    trainer = tiny.make_trainer(Fault(signals), max_epochs=1, data_timeout=3, steps_per_dispatch=2)
    trainer.fit(tiny.Tiny(make=tiny.line), loader)


if __name__ == "__main__":
    main(sys.argv[1])
