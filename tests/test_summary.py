"""`summarize`: rows, totals and their text, from names and shapes alone."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from jaxtrainer.errors import ConfigError
from jaxtrainer.sharding import build_mesh
from jaxtrainer.summary import Summary, summarize


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
ALL = ["encoder", "encoder/first", "encoder/norm", "head", "dropout", "dropout/rngs"]


def divided(*shape: int) -> jax.ShapeDtypeStruct:
    """A spec whose last dimension is divided over four devices."""
    sharding = NamedSharding(build_mesh({"data": 4}), PartitionSpec(*[None, "data"]))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def text_of(summary: Summary, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(summary)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_rows_hold_all_that_is_below_them():
    summary = summarize(PARAMS, STATE)
    numbers = {r.path: (r.num_params, r.num_state, r.size_bytes) for r in summary.rows}
    assert numbers == {"encoder": (48, 16, 256), "head": (24, 0, 48), "dropout": (0, 1, 4)}
    assert (summary.num_params, summary.num_state) == (72, 17)
    assert (summary.param_bytes, summary.state_bytes) == (240, 68)


@pytest.mark.parametrize(
    ("max_depth", "paths"),
    [(0, []), (1, ["encoder", "head", "dropout"]), (2, ALL), (-1, ALL)],
)
def test_depth_is_that_of_the_rows(max_depth: int, paths: list[str]):
    summary = summarize(PARAMS, STATE, max_depth)
    assert [row.path for row in summary.rows] == paths
    assert (summary.num_params, summary.num_state) == (72, 17)


def test_rows_are_in_the_order_of_the_types():
    types = {"head": "Linear", "encoder": "Encoder", "encoder/norm": "Norm", "dropout": "Dropout"}
    rows = summarize(PARAMS, STATE, 2, types=types).rows
    assert [row.path for row in rows[:4]] == ["head", "encoder", "encoder/norm", "encoder/first"]
    assert [row.kind for row in rows[:4]] == ["Linear", "Encoder", "Norm", ""]


def test_module_without_params_is_not_trainable():
    trains = {row.path: row.trains for row in summarize(PARAMS, STATE).rows}
    assert trains == {"encoder": "yes", "head": "yes", "dropout": "no"}


def test_frozen_parameters_are_told_apart():
    frozen = {"encoder/norm/scale", "head/kernel"}
    summary = summarize(PARAMS, STATE, 2, frozen=frozen)
    trains = {row.path: row.trains for row in summary.rows[:4]}
    assert trains == {
        "encoder": "partly",
        "encoder/first": "yes",
        "encoder/norm": "frozen",
        "head": "frozen",
    }
    assert summary.num_frozen == 8 + 24
    assert "72 parameters (240 B), of them 32 frozen" in str(summary)


def test_arrays_of_a_model_without_modules_are_its_rows():
    summary = summarize({"w": spec(4, 3), "b": spec(3)}, frozen={"b"})
    assert [(r.path, r.arrays, r.trains) for r in summary.rows] == [
        ("w", "f32[4,3]", "yes"),
        ("b", "f32[3]", "frozen"),
    ]


def test_divided_array_shows_its_parts():
    summary = summarize({"dense": {"kernel": divided(6, 8), "bias": spec(8)}})
    (row,) = summary.rows
    assert row.arrays == "kernel f32[6,8/4], bias f32[8]"
    assert (row.size_bytes, row.device_bytes) == (4 * 56, 4 * 20)
    assert "80 B on each device" in str(summary)
    assert "per device" in str(summary)


def test_summary_is_rendered():
    types = {"encoder": "Encoder", "encoder/first": "Linear", "head": "Linear"}
    summary = summarize(PARAMS, STATE, 2, types=types, figures={"batch": "8 samples"})
    assert str(summary) == EXPECTED


EXPECTED = """\
 module    type      arrays                                  params   share    size   trains
 ───────────────────────────────────────────────────────────────────────────────────────────
 encoder   Encoder                                               48   66.7%   256 B   yes
   first   Linear    bias f32[8], kernel f32[4,8]                40   55.6%   160 B   yes
   norm              scale f32[8], mean f32[8], var f32[8]        8   11.1%    96 B   yes
 head      Linear    kernel bf16[8,3]                            24   33.3%    48 B   yes
 dropout                                                          0    0.0%     4 B   no
   rngs              count u32[]                                  0    0.0%     4 B   no

72 parameters (240 B); 17 other numbers (68 B)
batch  8 samples"""


@pytest.mark.parametrize(
    ("width", "names"),
    [
        (200, "module type arrays params share size trains"),
        (80, "module type arrays params size trains"),
        (60, "module type params size trains"),
    ],
)
def test_columns_go_where_there_is_no_room(width: int, names: str):
    summary = summarize(PARAMS, STATE, 2, types={"encoder/first": "MultiHeadAttention"})
    lines = text_of(summary, width)
    assert lines[1].split() == names.split()
    assert "…" not in "".join(lines)


def test_summary_of_no_dict_is_refused():
    with pytest.raises(ConfigError, match="nested dicts, got a list"):
        summarize([1, 2])  # pyright: ignore[reportArgumentType]
