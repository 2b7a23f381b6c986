"""What a steady step costs in Python, and that it reads nothing from the device.

A steady step lies between two reports, and no hook but the one that starts the watch is
overridden. Calls are seen by a profile hook in the loop's thread. Reads are seen by handing the
loop arrays that count: JAX's own guard is silent on the CPU backend, where a read is no transfer.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxtrainer import Callback, Run
from jaxtrainer import trainer as trainer_module
from jaxtrainer.callbacks import NonFinite
from tests import tiny

MAX_FILES, MAX_FUNCTIONS, MAX_FRAMES_ABOVE = 12, 25, 3
PACKAGE = trainer_module.__file__.removesuffix("trainer.py")
COMPILED_CALL = jax.stages.Compiled.__call__.__code__
BATCHES = 32

pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"]),
]


class Profile(Callback):
    """Watches the second epoch: the Python functions between one dispatch and the next."""

    def __init__(self) -> None:
        self.dispatches: list[set[tuple[str, str]]] = []
        self.frames_above: list[int] = []

    def on_train_epoch_start(self, run: Run) -> None:
        if run.epoch == 1:
            # JAX is called at each garbage collection, which has nothing to do with the step.
            gc.disable()
            sys.setprofile(self._see)

    def on_train_epoch_end(self, run: Run) -> None:
        sys.setprofile(None)
        gc.enable()

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        if frame.f_code is COMPILED_CALL:
            self.dispatches.append(set())
            self.frames_above.append(sum(file.startswith(PACKAGE) for file in _files_above(frame)))
        if self.dispatches:
            self.dispatches[-1].add((frame.f_code.co_filename, frame.f_code.co_qualname))

    @property
    def steady(self) -> list[set[tuple[str, str]]]:
        """All but the last dispatch, after which the epoch ends."""
        return self.dispatches[:-1]


def _files_above(frame: FrameType) -> Iterator[str]:
    caller = frame.f_back
    while caller is not None:
        yield caller.f_code.co_filename
        caller = caller.f_back


def watch(steps: int, *callbacks: Callback) -> Profile:
    """Train two epochs, with no report in the second before its end."""
    profile = Profile()
    loader = tiny.make_loader(8 * BATCHES)
    options: Any = {"steps_per_dispatch": steps, "log_every_n_steps": 10 * BATCHES}
    tiny.fit(loader, callbacks=[profile, *callbacks], max_epochs=2, **options)
    assert len(profile.steady) == BATCHES // steps - 1
    return profile


def test_steady_step_stays_within_its_budget(steps: int):
    profile = watch(steps)
    for functions in profile.steady:
        assert len(functions) <= MAX_FUNCTIONS, sorted(functions)
        assert len({file for file, _ in functions}) <= MAX_FILES
    assert set(profile.frames_above) == {MAX_FRAMES_ABOVE}


def test_steady_step_with_a_guard_stays_within_its_budget(steps: int):
    for functions in watch(steps, NonFinite("skip")).steady:
        assert len(functions) <= MAX_FUNCTIONS, sorted(functions)
        assert len({file for file, _ in functions}) <= MAX_FILES


def test_steady_step_calls_no_flax(steps: int):
    seen = set().union(*watch(steps).dispatches)
    assert not [name for file, name in seen if "/flax/" in file]


def test_profile_sees_flax_in_a_hook(steps: int):
    class Costly(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            nnx.state(model)

    model = tiny.line(nnx.Rngs(0))
    profile = watch(steps, Costly())
    for functions in profile.steady:
        assert [name for file, name in functions if "/flax/" in file]


class Watched:
    """An array on the device that notes each way of bringing its values to the host."""

    def __init__(self, array: jax.Array, dispatch: int, events: list[Any]) -> None:
        self.array = array
        self.dispatch = dispatch
        self.events = events

    def _read(self) -> np.ndarray:
        self.events.append(("read", self.dispatch))
        with jax.transfer_guard_device_to_host("allow"):
            return tiny.host_array(self.array)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._read()

    def __float__(self) -> float:
        return float(self._read())

    def __getitem__(self, index: Any) -> Watched:
        return Watched(self.array[index], self.dispatch, self.events)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what NumPy asks for before `__array__`
        # The feed's thread bounds its lead by waiting; anything else is a read or as bad as one.
        if name not in ("is_ready", "block_until_ready"):
            self.events.append(("read", self.dispatch))
        return getattr(self.array, name)


@contextmanager
def watched_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Give the loop watched arrays; yields dispatches, reads and reports as they happen."""
    events: list[Any] = []
    real_fit = trainer_module.fit

    def fit(run: Run, plan: Any) -> None:
        real_step, count = plan.step, 0

        def step(state: Any, *arguments: Any) -> Any:
            nonlocal count
            outputs = real_step(jax.tree.map(_unwatched, state), *arguments)
            count += 1
            events.append(("dispatch", count))
            return jax.tree.map(lambda a: Watched(a, count, events), outputs)

        plan.step = step
        try:
            real_fit(run, plan)
        finally:
            run.state = jax.tree.map(_unwatched, run.state)

    monkeypatch.setattr(trainer_module, "fit", fit)
    with jax.transfer_guard_device_to_host("disallow"):
        yield events


def _unwatched(leaf: Any) -> Any:
    return leaf.array if isinstance(leaf, Watched) else leaf


def train_watched(
    monkeypatch: pytest.MonkeyPatch, steps: int, every: int, *callbacks: Callback
) -> list[Any]:
    with watched_reads(monkeypatch) as events:
        trainer = tiny.make_trainer(
            callbacks, steps_per_dispatch=steps, log_every_n_steps=every, max_epochs=1
        )
        trainer.fit(tiny.Tiny(), tiny.make_loader(8 * BATCHES))
    assert events.count(("dispatch", 1)) == 1
    return events


def test_steps_between_reports_read_nothing(steps: int, monkeypatch: pytest.MonkeyPatch):
    events = train_watched(monkeypatch, steps, every=10 * BATCHES)
    last = BATCHES // steps
    # The epoch's totals when it is over, and the last row, which no report was due for.
    assert events[:last] == [("dispatch", i + 1) for i in range(last)]
    assert events[last:] == [("read", last), ("read", last)]


def test_guard_reads_nothing_of_its_own(steps: int, monkeypatch: pytest.MonkeyPatch):
    events = train_watched(monkeypatch, steps, 8, NonFinite("skip", spike_z=6))
    # A report each 8 batches but for the first 8, the totals, and the report of the last ones.
    assert len([e for e in events if e[0] == "read"]) == BATCHES // 8 + 1


def test_report_reads_once_and_one_interval_late(steps: int, monkeypatch: pytest.MonkeyPatch):
    events = train_watched(monkeypatch, steps, every=8)
    reads = [(i, e[1]) for i, e in enumerate(events) if e[0] == "read"]
    assert len(reads) == BATCHES // 8 + 1
    in_time = [source for i, source in reads if ("dispatch", source + 8 // steps) in events[:i]]
    assert in_time == [n * 8 // steps for n in (1, 2, 3)]


def test_watch_sees_a_read_in_a_hook(steps: int, monkeypatch: pytest.MonkeyPatch):
    class Reads(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            float(outputs["loss"])
            np.asarray(run.state.batch_count)

    events = train_watched(monkeypatch, steps, 10 * BATCHES, Reads())
    assert len([e for e in events if e[0] == "read"]) == 2 * BATCHES + 2
