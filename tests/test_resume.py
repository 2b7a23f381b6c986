"""By law: a resumed run is the uninterrupted one, bit for bit.

Compared are parameters, optimiser, BatchNorm statistics, Dropout stream, metric totals and the
reported history: equal bytes, no tolerance. The checkpoint of the uninterrupted run is taken at
points where a fused dispatch is cut short, which the resumed run does not cut.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Checkpoint, Timer
from jaxtrainer.checkpoint import find_checkpoint, read_record, saved_steps
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCH = 8
"""Batches an epoch in every run here."""


class StopAt(Callback):
    """Interrupts the run, as Ctrl-C does, after so many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.total_batches >= self.batches:
            run.stop("interrupted")


class Records:
    """A source of single records, as Grain wants it."""

    def __init__(self) -> None:
        self.arrays = tiny.make_arrays(EPOCH * 8)

    def __repr__(self) -> str:
        return "Records()"  # by which Grain knows that it is the same source

    def __len__(self) -> int:
        return EPOCH * 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self.arrays.items()}


def map_dataset() -> Any:
    return grain.MapDataset.source(Records()).seed(3).shuffle().batch(8)


def iter_dataset() -> Any:
    # The filter lets the position in the source run ahead of the number of batches.
    records = grain.MapDataset.source(Records()).repeat(2).shuffle(seed=3)
    odd = records.to_iter_dataset().filter(lambda record: bool(record["x"][0] > 0.0))
    return odd.batch(8, drop_remainder=True)


def data_loader() -> Any:
    sampler = grain.samplers.IndexSampler(
        EPOCH * 8, grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=3
    )
    operations = [grain.transforms.Batch(8, drop_remainder=True)]
    return grain.DataLoader(data_source=Records(), sampler=sampler, operations=operations)


LOADERS: dict[str, Callable[[], Any]] = {
    "arrays": tiny.make_loader,
    "map_dataset": map_dataset,
    "iter_dataset": iter_dataset,
    "data_loader": data_loader,
    "list": tiny.make_batches,
}


def tail(series: dict[str, Any], after: int) -> dict[str, list[Any]]:
    """The points of each series that lie after an optimiser step."""
    return {
        name: [p for p in zip(s.steps, s.epochs, s.values, strict=True) if p[0] > after]
        for name, s in series.items()
    }


def assert_same_future(got: Any, want: Any, after: int) -> None:
    (result, state), (whole, whole_state) = got, want
    tiny.assert_same_bits(state, whole_state)
    assert tail(result.history.epoch, after) == tail(whole.history.epoch, after)
    assert tail(result.history.step, after) == tail(whole.history.step, after)
    assert any(tail(result.history.epoch, after).values())
    assert (result.num_steps, result.num_samples) == (whole.num_steps, whole.num_samples)


def test_resume_from_the_second_epoch_is_the_uninterrupted_run(tmp_path: Path):
    loader, val_loader = tiny.make_loader(), tiny.make_loader(20, shuffle=False)
    saver = Checkpoint(tmp_path, save_top_k=-1)
    whole = tiny.fit(loader, val_loader, callbacks=[saver], max_epochs=4)
    path = tmp_path / f"step_{2 * EPOCH}"
    resumed = tiny.fit(loader, val_loader, ckpt_path=path, max_epochs=4)
    assert_same_future(resumed, whole, after=2 * EPOCH)


@pytest.mark.parametrize("name", LOADERS)
def test_resume_in_the_middle_of_an_epoch_is_the_uninterrupted_run(name: str, tmp_path: Path):
    saver = Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole = tiny.fit(LOADERS[name](), callbacks=[saver], max_epochs=3)
    step = next(s for s in saved_steps(tmp_path) if s > whole[0].num_steps // 3)
    resumed = tiny.fit(LOADERS[name](), ckpt_path=tmp_path / f"step_{step}", max_epochs=3)
    assert_same_future(resumed, whole, after=step)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=["plain", "window"])
def test_resume_of_an_interrupted_run_is_the_uninterrupted_one(options: Any, tmp_path: Path):
    whole = tiny.fit(max_epochs=2, **options)
    # Four batches are one dispatch, and with three to an update they end within a window.
    cut, _ = tiny.fit(callbacks=[Checkpoint(tmp_path), StopAt(4)], max_epochs=2, **options)
    assert cut.stop_reason == "interrupted"
    assert cut.num_samples == 4 * 8
    saver = Checkpoint(tmp_path)
    resumed = tiny.fit(callbacks=[saver], ckpt_path="last", max_epochs=2, **options)
    assert_same_future(resumed, whole, after=cut.num_steps)


def test_endless_dataset_goes_on_from_epoch_to_epoch():
    # Three epochs of 6 batches are the first 18 that it has; the others have 8 an epoch.
    options: Any = {"limit_train_batches": 6, "max_epochs": 3}
    _, epochs = tiny.fit(map_dataset().repeat(), **options)
    _, straight = tiny.fit(map_dataset().repeat(), max_steps=18)
    # The totals alone begin anew with each epoch.
    del epochs[".totals"], straight[".totals"]
    tiny.assert_same_bits(epochs, straight)


def test_resume_within_a_window_keeps_its_gradients(tmp_path: Path):
    saver = Checkpoint(tmp_path)
    _, state = tiny.fit(callbacks=[saver, StopAt(4)], max_epochs=1, accumulate_grad_batches=3)
    sums = [v for name, v in state.items() if ".accumulated['grads']" in name]
    assert sums
    assert all(np.any(v) for v in sums)
    assert state[".accumulated['weight']"] == 8.0


def test_resume_of_a_run_that_has_ended_has_nothing_to_do(tmp_path: Path):
    first, state = tiny.fit(callbacks=[Checkpoint(tmp_path)], max_epochs=1)
    again, same = tiny.fit(callbacks=[Checkpoint(tmp_path)], ckpt_path="last", max_epochs=1)
    tiny.assert_same_bits(same, state)
    assert again.stop_reason == "max_epochs"
    assert (again.num_epochs, again.num_steps) == (first.num_epochs, first.num_steps)
    assert again.metrics == first.metrics
    assert again.last_checkpoint == first.last_checkpoint


@pytest.mark.parametrize(
    "options",
    [{"every_n_epochs": 1}, {"every_n_epochs": 5}, {"every_n_train_steps": 5}],
    ids=["saved_at_epoch_end", "saved_at_train_end", "saved_by_steps"],
)
def test_resume_with_more_epochs_is_the_longer_run(options: Any, tmp_path: Path):
    whole = tiny.fit(max_epochs=2)
    tiny.fit(callbacks=[Checkpoint(tmp_path, **options)], max_epochs=1)
    saver = Checkpoint(tmp_path, **options)
    longer = tiny.fit(callbacks=[saver], ckpt_path="last", max_epochs=2)
    assert_same_future(longer, whole, after=EPOCH)
    assert longer[0].num_epochs == 2


def test_resume_with_more_steps_is_the_longer_run(tmp_path: Path):
    whole = tiny.fit(max_steps=12)
    tiny.fit(callbacks=[Checkpoint(tmp_path)], max_steps=5)
    longer = tiny.fit(callbacks=[Checkpoint(tmp_path)], ckpt_path="last", max_steps=12)
    assert_same_future(longer, whole, after=5)


def test_resume_gives_back_what_a_hook_saved(tmp_path: Path):
    class Remembering(tiny.Tiny):
        loaded: Any = None

        def on_save_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
            checkpoint["best"] = {"at": run.global_step, "value": float("-inf")}

        def on_load_checkpoint(self, run: Run, checkpoint: Any) -> None:
            self.loaded = checkpoint["best"]

    tiny.fit(module=Remembering(), callbacks=[Checkpoint(tmp_path)], max_steps=3)
    module = Remembering()
    tiny.fit(module=module, callbacks=[Checkpoint(tmp_path)], ckpt_path="last", max_steps=4)
    assert module.loaded == {"at": 3, "value": float("-inf")}


def test_resume_goes_on_with_the_timer(tmp_path: Path):
    saver = Checkpoint(tmp_path)
    tiny.fit(callbacks=[Timer(verbose=False), saver], max_epochs=1)
    saved_s = read_record(find_checkpoint(tmp_path))["callbacks"]["Timer"]["elapsed_s"]["train"]
    timer = Timer(verbose=False)
    tiny.fit(callbacks=[timer, Checkpoint(tmp_path)], ckpt_path="last", max_epochs=2)
    start, end = timer.start_time(), timer.end_time()
    assert start is not None
    assert end is not None
    assert saved_s > 0.0
    assert timer.time_elapsed() == pytest.approx(saved_s + end - start, rel=1e-12)


def test_resume_keeps_the_best_checkpoint_of_before(tmp_path: Path):
    # The loss falls, so that under "max" the first epoch stays the best.
    options: Any = {"monitor": "train/loss", "mode": "max"}
    first = Checkpoint(tmp_path, **options)
    tiny.fit(callbacks=[first], max_epochs=1)
    saver = Checkpoint(tmp_path, **options)
    result, _ = tiny.fit(callbacks=[saver], ckpt_path="last", max_epochs=3)
    assert saver.best_model_score == first.best_model_score
    assert result.best_checkpoint == str(tmp_path / f"step_{EPOCH}")
    assert saved_steps(tmp_path) == [EPOCH, 3 * EPOCH]
