"""A program for `test_process_data`: reads, evaluates and predicts in as many processes as there are.

The step itself writes down what it sees: a number that changes with each sample's place in the
batch, so that two runs have the same numbers only if each batch has the same samples in order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxtrainer import data, distributed
from jaxtrainer.callbacks import Checkpoint, PredictionWriter
from jaxtrainer.errors import JaxTrainerError
from tests import tiny
from tests.cluster import say

MESH = {"data": -1}
SIZE, ROWS = 16, 64


class Watching(tiny.Tiny):
    """Logs the order of the samples in each batch, which have their number as label."""

    def __init__(self) -> None:
        super().__init__(tiny.line)

    def training_step(self, model: Any, batch: Any) -> Any:
        places = jnp.arange(1, len(batch["id"]) + 1)
        self.log("order", (batch["id"] * places).sum().astype(jnp.float32), on_epoch=False)
        return (model(batch["x"]) ** 2).mean()

    def validation_step(self, model: Any, batch: Any) -> Any:
        self.log("mean_id", batch["id"].astype(jnp.float32).mean())
        self.log("most", batch["x"].max(), reduce="max")

    def predict_step(self, model: Any, batch: Any) -> Any:
        return {"id": batch["id"], "x": batch["x"][:, :2] * 2}


def arrays(rows: int = ROWS) -> dict[str, np.ndarray]:
    x = np.random.default_rng(5).normal(size=(rows, tiny.FEATURES)).astype(np.float32)
    return {"x": x, "id": np.arange(rows, dtype=np.int32)}


class Records:
    """Single records, as Grain wants them; notes which were read."""

    def __init__(self, rows: int = ROWS) -> None:
        self.arrays, self.read = arrays(rows), set()

    def __len__(self) -> int:
        return len(self.arrays["id"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.add(index)
        return {name: array[index] for name, array in self.arrays.items()}


class Stream:
    """Batches of which nobody knows how many there are."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def batches(rows: int = ROWS, size: int = SIZE) -> list[Any]:
    whole = arrays(rows)
    return [{k: a[i : i + size] for k, a in whole.items()} for i in range(0, rows, size)]


def own_part() -> list[Any]:
    """This process's part of each of `batches()`."""
    index, count = distributed.index(), distributed.count()
    rows = slice(index * SIZE // count, (index + 1) * SIZE // count)
    return [{k: a[rows] for k, a in batch.items()} for batch in batches()]


def loader(kind: str, rows: int = ROWS) -> Any:
    """A loader of one kind; of all kinds the batches are the same."""
    match kind:
        case "resident" | "gathered":
            resident = kind == "resident"
            return data.from_arrays(arrays(rows), batch_size=SIZE, device_resident=resident)
        case "shuffled":
            return data.from_arrays(arrays(rows), batch_size=SIZE, shuffle=True, seed=3)
        case "records":
            return grain.MapDataset.source(Records(rows)).batch(SIZE)
        case "own":
            return data.process_local(Stream(own_part()))
        case "stream":
            return Stream(batches(rows))
        case _:
            return batches(rows)


def order(kind: str, **options: Any) -> list[float]:
    result, _ = tiny.fit(
        loader(kind), module=Watching(), mesh=MESH, log_every_n_steps=1, max_epochs=2, **options
    )
    return list(result.history["train/order"].values)


def trained(*kinds: str) -> None:
    """Train on loaders of some kinds, and say the order of their samples."""
    say(**{kind: order(kind) for kind in kinds})


def evaluated(kind: str, *ragged: str) -> None:
    """Evaluate and predict with last batches of some sizes; say what came out."""
    module = Watching()
    for last in map(int, ragged):
        trainer = tiny.make_trainer(mesh=MESH)
        got = loader(kind, 2 * SIZE + last)
        values = trainer.validate(module, got, verbose=False)
        rows = [part["id"].tolist() for part in trainer.predict(module, got)]
        say(**{f"metrics_{last}": values, f"rows_{last}": rows})


def written(folder: str) -> None:
    """Predict to disk."""
    trainer = tiny.make_trainer(PredictionWriter(folder), mesh=MESH)
    say(returned=trainer.predict(Watching(), loader("list", 2 * SIZE + 5)))


def seen() -> None:
    """Say which records of a Grain dataset this process has read in two batches."""
    source = Records()
    dataset = grain.MapDataset.source(source).batch(SIZE)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    del options
    tiny.fit(dataset, module=Watching(), mesh=MESH, max_epochs=1)
    say(read=sorted(source.read))


def resumed(folder: str, kind: str, until: str) -> None:
    """Train to a step from the newest checkpoint of a folder, if it has one."""
    saver = Checkpoint(folder, every_n_train_steps=1, save_top_k=-1)
    at = "last" if Path(folder).is_dir() and [*Path(folder).glob("step_*")] else None
    result, _ = tiny.fit(
        loader(kind),
        module=Watching(),
        mesh=MESH,
        callbacks=[saver],
        log_every_n_steps=1,
        max_steps=int(until),
        ckpt_path=at,
    )
    say(order=list(result.history["train/order"].values))


def refused() -> None:
    """Say how loaders that differ between the processes are refused."""
    index = distributed.index()
    whole, part = batches(), own_part()
    wrong = {
        "other_seed": data.from_arrays(arrays(), batch_size=SIZE, shuffle=True, seed=index),
        "own_unmarked": Stream([*part, *part]),
        "shorter_list": whole[: 4 - index],
        "shorter_stream": Stream(whole[: 4 - index]),
        "later_change": Stream(whole[:2] + [whole[2 + index]]),
        "marked_twice": data.process_local(Stream([*whole])),
        "one_is_empty": whole if index == 0 else [],
        "one_fails": Stream([*whole[:2], {"x": whole[0]["x"]}] if index else whole),
    }
    for name, bad in wrong.items():
        try:
            tiny.fit(bad, module=Watching(), mesh=MESH, max_epochs=2, steps_per_dispatch=1)
            say(**{name: "trained"})
        except JaxTrainerError as error:
            say(**{name: str(error)})


def looked() -> None:
    """Say what a callback sees of a batch."""
    from jaxtrainer import Callback

    class Look(Callback):
        def on_train_batch_end(self, run: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rows.append(np.asarray(batch["id"]).tolist())
            losses.append(float(outputs["loss"]))

        def on_predict_batch_end(self, run: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rows.append(np.asarray(batch["id"]).tolist())

    for kind in ("resident", "list"):
        rows: list[Any] = []
        losses: list[float] = []
        trainer = tiny.make_trainer(Look(), mesh=MESH, max_epochs=1)
        trainer.fit(module := Watching(), loader(kind))
        trainer.predict(module, loader(kind, SIZE + 5))
        say(**{f"{kind}_rows": rows, f"{kind}_losses": losses})


if __name__ == "__main__":
    say(count=distributed.count(), devices=jax.device_count())
    for call in " ".join(sys.argv[1:]).split(","):
        name, *rest = call.split()
        globals()[name](*rest)
