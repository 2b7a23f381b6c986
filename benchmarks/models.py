"""A small CNN and a transformer, against the jitted loop by hand.

The options are about the transformer; --size large is one of 110 million parameters, for GPUs.
The second table is what the device achieved: tokens and TFLOP a second, and with --peak-tflops
the utilisation (MFU).

    PYTHONPATH=. python benchmarks/models.py
    PYTHONPATH=. python benchmarks/models.py --size large --attention cudnn --peak-tflops 989
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from benchmarks.by_hand import ByHand
from benchmarks.common import interleave, parse, parser, rows_of
from benchmarks.report import Report
from benchmarks.trained import trained
from benchmarks.transformer import Size, transformer
from benchmarks.workloads import Workload, mnist_cnn

SIZES = {
    "tiny": Size(layers=2, width=16, heads=2, seq=16, vocab=32),
    "small": Size(),
    "large": Size(layers=12, width=768, heads=12, seq=1024, vocab=32_768),
}


def measure(workload: Workload, rounds: int, epochs: int, *, limit: bool) -> list[dict[str, Any]]:
    hand = ByHand(workload, epochs)
    trainer = functools.partial(trained, workload, epochs)
    runs = {
        "trainer": trainer,
        "trainer, no ckpt": functools.partial(trainer, checkpoint=False),
        "loop": hand.loop,
    }
    if limit:
        runs["limit"] = hand.limit
    results = interleave(runs, rounds)
    references = ("loop", "limit") if limit else ("loop",)
    return rows_of(results, workload.num_batches, references)


def achieved(rows: list[dict[str, Any]], tokens: int, size: Size, peak: float | None) -> list[dict]:
    """The same rows as rates; `tokens` are those of one step."""
    table = []
    for row in rows:
        per_s = tokens / (row["us/step"] * 1e-6)
        tflops = per_s * size.flops_per_token / 1e12
        line = {"run": row["run"], "ms/step": row["us/step"] / 1e3}
        line |= {"tokens/s": per_s, "TFLOP/s": tflops}
        table.append(line | ({"MFU %": 100 * tflops / peak} if peak else {}))
    return table


def main(argv: Sequence[str] | None = None) -> Report:
    options = parser(__doc__)
    options.add_argument("--size", choices=[*SIZES], default="small")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--seq", type=int, help="tokens of a sequence")
    options.add_argument("--steps", type=int, help="steps of an epoch")
    options.add_argument("--precision", choices=["32-true", "bf16-mixed"])
    options.add_argument("--attention", choices=["xla", "cudnn"])
    options.add_argument("--peak-tflops", type=float, help="what the device can do at most")
    options.add_argument("--limit", action="store_true", help="one scan an epoch as well")
    args = parse(options, argv, rounds=5)
    steps = args.steps or (25 if args.short else 100)
    report = Report(name="models", as_json=args.json)
    timed = functools.partial(measure, rounds=args.rounds, epochs=args.epochs, limit=args.limit)

    if args.size == "small":
        cnn = mnist_cnn(max_batches=steps)
        title = f"CNN on MNIST, batch {cnn.batch_size}, {steps} steps an epoch"
        report.add(title, timed(cnn))
    base = SIZES[args.size]
    changed = {"seq": args.seq or base.seq, "attention": args.attention}
    size = Size(**{**vars(base), **changed})
    precision = args.precision or ("bf16-mixed" if args.size == "large" else "32-true")
    workload = transformer(size, args.batch_size, steps, bf16=precision == "bf16-mixed")
    rows = timed(workload)
    what = f"transformer, {size.num_params / 1e6:.3g} M parameters, {precision}"
    report.add(f"{what}, batch {args.batch_size} x {size.seq}, {steps} steps an epoch", rows)
    tokens = args.batch_size * size.seq
    report.add("achieved", achieved(rows, tokens, size, args.peak_tflops))
    report.finish()
    return report


if __name__ == "__main__":
    main()
