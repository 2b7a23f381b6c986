"""What a run hands to loggers: refused where it is made, laid out as it says, without secrets."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer import Run
from jaxtrainer.errors import LogError
from jaxtrainer.png import encode_png
from jaxtrainer.records import Histogram, Image, Record
from tests.logged import read_png

RUN = Run()
NAN = float("nan")
BAD_IMAGES: Any = {
    "vector": (np.zeros(4), {}, "expected [height, width] or [height, width, channels]"),
    "channels": (np.zeros((4, 4, 2)), {}, "channels 1, 3 or 4, got shape (4, 4, 2)"),
    "several": (np.zeros((9, 5, 5)), {}, "for several pictures pass `columns=10`"),
    "one": (np.zeros((4, 4)), {"columns": 2}, "[n, height, width(, channels)] with `columns=`"),
    "empty": (np.zeros((0, 4)), {}, "got shape (0, 4)"),
    "columns": (np.zeros((9, 4, 4)), {"columns": 0}, "columns must be an integer of at least 1"),
    "integers": (np.zeros((4, 4), np.int32), {}, "uint8, or floats from 0 to 1; got int32"),
    "text": ("x.png", {}, "got shape ()"),
    "bytes": (255 * np.ones((4, 4)), {}, "from 0 to 1, got values from 255 to 255"),
    "nan": (np.full((4, 4), NAN), {}, "got values from nan to nan"),
    "ragged": ([[1.0], [1.0, 2.0]], {}, "list is no array"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_refused_before_it_is_queued(case: str):
    image, options, says = BAD_IMAGES[case]
    with pytest.raises(LogError) as caught:
        RUN.log_image("digits", image, **options)
    assert says in str(caught.value)
    assert "log_image('digits')" in str(caught.value)


BAD_CALLS: Any = {
    "no numbers": (lambda run: run.log_histogram("h", ["a"]), "expected numbers"),
    "empty": (lambda run: run.log_histogram("h", []), "of shape (0,)"),
    "edges": (lambda run: run.log_histogram("h", [1, 2], edges=[0, 1]), "one fewer than rising"),
    "falling": (lambda run: run.log_histogram("h", [1], edges=[1, 0]), "one fewer than rising"),
    "no text": (lambda run: run.log_text("t", 3), "expected a string, got int"),
    "name": (lambda run: run.log_text("", "x"), "a series is named by a string of one line"),
    "line": (lambda run: run.log_image("a\nb", np.zeros((2, 2))), "a string of one line"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_histogram_or_text_is_refused(case: str):
    call, says = BAD_CALLS[case]
    with pytest.raises(LogError) as caught:
        call(RUN)
    assert says in str(caught.value)


def handed(act: Any) -> Any:
    """The record that a call on a run hands over."""
    records: list[Record] = []
    run = Run(emit=records.append)
    act(run)
    [record] = records
    return record


@pytest.mark.parametrize(
    "image",
    [
        np.array([[0, 255], [128, 1]], np.uint8),
        np.array([[0, 1], [0.5, 0.004]], np.float32),
        np.array([[False, True]]),
    ],
    ids=["uint8", "float32", "bool"],
)
def test_image_is_the_pixels_that_it_was(image: np.ndarray):
    record: Image = handed(lambda run: run.log_image("x", image))
    scale = 1 if image.dtype == np.uint8 else 255
    assert (record.pixels[..., 0] == np.round(scale * image.astype(np.float64))).all()
    assert record.pixels.dtype == np.uint8


def test_image_of_a_device_in_bfloat16_is_taken():
    record: Image = handed(lambda run: run.log_image("x", jnp.ones((2, 2, 3), jnp.bfloat16)))
    assert (record.pixels == 255).all()


def test_image_is_a_copy():
    pixels = np.zeros((2, 2), np.uint8)
    record: Image = handed(lambda run: run.log_image("x", pixels))
    pixels[:] = 9
    assert not record.pixels.any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_read_back(channels: int):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    assert (read_png(encode_png(pixels)) == pixels).all()


def test_histogram_leaves_out_what_is_not_finite():
    record: Histogram = handed(lambda run: run.log_histogram("x", [1.0, NAN, 2.0, np.inf]))
    assert record.counts.sum() == 2
    assert (record.edges[0], record.edges[-1]) == (1.0, 2.0)
    nothing: Histogram = handed(lambda run: run.log_histogram("x", [NAN]))
    assert not nothing.counts.any()
