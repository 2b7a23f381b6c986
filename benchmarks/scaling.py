"""How the time of a step grows with parameter arrays, logged metrics and callbacks.

Fused is the trainer's default of 32 steps a dispatch, K = 1 one; both without Checkpoint, whose
cost does not depend on the number of steps. A callback that wants the end of each batch is called
once a step, also when steps are fused.

    PYTHONPATH=. python benchmarks/scaling.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.by_hand import ByHand
from benchmarks.common import Block, added_us, interleave, parse, parser, ratio, rows_of
from benchmarks.report import Report
from benchmarks.trained import trained
from benchmarks.workloads import Batch, Params, Workload, linear, mnist_mlp
from jaxtrainer import Callback

FUSED: dict[str, Any] = {"steps_per_dispatch": 32}
SINGLE: dict[str, Any] = {"steps_per_dispatch": 1}


class Idle(Callback):
    """Overrides the hooks of epochs and of every dispatch, and does nothing in them."""

    def on_train_epoch_start(self, run: Any) -> None: ...
    def on_train_epoch_end(self, run: Any) -> None: ...
    def on_save_point(self, run: Any) -> None: ...


class EachBatch(Callback):
    """Overrides the end of each batch, and does nothing there."""

    def on_train_batch_end(self, run: Any, outputs: Any, batch: Any, batch_idx: int) -> None: ...


def many_arrays(count: int, num_batches: int) -> Workload:
    """A linear model, and beside it arrays without a gradient, which are only handed on.

    Updating them would make 10,000 kernels, which XLA compiles for minutes; what the host does
    with an array is the same.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8 * num_batches, 8), np.float32)
    y = x @ np.ones(8, np.float32) + rng.standard_normal(len(x), np.float32)

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, None]:
        return jnp.mean((batch["x"] @ params["0"] - batch["y"]) ** 2), None

    return Workload(
        init=lambda key: {f"{i}": jnp.zeros(8) for i in range(count)},
        loss=loss,
        tx=optax.sgd(0.05),
        arrays={"x": x, "y": y},
        batch_size=8,
    )


def array_rows(count: int, steps: int, rounds: int, epochs: int) -> dict[str, Any]:
    workload = many_arrays(count, steps)
    hand = ByHand(workload, epochs)
    fit = functools.partial(trained, workload, epochs, checkpoint=False)
    runs = {"fused": lambda: fit(**FUSED), "limit": hand.limit}
    runs |= {"K = 1": lambda: fit(**SINGLE), "bare": hand.bare}
    results = interleave(runs, rounds)
    times = {row["run"]: row["us/step"] for row in rows_of(results, steps, ())}
    return {
        "arrays": str(count),
        **times,
        "fused - limit": added_us(results, "fused", "limit", steps),
        "K = 1 - bare": added_us(results, "K = 1", "bare", steps),
    }


def counted(
    title: str, runs: Mapping[int, Callable[..., Block]], steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of us a step for each count, and what that is above the first."""
    fused = {f"{n}": functools.partial(run, **FUSED) for n, run in runs.items()}
    single = {f"{n} K1": functools.partial(run, **SINGLE) for n, run in runs.items()}
    results = interleave(fused | single, rounds)
    times = {row["run"]: row["us/step"] for row in rows_of(results, steps, ())}
    none = next(iter(fused))
    return [
        {
            title: n,
            "fused": times[n],
            "fused, added": added_us(results, n, none, steps),
            "K = 1": times[f"{n} K1"],
            "K = 1, added": added_us(results, f"{n} K1", f"{none} K1", steps),
        }
        for n in fused
    ]


def all_at_once(rounds: int, epochs: int) -> list[dict[str, Any]]:
    """20 callbacks and 20 metrics on the MNIST MLP, all defaults on, against none."""
    workload = mnist_mlp(256)
    idle = [Idle() for _ in range(20)]
    runs = {
        "20 callbacks, 20 metrics": lambda: trained(
            workload, epochs, callbacks=idle, num_logged=20
        ),
        "none": lambda: trained(workload, epochs),
    }
    results = interleave(runs, rounds)
    rows = rows_of(results, workload.num_batches, ())
    return [row | {"/ none": ratio(results, row["run"], "none")} for row in rows]


def main(argv: Sequence[str] | None = None) -> Report:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, help="steps of an epoch")
    args = parse(options, argv, rounds=5, short=2)
    rounds, epochs, short = args.rounds, args.epochs, args.short
    steps = args.steps or (1000 if short else 4000)
    report = Report(name="scaling", as_json=args.json)
    # Thousands of arrays take milliseconds a step: fewer steps tell as much.
    arrays = (10, 100, 1000) if short else (10, 100, 1000, 10_000)
    rows = [array_rows(n, min(steps, 1_000_000 // n), rounds, epochs) for n in arrays]
    report.add("parameter arrays, us a step", rows)

    fit = functools.partial(trained, linear(num_batches=steps), epochs, checkpoint=False)
    logged = (0, 100) if short else (0, 10, 100)
    runs = {n: functools.partial(fit, num_logged=n) for n in logged}
    report.add("10x10 linear, us a step", counted("logged metrics", runs, steps, rounds))
    counts = (0, 20) if short else (0, 1, 5, 20)
    for kind in (Idle, EachBatch):
        runs = {n: functools.partial(fit, callbacks=[kind() for _ in range(n)]) for n in counts}
        title = f"callbacks, {kind.__name__}"
        report.add("10x10 linear, us a step", counted(title, runs, steps, rounds))
    report.add("MNIST MLP, batch 256", all_at_once(rounds, epochs))
    report.finish()
    return report


if __name__ == "__main__":
    main()
