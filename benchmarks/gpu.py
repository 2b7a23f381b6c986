"""What is worth knowing on a GPU: how to run several steps at once, the feed, and saving.

loops        one chunk of K batches on the device, run by a `fori_loop` with a runtime count (as
             the trainer does), by `scan`, and by one dispatch a step
MNIST MLP    the trainer at several K, with data on the device and sent from the host, without the
             compilation cache: `first epoch s` is compile + epoch 1
checkpoints  how long training stands still for a save, the one before being on disk already, and
             the copy to the host alone
transformer  of about 100M parameters: the trainer against a jitted step by hand, in float32 and
             bf16-mixed, with the utilisation of the device (MFU)
trade-offs   the same transformer with other precisions, rematerialisation, accumulation and its
             optimiser state on the host: time and memory

    PYTHONPATH=. python benchmarks/gpu.py
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.by_hand import ByHand
from benchmarks.common import interleave, parse, parser, rows_of
from benchmarks.loops import loop_rows
from benchmarks.models import SIZES, achieved, measure
from benchmarks.report import Report
from benchmarks.tradeoffs import tradeoff_rows
from benchmarks.trained import Module, loader, trained
from benchmarks.transformer import Size, transformer
from benchmarks.workloads import Batch, Workload, linear, mnist_cnn, mnist_mlp
from jaxtrainer import Trainer
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.peaks import Arithmetic, peak_of


def mnist_rows(sizes: Sequence[int], rounds: int, epochs: int) -> list[dict[str, Any]]:
    workload = mnist_mlp(256)
    hand = ByHand(workload, epochs)
    fit = functools.partial(trained, workload, epochs, compilation_cache=False)
    runs: dict[str, Callable[[], Any]] = {"trainer": fit}
    runs["trainer, no ckpt"] = functools.partial(fit, checkpoint=False)
    for feed, from_host in (("device", False), ("host", True)):
        given = functools.partial(fit, from_host=from_host, checkpoint=False)
        for k in sizes:
            runs[f"from {feed}, K = {k}"] = functools.partial(given, steps_per_dispatch=k)
    runs |= {"loop": hand.loop, "limit": hand.limit}
    return rows_of(interleave(runs, rounds), workload.num_batches, ("loop", "limit"))


class TimedCheckpoint(Checkpoint):
    """Notes how long each save kept the loop, and then lets it come to its end."""

    def __init__(self, dirpath: str, pause_s: float) -> None:
        super().__init__(dirpath)
        self.pause_s = pause_s
        self.seconds: list[float] = []

    def on_save_point(self, run: Any) -> None:
        before, began = run.last_checkpoint, time.perf_counter()
        super().on_save_point(run)
        if run.last_checkpoint != before:
            self.seconds.append(time.perf_counter() - began)
            time.sleep(self.pause_s)


def checkpoint_row(size_mb: float, epochs: int) -> dict[str, Any]:
    """Save a state of that size, each time after the one before is on disk."""
    shape = (8, int(size_mb * 1e6 / 32))

    def loss(params: dict, batch: Batch) -> tuple[jax.Array, None]:
        return jnp.mean(params["w"] ** 2) + 0 * jnp.mean(batch["x"]), None

    workload = Workload(
        init=lambda key: {"w": jnp.ones(shape)},
        loss=loss,
        tx=optax.sgd(0.1),
        arrays={"x": np.zeros((64, 1), np.float32)},
        batch_size=8,
    )
    module = Module(workload)
    with tempfile.TemporaryDirectory() as folder:
        saver = TimedCheckpoint(f"{folder}/run", max(0.5, size_mb / 100))
        trainer = Trainer(
            max_epochs=epochs,
            callbacks=saver,
            enable_progress_bar=False,
            compilation_cache=False,
        )
        trainer.fit(module, loader(workload))
    weights = jax.block_until_ready(module.model.params()["w"] + 0)
    began = time.perf_counter()
    np.asarray(weights)
    copy_s = time.perf_counter() - began
    first, *later = saver.seconds
    return {
        "state MB": f"{size_mb:g}",
        "first save ms": 1e3 * first,
        "later ms": 1e3 * median(later),
        "copy to host ms": 1e3 * copy_s,
        "GB/s": weights.nbytes / copy_s / 1e9,
    }


def add_transformer(report: Report, size: Size, args: Any) -> None:
    """The trainer against the step by hand in two precisions, and what saves memory."""
    batch_size, steps = args.batch_size, args.transformer_steps
    peak = peak_of(jax.devices()[0].device_kind)
    what = f"transformer, {size.num_params / 1e6:.3g} M parameters, batch {batch_size} x {size.seq}"
    kinds: dict[str, Arithmetic] = {"32-true": "tf32", "bf16-mixed": "bf16"}
    for name, rate in kinds.items():
        workload = transformer(size, batch_size, steps, bf16=name == "bf16-mixed")
        rows = measure(workload, args.rounds, args.epochs, limit=False)
        report.add(f"{what}, {name}", rows)
        rate_of_device = peak.of(rate) if peak else None
        tflops = rate_of_device / 1e12 if rate_of_device else None
        report.add(f"{name}: achieved", achieved(rows, batch_size * size.seq, size, tflops))
    of_settings = size, batch_size, steps, min(args.rounds, 3), args.epochs
    report.add(f"{what}: trade-offs", tradeoff_rows(*of_settings))


def main(argv: Sequence[str] | None = None) -> Report | None:
    options = parser(__doc__)
    options.add_argument("--anyway", action="store_true", help="also without a GPU")
    options.add_argument("--steps", type=int, default=2048, help="steps of a timed loop")
    options.add_argument("--sizes", type=int, nargs="+", help="K", default=[1, 8, 32, 128])
    options.add_argument("--states-mb", type=float, nargs="+", default=[1, 100, 1000])
    options.add_argument("--size", choices=[*SIZES], default="large", help="of the transformer")
    options.add_argument("--batch-size", type=int, default=16, help="of the transformer")
    options.add_argument("--transformer-steps", type=int, default=20, help="steps of an epoch")
    args = parse(options, argv, rounds=5)
    if jax.default_backend() != "gpu" and not args.anyway:
        print(f"needs a GPU, here is {jax.default_backend()}; --anyway runs it all the same")
        return None
    report = Report(name="gpu", as_json=args.json)
    models = {"10x10 linear": linear(num_batches=128), "MLP, batch 256": mnist_mlp(256)}
    models["CNN, batch 64"] = mnist_cnn()
    for name, workload in models.items():
        rows = loop_rows(workload, args.sizes, args.steps, args.rounds)
        report.add(f"{name}: us a step", rows)
    report.add("MNIST MLP, batch 256", mnist_rows(args.sizes, args.rounds, args.epochs))
    rows = [checkpoint_row(size, max(args.epochs, 3)) for size in args.states_mb]
    report.add("checkpoints", rows)
    add_transformer(report, SIZES[args.size], args)
    report.finish()
    return report


if __name__ == "__main__":
    main()
