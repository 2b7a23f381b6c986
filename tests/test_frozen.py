"""What attributes hold, before and after: lists, dicts and sets changed in place, tracers kept."""

from __future__ import annotations

import types
from collections import deque
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrainer.frozen import changed_names, contents_of, is_same, kept_tracers


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1], lambda v: v.append(2)),
        ([1], lambda v: v.__setitem__(0, 2)),
        ({"a": [1]}, lambda v: v["a"].append(2)),
        ({"a": 1, 2: 1}, lambda v: v.update({"a": 2})),
        ({1}, lambda v: v.add(2)),
        (deque([1]), lambda v: v.append(2)),
        ([np.ones(2)], lambda v: v.__setitem__(0, np.ones(2))),
    ],
)
def test_container_changed_in_place_is_named(value, change):
    attributes = {"kept": [1, 2], "changed": value}
    before = contents_of(attributes)
    assert list(changed_names(attributes, before)) == []
    change(value)
    assert list(changed_names(attributes, before)) == ["changed"]


def test_container_that_was_replaced_is_named():
    before = contents_of({"a": [1], "b": [2]})
    assert list(changed_names({"a": 1}, before)) == ["a", "b"]


def test_value_that_is_no_container_is_not_looked_into():
    assert contents_of({"number": 1, "text": "ab", "array": np.ones(2), "pair": (1, 2)}) == {}


def test_traced_value_is_found_where_it_is_kept():
    found: list[str] = []

    def fn(x: Any) -> Any:
        held = {"here": x, "list": [x], "set": {1}, "object": types.SimpleNamespace(x=x), "no": 1}
        found.extend(kept_tracers(held))
        return x

    jax.eval_shape(fn, 1.0)
    assert found == ["here", "list", "object"]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [(1, 1, True), (1, 1.0, False), (1, True, False), ("a", "a", True), ([1], [2], False)],
)
def test_is_same_compares_type_and_value(a, b, same):
    assert is_same(a, b) is same


def test_is_same_takes_arrays_for_different_unless_they_are_one():
    array = np.ones(2)
    assert is_same(array, array)
    assert not is_same(array, np.ones(2))
