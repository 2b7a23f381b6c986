"""`module_flops`: operations counted by hand, by module, and as XLA counts them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from jaxtrainer.flops import ModuleFlops, module_flops
from jaxtrainer.scopes import SCOPE
from jaxtrainer.sharding import build_mesh

F32 = jnp.float32


def spec(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, F32)


def scoped(path: str) -> Any:
    return jax.named_scope(f"{SCOPE}{path}{SCOPE}")


def count(fn: Any, *arguments: Any) -> float:
    """Operations of a function as if it were all one module."""

    def named(*arguments: Any) -> Any:
        with scoped("m"):
            return fn(*arguments)

    return module_flops(jax.make_jaxpr(named)(*arguments), ["m"])["m"].total


def by_xla(fn: Any, *arguments: Any) -> float:
    """As XLA counts the same function, before its optimisation."""
    return (jax.jit(fn).lower(*arguments).cost_analysis() or {})["flops"]


def test_matrix_product_has_two_for_each_product():
    assert count(jnp.matmul, spec(5, 7), spec(7, 3)) == 2 * 5 * 7 * 3


def test_batched_product_counts_each_batch():
    product = lambda x, y: jnp.einsum("bhqd,bhkd->bhqk", x, y)  # noqa: E731
    assert count(product, spec(2, 3, 5, 7), spec(2, 3, 11, 7)) == 2 * 2 * 3 * 5 * 11 * 7


def convolve(x: Any, kernel: Any, **options: Any) -> Any:
    layout = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "VALID", **options}
    return lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **options)


def test_convolution_without_padding_is_a_product_for_each_place():
    # 10x10 less 3x3 leaves 8x8 places, each with 3*3*4 products for 6 features of 2 samples.
    flops = count(convolve, spec(2, 10, 10, 4), spec(3, 3, 4, 6))
    assert flops == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)


def test_products_with_padding_are_none():
    same = lambda x, k: convolve(x, k, padding="SAME")  # noqa: E731
    # Along 10 places a kernel of 3 meets 3 numbers, but at both ends 2.
    pairs = (3 * 10 - 2) ** 2
    assert count(same, spec(1, 10, 10, 4), spec(3, 3, 4, 6)) == 2 * 6 * 4 * pairs


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME", "window_strides": (2, 2)},
        {"rhs_dilation": (2, 3)},
        {"lhs_dilation": (2, 2), "padding": ((2, 1), (0, 3))},
        {"feature_group_count": 2},
    ],
    ids=["strided", "dilated", "transposed", "grouped"],
)
def test_convolution_and_its_gradients_are_as_xla_counts_them(options: dict[str, Any]):
    inputs = 4 // options.get("feature_group_count", 1)

    def fn(x: Any, kernel: Any) -> Any:
        y, pull = jax.vjp(lambda x, k: convolve(x, k, **options), x, kernel)
        return pull(y)

    arguments = spec(2, 11, 12, 4), spec(3, 3, inputs, 6)
    # XLA's kernels' order is reversed for a gradient, and that moves numbers only.
    assert count(fn, *arguments) == by_xla(fn, *arguments)


def test_elementwise_counts_outputs_and_a_reduction_inputs():
    x = spec(4, 5)
    assert count(lambda x: x * 2.0 + x, x) == 2 * 20
    assert count(lambda x: lax.reduce(x, 0.0, lax.add, (1,)), x) == 20 - 4
    assert count(lambda x: jnp.exp(x).T.reshape(2, 10), x) == 0
    assert count(lambda x: x**3, x) == 2 * 20


def test_scan_counts_its_body_as_often_as_it_runs():
    def fn(x: Any, w: Any) -> Any:
        return lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert count(fn, spec(3, 4), spec(6, 4, 4)) == 6 * 2 * 3 * 4 * 4


def test_cond_counts_its_largest_branch():
    def fn(x: Any, w: Any) -> Any:
        return lax.cond(True, lambda x: x @ w @ w, lambda x: x + 1.0, x)

    assert count(fn, spec(3, 4), spec(4, 4)) == 2 * 2 * 3 * 4 * 4


def test_while_loop_counts_once():
    def fn(x: Any, w: Any) -> Any:
        return lax.while_loop(lambda x: x[0, 0] < 1.0, lambda x: x @ w, x)

    # The test compares one number.
    assert count(fn, spec(3, 4), spec(4, 4)) == 2 * 3 * 4 * 4 + 1


@jax.custom_jvp
def with_jvp(x: Any) -> Any:
    return x @ x


@jax.custom_vjp
def with_vjp(x: Any) -> Any:
    return x @ x


with_jvp.defjvp(lambda x, t: (x[0] @ x[0], t[0] @ x[0]))
with_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))


@pytest.mark.parametrize(
    "fn",
    [jax.jit(lambda x: x @ x), jax.checkpoint(lambda x: x @ x), with_jvp, with_vjp],
    ids=["jit", "checkpoint", "jvp", "vjp"],
)
def test_what_is_called_counts_as_if_it_stood_there(fn: Any):
    assert count(fn, spec(4, 4)) == 2 * 4**3


@pytest.mark.parametrize("fn", [with_jvp, with_vjp], ids=["jvp", "vjp"])
def test_derivative_of_the_user_s_is_the_module_s_backward(fn: Any):
    def loss(x: Any) -> Any:
        with scoped("a"):
            x = fn(x)
        return x.sum()

    found = module_flops(jax.make_jaxpr(jax.grad(loss))(spec(4, 4)), ["a"])
    assert found["a"] == ModuleFlops(forward=128, backward=128)


def test_checkpoint_counts_what_is_computed_once_more():
    def fn(x: Any, w: Any) -> Any:
        return jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w)))(x))

    forward = 2 * 3 * 4 * 4
    plain = count(lambda x, w: jnp.sum(jnp.sin(x @ w)), spec(3, 4), spec(4, 4))
    assert plain - forward < 20
    gradient = count(jax.grad(fn), spec(3, 4), spec(4, 4))
    # Forward, once more, and the gradient of the input; a few for the cosines beside.
    assert 3 * forward <= gradient < 3 * forward + 100


def test_shard_map_counts_all_devices():
    mesh, rows = build_mesh({"data": 4}), PartitionSpec("data")
    fn = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows
    )
    assert count(fn, spec(8, 5), spec(5, 3)) == 2 * 8 * 5 * 3


def test_ragged_product_counts_each_row_once():
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert count(lax.ragged_dot, spec(16, 5), spec(4, 5, 3), sizes) == 2 * 16 * 5 * 3

    def fn(x: Any, w: Any, sizes: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: lax.ragged_dot(x, w, sizes), x, w)
        return pull(y)

    flops = count(fn, spec(16, 5), spec(4, 5, 3), sizes)
    assert flops == pytest.approx(3 * 2 * 16 * 5 * 3, rel=0.1)


def test_modules_hold_what_is_below_them_and_the_root_the_rest():
    def fn(x: Any) -> Any:
        with scoped("a"):
            x = x + 1.0
            with scoped("a/b"):
                x = x @ x
        return x * 2.0

    found = module_flops(jax.make_jaxpr(fn)(spec(4, 4)), ["a", "a/b", "c"])
    forward = {path: flops.forward for path, flops in found.items()}
    assert forward == {"": 128 + 32, "a": 128 + 16, "a/b": 128, "c": 0}
    assert not any(flops.backward for flops in found.values())


def test_gradient_is_the_module_s_backward():
    def fn(x: Any, w: Any) -> Any:
        with scoped("a"):
            y = jnp.tanh(x @ w)
        return y.sum()

    jaxpr = jax.make_jaxpr(jax.grad(fn, argnums=(0, 1)))(spec(4, 4), spec(4, 4))
    found = module_flops(jaxpr, ["a"])["a"]
    assert 128 <= found.forward < 128 + 50
    # Both arguments have a gradient.
    assert 256 <= found.backward < 256 + 50


def test_trace_without_modules_has_no_figures():
    assert module_flops(jax.make_jaxpr(jnp.matmul)(spec(2, 2), spec(2, 2)), ["a"]) == {}


def test_parts_of_several_devices_are_equal():
    assert ModuleFlops(8.0, 4.0).divided(4) == ModuleFlops(2.0, 1.0)


class Attention(nnx.Module):
    """Two blocks of a transformer, over words."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(50, 32, rngs=rngs)
        self.attend = nnx.List(
            [nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs) for _ in range(2)]
        )
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.up = nnx.Linear(32, 128, rngs=rngs)
        self.down = nnx.Linear(128, 32, rngs=rngs)

    def __call__(self, words: Any) -> Any:
        x = self.embed(words)
        for attend in self.attend:
            x = x + attend(self.norm(x))
            x = x + self.down(jax.nn.gelu(self.up(x)))
        return self.embed.attend(x)


class Images(nnx.Module):
    """Two convolutions with all that comes with them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.last = nnx.Linear(16 * 16, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.max_pool(jax.nn.relu(self.norm(self.first(x))), (2, 2), (2, 2))
        return self.last(jax.nn.relu(self.second(x)).reshape(len(x), -1))


def dense(rngs: nnx.Rngs) -> Any:
    layers = [nnx.Linear(64, 128, rngs=rngs), jax.nn.relu, nnx.Linear(128, 10, rngs=rngs)]
    return nnx.Sequential(*layers)


WORDS = jax.ShapeDtypeStruct((4, 16), np.int32)


@pytest.mark.parametrize(
    ("make", "x"),
    [(dense, spec(16, 64)), (Images, spec(4, 16, 16, 3)), (Attention, WORDS)],
    ids=["dense", "images", "words"],
)
def test_whole_models_have_what_xla_counts(make: Any, x: Any):
    graphdef, state = nnx.split(make(nnx.Rngs(0)))

    def loss(state: Any, x: Any) -> Any:
        return jnp.mean(nnx.merge(graphdef, state)(x) ** 2)

    def step(state: Any, x: Any) -> Any:
        return jax.value_and_grad(loss, allow_int=True)(state, x)

    # Products agree exactly; what JAX expands, like a mean, may have some more or less.
    for fn in (loss, step):
        assert count(fn, state, x) == pytest.approx(by_xla(fn, state, x), rel=0.01)
