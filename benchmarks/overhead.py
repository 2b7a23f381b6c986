"""What the trainer adds to a step: a 10x10 linear model, which is next to no maths.

trainer     all defaults on; fused if that was measured to be faster
K = 1       the same with one dispatch a step
limit       one scan an epoch: what fused steps are compared with
bare        the jitted step called on batches that lie on the device: for K = 1
loop        the same with batches gathered by NumPy

Epochs are short here, so that the cost of saving at their ends is spread over few steps: the rows
without Checkpoint show what a step costs.

    PYTHONPATH=. python benchmarks/overhead.py
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from benchmarks.by_hand import ByHand
from benchmarks.common import added_us, interleave, parse, parser, rows_of
from benchmarks.report import Report
from benchmarks.trained import trained
from benchmarks.workloads import linear

PAIRS = (
    ("trainer", "limit"),
    ("trainer, no ckpt", "limit"),
    ("K = 1", "bare"),
    ("K = 1, no ckpt", "bare"),
    ("loop", "bare"),
)


def measure(report: Report, steps: int, *, rounds: int, epochs: int, **options: Any) -> None:
    """Add both tables; `options` go to `Trainer`."""
    workload = linear(num_batches=steps)
    hand = ByHand(workload, epochs)
    trainer = functools.partial(trained, workload, epochs, **options)
    single = functools.partial(trainer, steps_per_dispatch=1)
    runs = {
        "trainer": trainer,
        "trainer, no ckpt": functools.partial(trainer, checkpoint=False),
        "limit": hand.limit,
        "K = 1": single,
        "K = 1, no ckpt": functools.partial(single, checkpoint=False),
        "bare": hand.bare,
        "loop": hand.loop,
    }
    results = interleave(runs, rounds)
    title = f"10x10 linear, {steps} steps an epoch"
    report.add(title, rows_of(results, steps, ("limit", "bare")))
    added = [{"run": a, "over": b, "us/step": added_us(results, a, b, steps)} for a, b in PAIRS]
    report.add("added time", added)


def main(argv: Sequence[str] | None = None) -> Report:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, help="steps of an epoch")
    args = parse(options, argv, rounds=7)
    report = Report(name="overhead", as_json=args.json)
    steps = args.steps or (4000 if args.short else 20_000)
    measure(report, steps, rounds=args.rounds, epochs=args.epochs)
    report.finish()
    return report


if __name__ == "__main__":
    main()
