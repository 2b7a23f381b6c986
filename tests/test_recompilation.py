"""A step is compiled for the first batch's shapes: what is unlike it is refused, not recompiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer.errors import BatchSpecError
from jaxtrainer.testing import FromEpoch, assert_no_retrace
from tests import tiny
from tests.bad_input import doing, refused

ROWS = 8


def tokens(length: int, rows: int = ROWS, dtype: Any = np.int32) -> dict[str, np.ndarray]:
    return {
        "x": np.ones((rows, 4), np.float32),
        "tokens": np.ones((rows, length), dtype),
        "mask": np.ones((rows, length), np.bool_),
    }


def refused_at(bad: Any, *parts: str, **options: Any) -> None:
    loader, module = [tokens(7), tokens(7), bad], doing(lambda self, model, batch: None)
    where = "train batch 2 of epoch 0 differs from the first batch"
    options = {"module": module, "loader": loader, "compiled": ["train step"], **options}
    refused(BatchSpecError, where, *parts, **options)


def test_every_leaf_of_another_length_is_named_with_its_padding():
    pad = "pad every batch in the loader to one shape: `np.pad(x, [(0, 0), (0, 2)])`"
    refused_at(
        tokens(5),
        f"leaf mask: expected bool[8, 7], got bool[8, 5]; {pad}",
        f"leaf tokens: expected int32[8, 7], got int32[8, 5]; {pad}",
    )


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (tokens(9), ("leaf tokens: expected int32[8, 7], got int32[8, 9]", "to the longest")),
        (tokens(7, dtype=np.int16), ("got int16[8, 7]; cast it", "`x.astype('int32')`")),
        (tokens(7, rows=16), ("got int32[16, 7]; use one batch size",)),
        ({**tokens(7), "mask": np.ones(ROWS, np.bool_)}, ("got bool[8]; reshape it",)),
    ],
    ids=["longer", "dtype", "rows", "rank"],
)
def test_leaf_that_differs_is_named_with_what_to_do(bad: Any, parts: Any):
    refused_at(bad, *parts)


SHAPE = (ROWS, tiny.FEATURES)
FORMS = {
    "numpy": np.ones(SHAPE, np.float32),
    "64 bits": np.ones(SHAPE),
    "on a device": jnp.ones(SHAPE, jnp.float32),
    "weak": jnp.broadcast_to(1.0, SHAPE),
}


class InForms:
    """Ones, in another form each epoch."""

    def __init__(self, forms: Iterable[Any]) -> None:
        self.forms = itertools.cycle(forms)

    def __iter__(self) -> Iterator[Any]:
        x = next(self.forms)
        return iter([{**batch, "x": x} for batch in tiny.make_batches(4)])


def test_forms_of_the_same_numbers_are_one_program():
    assert FORMS["weak"].aval.weak_type
    guard = FromEpoch(1, assert_no_retrace)
    _, state = tiny.fit(InForms(FORMS.values()), callbacks=[guard], max_epochs=len(FORMS))
    _, plain = tiny.fit(InForms([FORMS["numpy"]]), max_epochs=len(FORMS))
    tiny.assert_same_bits(state, plain)
