"""Digests: every bit, the shape, the dtype and the name count."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer.errors import CheckpointCorruptError
from jaxtrainer.manifest import check_seal, damaged, manifest_of, seal, spec_of

ARRAYS: dict[str, Any] = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.float32(2.0),
    "half": jnp.ones(4, jnp.bfloat16),
    "flags": np.array([True, False]),
    "words": np.array([1, 2], np.uint32),
    "empty": np.zeros((0, 3), np.float32),
    "strided": np.arange(8, dtype=np.int32)[::2],
}


def changed(name: str, value: Any) -> list[str]:
    manifest = manifest_of({"params": ARRAYS})
    return damaged({"params": {**ARRAYS, name: value}}, manifest)


def test_arrays_that_are_the_same_are_not_damaged():
    assert changed("matrix", ARRAYS["matrix"].copy()) == []
    assert manifest_of({"params": ARRAYS}, threads=4) == manifest_of({"params": ARRAYS})


@pytest.mark.parametrize("bit", [0, 7, 23, 31])
def test_every_bit_counts(bit: int):
    matrix = ARRAYS["matrix"].copy()
    matrix.view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
    assert changed("matrix", matrix) == ["params/matrix"]


def test_zero_is_not_minus_zero():
    manifest = manifest_of({"params": {"x": np.float32(0.0)}})
    assert damaged({"params": {"x": np.float32(-0.0)}}, manifest) == ["params/x"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("matrix", ARRAYS["matrix"].reshape(3, 2)),
        ("matrix", ARRAYS["matrix"].view(np.int32)),
        ("scalar", np.full(1, 2.0, np.float32)),
        ("empty", np.zeros((3, 0), np.float32)),
        ("half", np.asarray(ARRAYS["half"]).view(np.float16)),
    ],
)
def test_shape_and_dtype_count(name: str, value: Any):
    assert changed(name, value) == [f"params/{name}"]


def test_arrays_that_have_changed_places_are_both_named():
    one, two = {"a": np.float32(1), "b": np.float32(2)}, {"a": np.float32(2), "b": np.float32(1)}
    assert damaged({"params": two}, manifest_of({"params": one})) == ["params/a", "params/b"]


@pytest.mark.parametrize("change", [{"step": 2}, {"more": 1}, {"digest": "0" * 32}])
def test_record_that_was_edited_is_refused(change: dict[str, Any]):
    sealed = seal({"step": 1, "scores": [1.5, {"float": "nan"}]})
    check_seal(sealed)
    with pytest.raises(CheckpointCorruptError):
        check_seal({**sealed, **change})


def test_spec_takes_no_memory_and_no_objects():
    spec = spec_of({"dtype": "bfloat16", "shape": [1 << 40, 8]})
    assert spec.shape == (1 << 40, 8)
    with pytest.raises(CheckpointCorruptError, match="no arrays of dtype 'object'"):
        spec_of({"dtype": "object", "shape": [1]})
