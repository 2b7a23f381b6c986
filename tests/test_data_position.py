"""The position in the data is an index of samples: a resume that would shift it is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.errors import CheckpointMismatchError
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

ROWS = 48
SIZES = (3, 4, 8, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Any]]:
    """For each batch size a checkpoint after two steps, and the state after four."""
    runs = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp(f"of_{size}")
        loader = tiny.make_loader(ROWS, size)
        saver = Checkpoint(folder, every_n_train_steps=2, save_top_k=-1)
        _, state = tiny.fit(loader, callbacks=[saver], max_steps=4)
        runs[size] = folder / "step_2", state
    return runs


@pytest.mark.parametrize(("before", "after"), [*itertools.product(SIZES, SIZES)])
def test_resume_with_another_batch_size_is_refused(saved: Any, before: int, after: int):
    path, want = saved[before]
    loader = tiny.make_loader(ROWS, after)
    if before == after:
        _, state = tiny.fit(loader, ckpt_path=path, max_steps=4)
        tiny.assert_same_bits(state, want)
        return
    with pytest.raises(CheckpointMismatchError) as caught:
        tiny.fit(loader, ckpt_path=path, max_steps=4)
    assert f"batch_size={before}, now it is {after}: the position in the data" in str(caught.value)


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        (tiny.make_loader(ROWS, 8, seed=1), "seed=0, now it is 1"),
        (tiny.make_loader(2 * ROWS, 8), "num_samples=48, now it is 96"),
        (tiny.make_batches(6, 4), "batch_size=8, now it is 4"),
    ],
    ids=["seed", "samples", "other_loader"],
)
def test_resume_with_other_samples_is_refused(saved: Any, loader: Any, name: str):
    with pytest.raises(CheckpointMismatchError, match=name):
        tiny.fit(loader, ckpt_path=saved[8][0], max_steps=4)


class Records:
    """A source of single records, as Grain wants it."""

    def __repr__(self) -> str:
        return "Records()"

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in tiny.make_arrays(ROWS).items()}


def grain_loader(workers: int = 0, seed: int = 3) -> Any:
    sampler = grain.samplers.IndexSampler(
        ROWS, grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=seed
    )
    batches = [grain.transforms.Batch(8, drop_remainder=True)]
    return grain.DataLoader(
        data_source=Records(), sampler=sampler, operations=batches, worker_count=workers
    )


@pytest.mark.parametrize(
    ("options", "part"),
    [({"workers": 2}, "Worker count in checkpoint does not match"), ({"seed": 4}, "Sampler in")],
    ids=["workers", "seed"],
)
def test_resume_of_a_loader_that_cannot_go_back_is_refused(options: Any, part: str, tmp_path: Path):
    tiny.fit(grain_loader(), callbacks=[Checkpoint(tmp_path)], max_steps=2)
    with pytest.raises(CheckpointMismatchError, match=f"DataLoaderIterator.*{part}") as caught:
        tiny.fit(grain_loader(**options), ckpt_path=tmp_path, max_steps=4)
    assert "one number of workers" in str(caught.value)


@pytest.mark.parametrize("size", [4, 8, 12])
def test_order_of_samples_is_that_of_any_batch_size(size: int):
    whole, parts = tiny.make_loader(ROWS, ROWS), tiny.make_loader(ROWS, size)
    read = np.concatenate([parts[i]["x"] for i in range(2 * len(parts))])
    np.testing.assert_array_equal(read, np.concatenate([whole[0]["x"], whole[1]["x"]]))
