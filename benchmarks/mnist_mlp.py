"""Epochs of the MNIST MLP: the trainer against a loop by hand and against the device's limit.

trainer     bar, Timer, Accuracy, and a checkpoint every epoch; data on the device where it fits
no ckpt     the same without Checkpoint
host feed   the same with every batch sent from the host
loop        a jitted, donated step for each batch, gathered by NumPy
limit       data on the device, one scan an epoch

    PYTHONPATH=. python benchmarks/mnist_mlp.py --batch-sizes 256 --rounds 9
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from benchmarks.by_hand import ByHand
from benchmarks.common import interleave, parse, parser, rows_of
from benchmarks.report import Report
from benchmarks.trained import trained
from benchmarks.workloads import mnist_mlp

BATCH_SIZES = (8, 32, 256, 1024, 4096)
MAX_BATCHES = 2000


def measure(report: Report, batch_size: int, *, rounds: int, epochs: int) -> None:
    workload = mnist_mlp(batch_size, MAX_BATCHES)
    hand = ByHand(workload, epochs)
    trainer = functools.partial(trained, workload, epochs)
    runs = {
        "trainer": trainer,
        "trainer, no ckpt": functools.partial(trainer, checkpoint=False),
        "trainer, host feed": functools.partial(trainer, from_host=True),
        "loop": hand.loop,
        "limit": hand.limit,
    }
    results = interleave(runs, rounds)
    steps = workload.num_batches
    title = f"MNIST MLP, batch {batch_size}, {steps} steps an epoch"
    report.add(title, rows_of(results, steps, ("loop", "limit")))


def main(argv: Sequence[str] | None = None) -> Report:
    options = parser(__doc__)
    options.add_argument("--batch-sizes", type=int, nargs="+")
    args = parse(options, argv, rounds=7)
    sizes = args.batch_sizes or ((32, 256) if args.short else BATCH_SIZES)
    report = Report(name="mnist_mlp", as_json=args.json)
    for batch_size in sizes:
        measure(report, batch_size, rounds=args.rounds, epochs=args.epochs)
    report.finish()
    return report


if __name__ == "__main__":
    main()
