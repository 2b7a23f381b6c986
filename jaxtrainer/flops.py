"""Floating-point operations of a traced function, module by module, from its jaxpr.

Nothing is compiled or run. Knows jaxprs, nothing of training. May import level 1.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxtrainer.scopes import path_in


class ModuleFlops(NamedTuple):
    """Floating-point operations of one module, with those of the modules below it.

    Attributes:
        forward: Of its calls.
        backward: Of their gradients, with what is computed once more for them (`jax.checkpoint`).
    """

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both together."""
        return self.forward + self.backward

    def divided(self, num_devices: int) -> ModuleFlops:
        """Return what one of several devices has of them."""
        return ModuleFlops(self.forward / num_devices, self.backward / num_devices)


def module_flops(jaxpr: ClosedJaxpr, paths: Iterable[str]) -> dict[str, ModuleFlops]:
    """Return the operations of each module by its path, and of the whole function as `""`.

    A matrix product or convolution has two for each product of two numbers that goes into an
    output: `2 * prod(output) * contracted`, where a convolution's products with padding, or with
    the zeros of a dilation, are none. Anything else has one for each number that it gives, a
    reduction for each that it takes in. As with XLA, exponentials, roots and their like count as
    none, nor does what moves numbers, draws random ones, or is a kernel of its own (Pallas).

    What is called in a loop counts each time: the body of `lax.scan` times its length. That of a
    `while_loop`, whose end is not known, counts once; of the branches of a `cond` the largest.

    Args:
        jaxpr: Traced with the modules' paths in its names, see `scopes.NamedModules`, and with
            global shapes: it counts the work of all devices together.
        paths: Of the modules. What is outside of their calls is of the whole function only.

    Returns:
        The operations; nothing where no module was seen in the trace.

    References:
        XLA, `HloCostAnalysis`: HandleDot, HandleConvolution, HandleReduce, HandleElementwiseOp.
    """
    counts: _Counts = defaultdict(float)
    _add(jaxpr.jaxpr, _Place(), 1.0, counts)
    known = dict.fromkeys(paths, ModuleFlops())
    if not any(place.path in known for place in counts):
        return {}
    flops = {"": ModuleFlops(), **known}
    for place, count in counts.items():
        part = ModuleFlops(backward=count) if place.is_backward else ModuleFlops(forward=count)
        for path in ("", *_upwards(place.path)):
            if path in flops:
                forward, backward = flops[path]
                flops[path] = ModuleFlops(forward + part.forward, backward + part.backward)
    return flops


class Counted(NamedTuple):
    """What a step does on one device.

    Attributes:
        flops: Operations of each module by its path, of all as `""`; empty if not known.
        product_bytes: Bytes that its matrix products and convolutions read and write.
    """

    flops: Mapping[str, ModuleFlops]
    product_bytes: float


def product_bytes(jaxpr: Any) -> float:
    """Return the bytes that matrix products and convolutions take in and give.

    What a compiler cannot do away with by fusing: what is between two products is computed as one
    of them is read or written. A kernel of several products (fused attention) may still have
    fewer. Loops count as in `module_flops`.

    Args:
        jaxpr: As there.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _PRODUCTS:
            total += sum(_size(v) * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars))
        elif eqn.primitive.name == "cond":
            total += max(product_bytes(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            total += sum(times * product_bytes(body) for body, times in _bodies(eqn))
    return total


class _Place(NamedTuple):
    """The module in whose call an operation is, and whether it is of a gradient."""

    path: str = ""
    is_backward: bool = False

    def inside(self, names: str) -> _Place:
        """Return the place of what has these names around it there."""
        path, is_backward = _parsed(names)
        return _Place(self.path if path is None else path, self.is_backward or is_backward)


_Counts = defaultdict[_Place, float]


@functools.lru_cache(maxsize=4096)
def _parsed(names: str) -> tuple[str | None, bool]:
    return path_in(names), "transpose(" in names


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition("/")[0]


def _add(jaxpr: Any, place: _Place, times: float, counts: _Counts) -> None:
    """Add what a jaxpr has, so many times."""
    for eqn in jaxpr.eqns:
        name, here = eqn.primitive.name, place.inside(str(eqn.source_info.name_stack))
        if name in _RULES:
            counts[here] += times * _RULES[name](eqn)
        elif name == "cond":
            for at, count in _largest(eqn, here, times).items():
                counts[at] += count
        elif bodies := list(_bodies(eqn)):
            for body, repeats in bodies:
                _add(body, here, times * repeats, counts)
        else:
            counts[here] += times * _num_out(eqn)


def _largest(eqn: Any, place: _Place, times: float) -> _Counts:
    branches: list[_Counts] = []
    for branch in eqn.params["branches"]:
        branches.append(defaultdict(float))
        _add(branch.jaxpr, place, times, branches[-1])
    return max(branches, key=lambda counts: sum(counts.values()))


def _bodies(eqn: Any) -> Iterator[tuple[Any, float]]:
    """Yield the jaxprs that an operation calls, each with how often."""
    repeats = 1.0
    if eqn.primitive.name == "scan":
        repeats = float(eqn.params["length"])
    elif eqn.primitive.name == "shard_map":
        # Its body has the shapes of one device.
        sizes, axes = eqn.params["mesh"].shape, eqn.params.get("manual_axes")
        repeats = float(math.prod(sizes[axis] for axis in (sizes if axes is None else axes)))
    for value in eqn.params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if isinstance(body, ClosedJaxpr | Jaxpr):
                yield (body.jaxpr if isinstance(body, ClosedJaxpr) else body), repeats


def _size(atom: Any) -> float:
    return float(math.prod(getattr(atom.aval, "shape", ())))


def _num_out(eqn: Any) -> float:
    return max((_size(v) for v in eqn.outvars), default=0.0)


def _none(eqn: Any) -> float:
    return 0.0


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * _num_out(eqn) * math.prod(shape[i] for i in contracted)


def _ragged_dot(eqn: Any) -> float:
    numbers, lhs = eqn.params["ragged_dot_dimension_numbers"], eqn.invars[0].aval.shape
    (contracted, _), _ = numbers.dot_dimension_numbers
    flops = 2.0 * _num_out(eqn) * math.prod(lhs[i] for i in contracted)
    # Divided among the groups, each has a part of the sum.
    is_divided = set(numbers.lhs_ragged_dimensions) <= set(contracted)
    return flops / eqn.invars[2].aval.shape[-1] if is_divided else flops


def _convolution(eqn: Any) -> float:
    p, (lhs, rhs), out = eqn.params, (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape
    numbers = p["dimension_numbers"]
    out_batch, out_features, *out_dims = (out[i] for i in numbers.out_spec)
    _, in_features, *kernel = (rhs[i] for i in numbers.rhs_spec)
    dims = [lhs[i] for i in numbers.lhs_spec[2:]]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    sizes = zip(dims, kernel, out_dims, *(p[name] for name in names), strict=True)
    products = math.prod(_num_products(*of_dim) for of_dim in sizes)
    return 2.0 * out_batch * out_features * in_features * products


def _num_products(
    size: int,
    kernel: int,
    out: int,
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    kernel_dilation: int,
) -> int:
    """Return how often a number of the kernel meets one of the input, along one dimension."""
    # The longer side at once: a gradient's kernel is as long as the forward pass's output.
    steps = (kernel, kernel_dilation), (out, stride)
    (short, short_step), (long, long_step) = sorted(steps)
    positions, last = np.arange(long) * long_step - padding[0], (size - 1) * dilation
    total = 0
    for i in range(short):
        at = positions + i * short_step
        total += int(np.sum((at >= 0) & (at <= last) & (at % dilation == 0)))
    return total


def _reduction(eqn: Any) -> float:
    return max(0.0, _size(eqn.invars[0]) - _size(eqn.outvars[0]))


def _window(eqn: Any) -> float:
    return _num_out(eqn) * (math.prod(eqn.params["window_dimensions"]) - 1)


def _select_and_scatter(eqn: Any) -> float:
    return _size(eqn.invars[0]) * math.prod(eqn.params["window_dimensions"])


def _scatter(eqn: Any) -> float:
    return _size(eqn.invars[2])


def _sort(eqn: Any) -> float:
    size = _num_out(eqn)
    return size * math.ceil(math.log2(size)) if size > 1 else 0.0


def _power(eqn: Any) -> float:
    y = eqn.params["y"]
    # By squaring, and a division where it is negative.
    products = max(0, abs(y).bit_length() - 1 + abs(y).bit_count() - 1) + (y < 0)
    return _num_out(eqn) * products


_PRODUCTS = {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}

_RULES: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "integer_pow": _power,
    "sort": _sort,
    "select_and_scatter_add": _select_and_scatter,
    "select_and_gather_add": _window,
    "reduce": _reduction,
    **dict.fromkeys(("reduce_sum", "reduce_prod", "reduce_max", "reduce_min"), _reduction),
    **dict.fromkeys(("reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"), _reduction),
    **dict.fromkeys(("reduce_window", "reduce_window_sum"), _window),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min"), _window),
    **dict.fromkeys((f"scatter{c}{x}" for c in "-_" for x in ("add", "sub", "mul")), _scatter),
    **dict.fromkeys((f"scatter{c}{x}" for c in "-_" for x in ("min", "max")), _scatter),
}
"""What an operation has, if it is not one for each number of its output."""

_TRANSCENDENTAL = (
    "exp exp2 expm1 log log1p logistic pow sqrt rsqrt cbrt sin cos tan asin acos atan atan2 sinh "
    "cosh tanh asinh acosh atanh erf erfc erf_inv lgamma digamma"
)
_MOVES = (
    "reshape transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice rev pad iota copy "
    "dynamic_update_slice concatenate split gather scatter bitcast_convert_type copy_p device_put "
    "stop_gradient sharding_constraint mesh_cast reshard layout_constraint optimization_barrier "
    "name empty tie_in pvary pcast psum psum2 psum_invariant pmax pmin ppermute pbroadcast "
    "all_gather all_gather_invariant all_to_all reduce_scatter axis_index get swap addupdate"
)
_OTHERS = (
    "random_bits random_seed random_split random_fold_in random_wrap random_unwrap random_clone "
    "threefry2x32 rng_bit_generator rng_uniform debug_callback debug_print pure_callback "
    "io_callback pallas_call tpu_custom_call custom_call ffi_call"
)
_RULES |= dict.fromkeys(f"{_TRANSCENDENTAL} {_MOVES} {_OTHERS}".split(), _none)
