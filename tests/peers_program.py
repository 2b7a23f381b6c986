"""A program for `test_process_faults`: trains in several processes, and one of them goes wrong.

It prints `PHASE name` where something from outside may happen to it, and the monotonic time there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrainer import Callback, Run, distributed
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.rundir import saved_steps
from tests import tiny
from tests.cluster import say
from tests.process_program import digest

FOREVER_S = 600.0


class At(Callback):
    """Does something at a step, on one process."""

    may_log = False

    def __init__(self, act: Any, process: int, step: int = 8) -> None:
        self.act, self.process, self.step = act, process, step

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.global_step >= self.step and distributed.index() == self.process:
            self.act()


class Pace(Callback):
    """Slows training down, says where it is, what the user is told, and that it was closed."""

    may_log = False

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(0.02)
        if run.global_step == 8:
            say(phase="train", at=time.monotonic())

    def teardown(self, run: Run) -> None:
        say(torn_down=True, notices=run.notices)


class Stuck:
    """A loader that gives some batches, and then nothing on one process."""

    def __init__(self, process: int) -> None:
        self.process = process

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(tiny.make_batches(64)):
            if i == 24 and distributed.index() == self.process:
                time.sleep(FOREVER_S)
            yield batch


def fit(*callbacks: Callback, loader: Any = None, **options: Any) -> Any:
    trainer = tiny.make_trainer(
        [Pace(), *callbacks],
        mesh={"data": -1},
        steps_per_dispatch=1,
        **{"max_epochs": 200, **options},
    )
    loader = tiny.make_batches(16) if loader is None else loader
    return trainer.fit(tiny.Tiny(make=tiny.line), loader)


def fail() -> None:
    raise ValueError("this sample is cursed")


def train(epochs: str = "200") -> None:
    fit(max_epochs=int(epochs))


def raises(process: str) -> None:
    fit(At(fail, int(process)))


def caught(process: str) -> None:
    """Catches what `fit` raises, and ends well."""
    try:
        fit(At(fail, int(process)))
    except ValueError as error:
        say(caught=str(error))


def all_raise() -> None:
    try:
        fit(At(fail, distributed.index()))
    except ValueError as error:
        say(caught=str(error))
    say(steps=fit(max_epochs=1).num_steps)


def after(process: str) -> None:
    """One process fails after a call, and the other is in the next one."""
    fit(max_epochs=1)
    if distributed.index() == int(process):
        fail()
    fit()


def hook(process: str) -> None:
    fit(At(lambda: time.sleep(FOREVER_S), int(process)), peer_timeout=4.0)


def loader(process: str) -> None:
    fit(loader=Stuck(int(process)), data_timeout=4.0)


def slow(process: str) -> None:
    fit(At(lambda: time.sleep(0.1), int(process), step=1), max_epochs=3)


def goes_on(directory: str, steps: str) -> None:
    """Trains from the last checkpoint, if there is one, to the end."""
    saver = Checkpoint(directory, every_n_train_steps=5)
    module, last = tiny.Tiny(), "last" if saved_steps(Path(directory)) else None
    callbacks = [Pace(), saver]
    options = {"mesh": {"data": -1}, "steps_per_dispatch": 1, "max_steps": int(steps)}
    trainer = tiny.make_trainer(callbacks, **options)
    trainer.fit(module, tiny.make_loader(rows=128, size=8), ckpt_path=last)
    say(params=digest(tiny.params_of(module)))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
