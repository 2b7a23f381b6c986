"""Fused dispatch is step by step: the same numbers, and the same hooks in the same order.

All runs share one program of up to four steps a dispatch; they differ in where dispatches are cut
short. The law is equal bits, no tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Checkpoint
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCH = 8


class Every(Callback):
    """Asks for control at every n-th optimiser step, and keeps the steps at which it got it."""

    def __init__(self, period: int) -> None:
        self.every_n_train_steps = period
        self.seen: list[int] = []

    def on_save_point(self, run: Run) -> None:
        self.seen.append(run.global_step)


class Outputs(Callback):
    """Keeps what each batch logged, with its index."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch_idx, float(outputs["loss"])))


class Starts(Callback):
    """Asks for control before each batch, and skips the rest of an epoch where told to."""

    def __init__(self, skip_at: tuple[int, int] | None = None) -> None:
        self.skip_at = skip_at
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, run: Run, batch: Any, batch_idx: int) -> int | None:
        self.seen.append((run.epoch, batch_idx))
        return -1 if (run.epoch, batch_idx) == self.skip_at else None


@pytest.fixture(scope="module")
def plain(compiled_once: None) -> Any:
    """Two epochs, of dispatches as long as can be."""
    return tiny.fit(max_epochs=2, log_every_n_steps=1)


@pytest.mark.parametrize(
    "cut",
    [
        lambda: {"callbacks": [Every(3)]},
        lambda: {"callbacks": [Every(2), Every(5)]},
        lambda: {"callbacks": [Starts()]},
        lambda: {"val_loader": tiny.make_batches(1), "val_check_interval": 3},
    ],
    ids=["period", "two_periods", "batch_start", "validation"],
)
def test_fused_does_not_depend_on_where_it_is_cut(plain: Any, cut: Any):
    result, state = tiny.fit(max_epochs=2, log_every_n_steps=1, **cut())
    tiny.assert_same_bits(state, plain[1])
    assert result.history.step["train/loss"] == plain[0].history.step["train/loss"]
    assert result.history.epoch["train/loss"] == plain[0].history.epoch["train/loss"]


def test_fused_stops_at_exactly_max_steps(plain: Any):
    result, _ = tiny.fit(max_steps=11, log_every_n_steps=1)
    losses = plain[0].history.step["train/loss"]
    assert result.num_steps == 11
    assert result.history.step["train/loss"].values == losses.values[:11]
    assert result.history.step["train/loss"].steps == list(range(1, 12))


def test_fused_gives_control_at_every_multiple_of_a_period():
    every = Every(3)
    tiny.fit(callbacks=[every], max_epochs=2)
    # Dispatches end at multiples of 3, at full chunks (4, 12) and with the epoch (8, 16).
    assert every.seen == [3, 4, 6, 8, 9, 12, 15, 16]


def test_fused_calls_batch_end_once_a_step_with_its_own_outputs(plain: Any):
    outputs = Outputs()
    tiny.fit(callbacks=[outputs], max_epochs=2)
    losses = plain[0].history.step["train/loss"].values
    assert [index for index, _ in outputs.seen] == [*range(EPOCH), *range(EPOCH)]
    assert [loss for _, loss in outputs.seen] == losses


@pytest.mark.parametrize("loader", ["list", "arrays"])
def test_fused_shows_batch_end_its_own_batch(loader: str):
    batches = tiny.make_batches(EPOCH)
    arrays = tiny.make_loader(8 * EPOCH, shuffle=False)
    seen: list[np.ndarray] = []

    class Batches(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(np.asarray(batch["x"]))

    tiny.fit(batches if loader == "list" else arrays, callbacks=[Batches()], max_epochs=1)
    np.testing.assert_array_equal(seen, [batch["x"] for batch in batches])


def test_fused_agrees_with_one_step_a_dispatch(plain: Any):
    _, state = tiny.fit(max_epochs=2, steps_per_dispatch=1)
    # Another program, which XLA may order otherwise: float32 rounding, grown over 16 Adam steps.
    for name, array in plain[1].items():
        np.testing.assert_allclose(state[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_fused_does_not_depend_on_the_kind_of_loader():
    loaders = [tiny.make_batches(EPOCH), tiny.make_loader(8 * EPOCH, shuffle=False)]
    of_list, of_arrays = (tiny.fit(loader, max_epochs=1)[1] for loader in loaders)
    # Gathered on the device or sent: other programs around the same numbers.
    for name, array in of_list.items():
        np.testing.assert_allclose(of_arrays[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


class OneBuffer:
    """A loader that fills the same arrays again for each batch."""

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self):
        buffer = {k: np.empty_like(a) for k, a in tiny.make_batches(1)[0].items()}
        for batch in tiny.make_batches(EPOCH):
            for name, array in buffer.items():
                array[:] = batch[name]
            yield buffer


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_reading_ahead_leaves_the_batches_of_a_reused_buffer_alone(steps: int):
    options: Any = {"max_epochs": 1, "steps_per_dispatch": steps}
    _, reused = tiny.fit(OneBuffer(), **options)
    _, expected = tiny.fit(tiny.make_batches(EPOCH), **options)
    tiny.assert_same_bits(reused, expected)


@pytest.mark.parametrize("epoch", [0, 1])
def test_batch_start_skips_the_rest_of_the_epoch(epoch: int):
    starts, outputs = Starts(skip_at=(epoch, 5)), Outputs()
    result, _ = tiny.fit(callbacks=[starts, outputs], max_epochs=3, log_every_n_steps=1)
    batches = [5 if e == epoch else EPOCH for e in range(3)]
    assert [index for index, _ in outputs.seen] == [i for n in batches for i in range(n)]
    assert (result.num_epochs, result.num_steps) == (3, sum(batches))
    means = [np.mean([loss for _, loss in part]) for part in _parts(outputs.seen, batches)]
    # The epoch's mean is that of the batches that ran, to the rounding of a float32 sum.
    np.testing.assert_allclose(result.history.epoch["train/loss"].values, means, rtol=1e-6)


def _parts(items: list[Any], sizes: list[int]) -> list[list[Any]]:
    ends = np.cumsum(sizes)
    return [items[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def test_batch_start_that_skips_a_whole_epoch_leaves_no_mean_of_it():
    starts = Starts(skip_at=(1, 0))
    result, _ = tiny.fit(callbacks=[starts], max_epochs=3)
    assert result.num_steps == 2 * EPOCH
    assert result.history.epoch["train/loss"].epochs == [0, 2]


def test_batch_start_that_skips_ends_the_epoch_for_checkpoints(tmp_path: Path):
    saver = Checkpoint(tmp_path, save_top_k=-1)
    whole = tiny.fit(callbacks=[Starts(skip_at=(0, 5)), saver], max_epochs=2)
    _, state = tiny.fit(ckpt_path=tmp_path / "step_5", max_epochs=2)
    tiny.assert_same_bits(state, whole[1])


def test_batch_start_does_not_shorten_the_epochs_that_follow():
    lengths: list[int | None] = []

    class Lengths(Callback):
        def on_train_epoch_start(self, run: Run) -> None:
            lengths.append(run.num_batches)

    loader = tiny.make_batches(EPOCH, ragged=3)
    tiny.fit(loader, callbacks=[Starts(skip_at=(1, 5)), Lengths()], max_epochs=3)
    assert lengths[1:] == [EPOCH, EPOCH]


def test_fused_keeps_batches_on_the_device():
    class Devices(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert isinstance(batch["x"], jax.Array)
            assert isinstance(outputs["loss"], jax.Array)

    result, _ = tiny.fit(callbacks=[Devices()], max_steps=4)
    assert result.num_steps == 4
