"""`summarize`: rows, totals and their text, from names and shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxtrainer.errors import ConfigError
from jaxtrainer.summary import module_types, summarize
from tests.tiny import Net


def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "encoder": {
        "first": {"bias": spec(8), "kernel": spec(4, 8)},
        "norm": {"scale": spec(8)},
    },
    "head": {"kernel": spec(8, 3, dtype=jnp.bfloat16)},
}
STATE = {
    "dropout": {"rngs": {"count": spec(dtype=jnp.uint32)}},
    "encoder": {"norm": {"mean": spec(8), "var": spec(8)}},
}


def test_rows_hold_all_that_is_below_them():
    summary = summarize(PARAMS, STATE)
    numbers = {r.path: (r.num_params, r.num_state, r.size_bytes) for r in summary.rows}
    assert numbers == {"encoder": (48, 16, 256), "head": (24, 0, 48), "dropout": (0, 1, 4)}
    assert (summary.num_params, summary.num_state) == (72, 17)
    assert (summary.param_bytes, summary.state_bytes) == (240, 68)


@pytest.mark.parametrize(
    ("max_depth", "paths"),
    [
        (0, []),
        (1, ["encoder", "head", "dropout"]),
        (2, ["encoder", "encoder/first", "encoder/norm", "head", "dropout", "dropout/rngs"]),
        (-1, ["encoder", "encoder/first", "encoder/norm", "head", "dropout", "dropout/rngs"]),
    ],
)
def test_depth_is_that_of_the_rows(max_depth: int, paths: list[str]):
    summary = summarize(PARAMS, STATE, max_depth)
    assert [row.path for row in summary.rows] == paths
    assert (summary.num_params, summary.num_state) == (72, 17)


def test_module_without_params_is_not_trainable():
    trainable = {row.path: row.is_trainable for row in summarize(PARAMS, STATE).rows}
    assert trainable == {"encoder": True, "head": True, "dropout": False}


def test_arrays_of_a_model_without_modules_are_its_rows():
    summary = summarize({"w": spec(4, 3), "b": spec(3)})
    assert [(r.path, r.arrays) for r in summary.rows] == [
        ("w", "f32[4, 3]"),
        ("b", "f32[3]"),
    ]


def test_types_come_from_the_module():
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    kinds = {r.path: r.kind for r in summarize(params, types=module_types(model)).rows}
    assert kinds == {"first": "Linear", "norm": "BatchNorm", "last": "Linear"}
    assert module_types({"w": 1}) == {}


def test_summary_is_rendered():
    text = str(summarize(PARAMS, STATE, 2))
    assert [line.rstrip() for line in text.splitlines()] == EXPECTED.splitlines()


EXPECTED = """\
model
┏━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━┳━━━━━━━┳━━━━━━━┳━━━━━━━━━━━┓
┃ module  ┃ arrays                                ┃ params ┃ share ┃ state ┃  size ┃ trainable ┃
┡━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━╇━━━━━━━╇━━━━━━━╇━━━━━━━━━━━┩
│ encoder │                                       │     48 │ 66.7% │    16 │ 256 B │ yes       │
│   first │ bias f32[8], kernel f32[4, 8]         │     40 │ 55.6% │     0 │ 160 B │ yes       │
│   norm  │ scale f32[8], mean f32[8], var f32[8] │      8 │ 11.1% │    16 │  96 B │ yes       │
│ head    │ kernel bf16[8, 3]                     │     24 │ 33.3% │     0 │  48 B │ yes       │
│ dropout │                                       │      0 │  0.0% │     1 │   4 B │ no        │
│   rngs  │ count u32[]                           │      0 │  0.0% │     1 │   4 B │ no        │
├─────────┼───────────────────────────────────────┼────────┼───────┼───────┼───────┼───────────┤
│ total   │                                       │     72 │       │    17 │ 308 B │           │
└─────────┴───────────────────────────────────────┴────────┴───────┴───────┴───────┴───────────┘
72 trainable numbers (240 B), 17 others (68 B)
"""


def test_summary_of_no_dict_is_refused():
    with pytest.raises(ConfigError, match="nested dicts, got a list"):
        summarize([1, 2])  # pyright: ignore[reportArgumentType]
