"""Collectives read from HLO: of the text in each of its forms, and of programs compiled here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrainer.collectives import Collective, collectives

PAIRS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,4},{1,5},{2,6},{3,7}}",
        "[4,2]<=[2,4]T(1,0)",
        "mesh['a'=2,'b'=4] {'a'}",
        "mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}",
        "mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}",
        "mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}",
    ],
)
def test_groups_are_read_in_every_form(groups: str):
    line = f"%r.1 = f32[] all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    [found] = collectives(line)
    assert found.groups == PAIRS
    assert found.axes({"data": 2, "fsdp": 4}) == ("data",)


def test_results_of_a_combined_operation_are_told_apart():
    line = "  %r = (f32[64]{0}, /*index=1*/bf16[8,2]{1,0:T(8)}) all-reduce(%x, %y), to_apply=%add"
    [found] = collectives(line)
    assert found.sizes == (256, 32)
    assert found.size_bytes == 288
    assert (found.groups, found.group_size) == ((), 1)


@pytest.mark.parametrize(
    ("result", "op", "size"),
    [
        ("(f32[2,4]{1,0}, f32[16,4]{1,0})", "all-gather", 256),
        ("((f32[2], f32[4]), (f32[16], f32[32]))", "all-gather", 192),
        ("f32[16]{0}", "all-reduce", 64),
        ("(f32[4], f32[4], u32[], u32[])", "collective-permute", 16),
    ],
)
def test_results_of_a_started_operation_are_without_its_operands(result: str, op: str, size: int):
    text = f"%s = {result} {op}-start(%x), source_target_pairs={{{{0,1}},{{1,0}}}}\n"
    text += f"%d = f32[16]{{0}} {op}-done(%s)"
    [found] = collectives(text)
    assert (found.op, found.size_bytes, found.group_size) == (op, size, 2)


def test_sent_bytes_are_those_of_a_ring():
    def sent(op: str) -> float:
        groups, shapes = ((0, 1, 2, 3),), (("f32", (8,)),)
        return Collective(op=op, name="", shapes=shapes, groups=groups).sent_bytes

    # Gathering 32 bytes takes three times the 8 of each other device; reducing does it twice.
    assert [sent(op) for op in ("all-gather", "all-reduce")] == [24, 48]
    # Of 4 parts of 32 bytes each device sends three on.
    assert [sent(op) for op in ("reduce-scatter", "collective-permute")] == [96, 32]


def test_collectives_of_a_compiled_program_are_found_with_their_trips():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))

    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            # The sum over the divided features, 3 times; and one over the batch at the end.
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data", "model")))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, None, length=3)[0].sum(0)

    specs = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((4, 8), P("data", "model")), ((8, 8), P("model", None)))
    ]
    whole = NamedSharding(mesh, P())
    compiled = jax.jit(program, out_shardings=whole).lower(*specs).compile()
    found = [c for c in collectives(compiled.as_text() or "") if c.op == "all-reduce"]
    inside = [c for c in found if c.axes(mesh.shape) == ("model",)]
    assert [(c.times, c.sizes) for c in inside] == [(3, (2 * 8 * 4,))]
    assert [c.times for c in found if "data" in c.axes(mesh.shape)] == [1]
