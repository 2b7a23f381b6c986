"""A decoder-only transformer as a workload, from 2 layers of 128 to GPT-2 size, on made-up text.

Shapes: B batch, S sequence, D model, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.workloads import Batch, Params, Workload


@dataclass(frozen=True, kw_only=True)
class Size:
    """Layers, widths and length of the sequences."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    seq: int = 64
    vocab: int = 256
    attention: Literal["xla", "cudnn"] | None = None

    @property
    def num_params(self) -> int:
        return sum(int(np.prod(shape)) for shape in _shapes(self).values())

    @property
    def flops_per_token(self) -> float:
        """Forward and backward: 6 a matrix parameter, and the attention scores in full.

        Chowdhery et al. 2022, "PaLM", appendix B. The embedding is tied, so that its matrix is
        multiplied once, as the output layer.
        """
        matrices = self.num_params - self.seq * self.width
        return 6.0 * matrices + 12.0 * self.layers * self.width * self.seq


def transformer(
    size: Size, batch_size: int = 16, num_batches: int = 50, bf16: bool = False
) -> Workload:
    """Next-token prediction with a tied embedding, pre-norm blocks and Adam."""
    return Workload(
        init=lambda key: _init(key, size),
        loss=lambda params, batch: (_loss(params, batch, size), None),
        tx=optax.adam(3e-4),
        arrays={"tokens": _text(batch_size * num_batches, size)},
        batch_size=batch_size,
        bf16=bf16,
    )


def _text(num_samples: int, size: Size) -> np.ndarray:
    """Each token follows from the one before, but for a coin: there is something to learn."""
    rng = np.random.default_rng(0)
    tokens = np.empty((num_samples, size.seq + 1), np.int32)
    tokens[:, 0] = rng.integers(size.vocab, size=num_samples)
    coins = rng.integers(2, size=tokens.shape)
    for i in range(size.seq):
        tokens[:, i + 1] = (5 * tokens[:, i] + 1 + coins[:, i]) % size.vocab
    return tokens


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
    d = size.width
    shapes = {"embed": (size.vocab, d), "position": (size.seq, d)}
    for i in range(size.layers):
        shapes |= {f"{i}_qkv": (d, 3 * d), f"{i}_out": (d, d)}
        shapes |= {f"{i}_up": (d, 4 * d), f"{i}_down": (4 * d, d)}
    return shapes


def _init(key: jax.Array, size: Size) -> Params:
    shapes = _shapes(size)
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    weights = {n: 0.02 * jax.random.normal(keys[n], shape) for n, shape in shapes.items()}
    norms = [f"{i}_{part}" for i in range(size.layers) for part in ("norm0", "norm1")]
    return weights | {name: jnp.ones((size.width,)) for name in [*norms, "norm"]}


def _norm(x_BSD: jax.Array, scale_D: jax.Array) -> jax.Array:
    # In float32, as everybody does; bfloat16 has too few digits for the mean square.
    x = x_BSD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x.astype(x_BSD.dtype) * scale_D


def _attention(x_BSD: jax.Array, params: Params, i: int, size: Size) -> jax.Array:
    b, s, d = x_BSD.shape
    qkv = (x_BSD @ params[f"{i}_qkv"]).reshape(b, s, 3, size.heads, d // size.heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=size.attention)
    return y.reshape(b, s, d) @ params[f"{i}_out"]


def _loss(params: Params, batch: Batch, size: Size) -> jax.Array:
    tokens_BS, target_BS = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    x_BSD = params["embed"][tokens_BS] + params["position"]
    for i in range(size.layers):
        x_BSD = x_BSD + _attention(_norm(x_BSD, params[f"{i}_norm0"]), params, i, size)
        h = jax.nn.gelu(_norm(x_BSD, params[f"{i}_norm1"]) @ params[f"{i}_up"])
        x_BSD = x_BSD + h @ params[f"{i}_down"]
    logits_BSV = _norm(x_BSD, params["norm"]) @ params["embed"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits_BSV.astype(jnp.float32), target_BS
    )
    return jnp.mean(losses)
