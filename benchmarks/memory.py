"""Peak memory, and growth over many steps, each run in a process of its own.

peak MB         the most that the process ever had, usually while it compiled
end MB          what it has after training
data MB         the most before training: imports, and the data set in NumPy
bytes/step      slope of the resident memory over the steps, without the first quarter
live arrays     JAX arrays at the epochs' starts: fewest and most, likewise
threads         the same

    PYTHONPATH=. python benchmarks/memory.py
"""

from __future__ import annotations

import functools
import gc
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import child, interleave, parse, parser, peak_rss_mb
from benchmarks.report import Report

PEAKS = ("trainer", "trainer, no ckpt", "trainer, host feed", "loop", "limit")
GROWTHS = ("trainer", "trainer, no ckpt", "loop")
EPOCH = 250
"""Steps between two samples of a growing process."""


def peak(run: str) -> dict[str, float]:
    from benchmarks.by_hand import ByHand
    from benchmarks.trained import trained
    from benchmarks.workloads import mnist_mlp

    workload, before = mnist_mlp(256, 100), peak_rss_mb()
    if run in ("loop", "limit"):
        getattr(ByHand(workload, 1), run)()
    else:
        trained(workload, 1, checkpoint="no ckpt" not in run, from_host="host" in run)
    return {"peak MB": peak_rss_mb(), "end MB": _rss_bytes() / 1e6, "data MB": before}


def growth(run: str, steps: int) -> dict[str, Any]:
    """Train a 10x10 linear model for that many steps and sample at each epoch's start."""
    import jax

    from benchmarks.by_hand import ByHand
    from benchmarks.trained import trained
    from benchmarks.workloads import linear
    from jaxtrainer import Callback

    samples: list[tuple[int, int, int]] = []

    class Sampler(Callback):
        def on_train_epoch_start(self, run: Any) -> None:
            gc.collect()
            samples.append((_rss_bytes(), len(jax.live_arrays()), threading.active_count()))

    class Watched(ByHand):
        def _order(self, rng: Any) -> Any:
            sampler.on_train_epoch_start(None)
            return super()._order(rng)

    workload, epochs, sampler = linear(num_batches=EPOCH), steps // EPOCH, Sampler()
    if run == "loop":
        Watched(workload, epochs - 1).loop()
    else:
        trained(workload, epochs - 1, checkpoint="no ckpt" not in run, callbacks=[sampler])
    return trend(samples)


def trend(samples: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    import numpy as np

    late = np.array(samples[len(samples) // 4 :])
    slope = np.polyfit(EPOCH * np.arange(len(late)), late[:, 0], 1)[0]
    (_, *low), (_, *high) = late.min(axis=0), late.max(axis=0)
    arrays, threads = (f"{a} to {b}" for a, b in zip(low, high, strict=True))
    return {"bytes/step": float(slope), "live arrays": arrays, "threads": threads}


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rows(results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for run, runs in results.items():
        row: dict[str, Any] = {"run": run}
        row |= {key: median(r[key] for r in runs) for key in runs[0]}
        pairs = zip(runs, results["loop"], strict=True)
        rows.append(row | {"/ loop": median(a["peak MB"] / b["peak MB"] for a, b in pairs)})
    return rows


def run_child(task: str) -> None:
    what, run, steps = json.loads(task)
    print(json.dumps(peak(run) if what == "peak" else growth(run, steps)))


def main(argv: Sequence[str] | None = None) -> Report | None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, help="of a growing process")
    args = parse(options, argv, rounds=3, short=1)
    if args.child:
        return run_child(args.child)
    steps = args.steps or (5000 if args.short else 20_000)
    report = Report(name="memory", as_json=args.json)

    def tasks(what: str, runs: Sequence[str]) -> dict[str, Any]:
        return {r: functools.partial(child, __file__, json.dumps([what, r, steps])) for r in runs}

    results = interleave(tasks("peak", PEAKS), args.rounds)
    report.add("MNIST MLP, batch 256, 2 epochs of 100 steps", peak_rows(results))
    grown = {run: task() for run, task in tasks("growth", GROWTHS).items()}
    rows = [{"run": run, **trend} for run, trend in grown.items()]
    report.add(f"10x10 linear, {steps} steps, epochs of {EPOCH}", rows)
    report.finish()
    return report


if __name__ == "__main__":
    main()
