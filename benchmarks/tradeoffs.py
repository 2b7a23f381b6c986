"""What precision, rematerialisation and accumulation cost a transformer, in time and in memory.

One row for each setting: the step, tokens and TFLOP a second, and what XLA's memory analysis says a
device needs. TFLOP are those of the model, so that what remat computes again counts as time only;
MFU is there where the device's peak is known.

    PYTHONPATH=. python benchmarks/tradeoffs.py
    PYTHONPATH=. python benchmarks/tradeoffs.py --size large --batch-size 16
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.common import interleave, parse, parser
from benchmarks.models import SIZES
from benchmarks.report import Report
from benchmarks.transformer import Size, transformer
from jaxtrainer import Callback, Run, Trainer, TrainModule, data
from jaxtrainer.peaks import peak_of

SETTINGS: dict[str, dict[str, Any]] = {
    "float32, highest": {"matmul_precision": "highest"},
    "float32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-mixed, remat dots": {
        "precision": "bf16-mixed",
        "remat": {"blocks/*": "dots_with_no_batch_dims_saveable"},
    },
    "bf16-mixed, remat all": {"precision": "bf16-mixed", "remat": "blocks/*"},
    "bf16-mixed, 4 x batch / 4": {"precision": "bf16-mixed", "accumulate_grad_batches": 4},
    "bf16-mixed, offload": {"precision": "bf16-mixed", "offload_optimizer": True},
}


class Block(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        d, linear = size.width, functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.size = size
        self.norm0, self.norm1 = nnx.RMSNorm(d, rngs=rngs), nnx.RMSNorm(d, rngs=rngs)
        self.qkv, self.out = linear(d, 3 * d), linear(d, d)
        self.up, self.down = linear(d, 4 * d), linear(4 * d, d)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        b, s, d = x_BSD.shape
        qkv = self.qkv(self.norm0(x_BSD)).reshape(b, s, 3, self.size.heads, d // self.size.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        how: Any = self.size.attention
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=how)
        x_BSD = x_BSD + self.out(y.reshape(b, s, d))
        return x_BSD + self.down(jax.nn.gelu(self.up(self.norm1(x_BSD))))


class Decoder(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(0.02)
        self.embed = nnx.Param(normal(rngs.params(), (size.vocab, size.width)))
        self.position = nnx.Param(normal(rngs.params(), (size.seq, size.width)))
        self.blocks = nnx.List([Block(size, rngs) for _ in range(size.layers)])
        self.norm = nnx.RMSNorm(size.width, rngs=rngs)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        x_BSD = self.embed[tokens_BS] + self.position[...][None]
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return (self.norm(x_BSD) @ self.embed[...].T).astype(jnp.float32)


class LM(TrainModule):
    """The workload of `benchmarks.transformer`, made of modules."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def configure_model(self, rngs: nnx.Rngs) -> Decoder:
        return Decoder(self.size, rngs)

    def configure_optimizers(self) -> Any:
        return optax.adam(3e-4)

    def training_step(self, model: Decoder, batch: Any) -> jax.Array:
        logits = model(batch["tokens"][:, :-1])
        target = batch["tokens"][:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


class Epochs(Callback):
    """Seconds from one epoch's end to the next, the device having come to rest."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_epoch_end(self, run: Run) -> None:
        jax.block_until_ready(run.state)
        self.ends.append(time.perf_counter())


class Setting:
    """One setting: its memory, and the seconds of a sample batch, the first epoch left out."""

    def __init__(
        self, size: Size, batch_size: int, steps: int, epochs: int, **options: Any
    ) -> None:
        rows = batch_size // options.get("accumulate_grad_batches", 1)
        arrays = transformer(size, batch_size, steps).arrays
        self.loader = data.from_arrays(arrays, batch_size=rows, shuffle=True)
        self.size, self.steps = size, steps
        self.options = {"enable_progress_bar": False, "max_epochs": epochs + 1, **options}
        batch = {name: array[:rows] for name, array in arrays.items()}
        self.plan = Trainer(**self.options).plan(LM(size), batch)

    def step_s(self) -> float:
        """Train anew; return the seconds of `batch_size` samples."""
        epochs = Epochs()
        Trainer(**self.options, callbacks=epochs).fit(LM(self.size), self.loader)
        return (epochs.ends[-1] - epochs.ends[0]) / (len(epochs.ends) - 1) / self.steps


def peak_flops(options: Mapping[str, Any]) -> float | None:
    peak = peak_of(jax.devices()[0].device_kind)
    is_bf16, is_whole = "precision" in options, options.get("matmul_precision") == "highest"
    return None if peak is None else peak.of("bf16" if is_bf16 else "fp32" if is_whole else "tf32")


def tradeoff_rows(
    size: Size, batch_size: int, steps: int, rounds: int, epochs: int
) -> list[dict[str, Any]]:
    settings = {
        name: Setting(size, batch_size, steps, epochs, **options)
        for name, options in SETTINGS.items()
    }
    times = interleave({name: s.step_s for name, s in settings.items()}, rounds)
    base, rows = median(times["float32"]), []
    for name, setting in settings.items():
        step_s = median(times[name])
        flops = batch_size * size.seq * size.flops_per_token / step_s / jax.device_count()
        row = {"setting": name, "ms/step": 1e3 * step_s, "/ float32": step_s / base}
        row |= {"tokens/s": batch_size * size.seq / step_s, "TFLOP/s": flops / 1e12}
        peak = peak_flops(SETTINGS[name])
        row |= {"MFU %": 100 * flops / peak} if peak else {}
        row["device MB"] = setting.plan.peak_bytes / 1e6
        rows.append(row | {"XLA GFLOP": setting.plan.flops / 1e9})
    return rows


def main(argv: Sequence[str] | None = None) -> Report:
    options = parser(__doc__)
    options.add_argument("--size", choices=[*SIZES], default="small")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--steps", type=int, default=20, help="steps of an epoch")
    args = parse(options, argv, rounds=3)
    size = SIZES[args.size]
    report = Report(name="tradeoffs", as_json=args.json)
    rows = tradeoff_rows(size, args.batch_size, args.steps, args.rounds, args.epochs)
    what = f"transformer, {size.num_params / 1e6:.3g} M parameters"
    report.add(f"{what}, batch {args.batch_size} x {size.seq}", rows)
    report.finish()
    return report


if __name__ == "__main__":
    main()
