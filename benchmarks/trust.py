"""What trust costs: digests of a save, the look at non-finite numbers, and a resume.

digests ms      of one save, on the writer's thread
on disk ms      the whole save
verified ms     a restore that compares the digests
NonFinite       the MNIST MLP with the callback, against the same without
fresh, resumed  `fit` to the end of the first dispatch, from nothing and from a checkpoint

    PYTHONPATH=. python benchmarks/trust.py
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks.common import Block, interleave, parse, parser, ratio, rows_of
from benchmarks.report import Report
from benchmarks.saving import SIZES_MB, state_of, timed
from benchmarks.trained import Module, loader, trained, trainer_options
from benchmarks.workloads import mnist_mlp
from jaxtrainer import Callback, Trainer
from jaxtrainer.callbacks import Checkpoint, NonFinite
from jaxtrainer.checkpoint import items_of, restore_state
from jaxtrainer.manifest import THREADS, damaged, manifest_of
from jaxtrainer.store import HOST_COPY_BYTES, CheckpointStore, Snapshot


def of_digests(size_mb: int, rounds: int) -> dict[str, Any]:
    """Time the digests by themselves beside the save and the restore that they are part of."""
    state, record = jax.block_until_ready(state_of(size_mb)), {"format_version": 1}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    items = jax.device_get(items_of(state))
    manifest = manifest_of(items)
    # Of a state that is too large for a second copy somebody waits for the digests.
    threads = 1 if size_mb * 1_000_000 <= HOST_COPY_BYTES else THREADS
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "run")
        for step in range(1, rounds + 2):

            def save(step: int = step) -> None:
                store.save(step, Snapshot(state=state, record=record), [step - 1])
                store.wait()

            jobs = {
                "digests ms": lambda: manifest_of(items, threads),
                "on disk ms": save,
                "compared ms": lambda: damaged(items, manifest),
                "verified ms": lambda step=step: restore_state(store.path(step), target),
            }
            for name, job in jobs.items():
                times.setdefault(name, []).append(timed(job)[0])
        store.close()
    # The first save of a process imports Orbax and starts its threads.
    found = {name: median(values[1:]) for name, values in times.items()}
    part = found["digests ms"] / found["on disk ms"]
    return {"MB": str(size_mb), **found, "digests / on disk": part}


class _First(Callback):
    """Notes when the first dispatch has ended, and ends the run there."""

    def __init__(self) -> None:
        self.at = 0.0

    def on_save_point(self, run: Any) -> None:
        jax.block_until_ready(run.state)
        self.at = self.at or time.perf_counter()
        run.stop("first step done")


def to_first_step(folder: Path, *, resumes: bool) -> Block:
    """Time `fit` to its first step, with programs from the cache."""
    first, workload = _First(), mnist_mlp(256)
    saved = Checkpoint(folder / "run" if resumes else folder / f"fresh-{time.monotonic_ns()}")
    options = {"enable_progress_bar": False, **trainer_options(workload)}
    trainer = Trainer(max_epochs=100, callbacks=[first, saved], **options)
    module, source = Module(workload), loader(workload)
    began = time.perf_counter()
    result = trainer.fit(module, source, ckpt_path="last" if resumes else None)
    return Block(
        epoch_s=first.at - began,
        first_s=result.timings.get("restore", 0.0),
        loss=1.0,
    )


def of_resume(rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder, workload = Path(name), mnist_mlp(256)
        options = {"enable_progress_bar": False, **trainer_options(workload)}
        saved = Checkpoint(folder / "run")
        Trainer(max_epochs=1, callbacks=[saved], **options).fit(Module(workload), loader(workload))
        runs = {
            "fresh": functools.partial(to_first_step, folder, resumes=False),
            "resumed": functools.partial(to_first_step, folder, resumes=True),
        }
        results = interleave(runs, rounds)
    return [
        {
            "run": name,
            "ms to first step": 1e3 * median(b.epoch_s for b in blocks),
            "of which restore ms": 1e3 * median(b.first_s for b in blocks),
            "/ fresh": ratio(results, name, "fresh"),
        }
        for name, blocks in results.items()
    ]


def main(argv: Sequence[str] | None = None) -> Report:
    args = parse(parser(__doc__), argv, rounds=7)
    report = Report(name="trust", as_json=args.json)
    sizes = SIZES_MB[:2] if args.short else SIZES_MB
    report.add("digests of a save", [of_digests(mb, args.rounds) for mb in sizes])
    options: dict[str, Any] = {"enable_progress_bar": False, "steps_per_dispatch": 32}
    epochs = functools.partial(trained, mnist_mlp(256), args.epochs, **options)
    runs = {
        "without": lambda: epochs(only=[]),
        "NonFinite": lambda: epochs(only=[NonFinite()]),
    }
    results = interleave(runs, args.rounds)
    report.add("a look at every batch", rows_of(results, mnist_mlp(256).num_batches, ["without"]))
    report.add("MNIST MLP, programs from the cache", of_resume(args.rounds))
    report.finish()
    return report


if __name__ == "__main__":
    main()
