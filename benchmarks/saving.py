"""What saving costs: Orbax alone, item by item, and the store's saves and restores by size.

CPU ms      time of all threads of the process for one save
ms          until the save was complete on disk
blocked ms  how long the training loop waits for a save to start (the store)
restore ms  reading it back onto the device (the store)

    PYTHONPATH=. python benchmarks/saving.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import parse, parser
from benchmarks.report import Report
from jaxtrainer.checkpoint import restore_state
from jaxtrainer.state import TrainState
from jaxtrainer.store import CheckpointStore, Snapshot

SIZES_MB = (1, 100, 1000)
SHAPES: dict[str, dict[str, int]] = {
    "JSON only": {},
    "1 item of 1 array": {"params": 1},
    "1 item of 24 arrays": {"params": 24},
    "2 items of 12 arrays": {"params": 12, "opt_state": 12},
    "3 items of 8 arrays": {"params": 8, "opt_state": 8, "model_state": 8},
}


def timed(job: Callable[[], Any]) -> tuple[float, float]:
    """Return `(wall, CPU)` milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def by_orbax(items: dict[str, int], rounds: int) -> dict[str, float]:
    """Save 1.6 MB of arrays, the state of the MNIST MLP, without the trainer."""
    import orbax.checkpoint as ocp

    total = max(1, sum(items.values()))
    array = np.zeros(400_000 // total, np.float32)
    trees = {name: {str(i): array for i in range(n)} for name, n in items.items()}
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:

        def save(step: int) -> None:
            args = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
            args["record"] = ocp.args.JsonSave({"step": step})
            manager.save(step, args=ocp.args.Composite(**args))
            manager.wait_until_finished()

        times = [timed(lambda step=step: save(step)) for step in range(rounds + 2)][2:]
    return {"CPU ms": median(t[1] for t in times), "ms": median(t[0] for t in times)}


def state_of(size_mb: int) -> TrainState:
    """A state whose parameters and two moments make up the size, in 8 arrays each."""
    length = max(1, size_mb * 1_000_000 // (3 * 8 * 4))
    params = {str(i): jnp.full((length,), i, jnp.float32) for i in range(8)}
    return TrainState(
        batch_count=jnp.int32(0),
        params=params,
        model_state={},
        opt_state={"default": {name: jax.tree.map(jnp.copy, params) for name in ("mu", "nu")}},
        rng=jnp.zeros(2, jnp.uint32),
        totals=jnp.zeros((4, 1)),
        accumulated={},
        averaged={},
        guard={},
    )


def by_store(size_mb: int, rounds: int) -> dict[str, Any]:
    state, record = jax.block_until_ready(state_of(size_mb)), {"format_version": 1}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    blocked, done, restored = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "run")
        for step in range(1, rounds + 2):
            replaces = [step - 1] if step > 1 else []
            began = time.perf_counter()
            store.save(step, Snapshot(state=state, record=record), replaces)
            blocked.append(1e3 * (time.perf_counter() - began))
            store.wait()
            done.append(1e3 * (time.perf_counter() - began))
            path = store.path(step)
            restored.append(timed(lambda path=path: restore_state(path, target))[0])
        store.close()
    # The first save of a process imports Orbax and starts its threads.
    late = {"blocked ms": blocked, "ms": done, "restore ms": restored}
    return {"MB": str(size_mb), **{name: median(times[1:]) for name, times in late.items()}}


def main(argv: Sequence[str] | None = None) -> Report:
    args = parse(parser(__doc__), argv, rounds=7)
    report = Report(name="saving", as_json=args.json)
    rows = [{"saved": name, **by_orbax(items, args.rounds)} for name, items in SHAPES.items()]
    report.add("Orbax alone, 1.6 MB in NumPy arrays", rows)
    sizes = SIZES_MB[:2] if args.short else SIZES_MB
    report.add("the store, arrays on the device", [by_store(mb, args.rounds) for mb in sizes])
    report.finish()
    return report


if __name__ == "__main__":
    main()
