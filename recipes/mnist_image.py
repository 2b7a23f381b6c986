"""Digits as pictures: read from the test set or an image file, drawn as text.

NumPy, and Pillow for reading image files only.
"""

import sys
from pathlib import Path

import numpy as np

from mnist_data import load_mnist

SHADES = " .:*#"


class ImageError(ValueError):
    """There is no such digit, or its file cannot be read."""


def read_digit(source: str) -> tuple[np.ndarray, str]:
    """Reads a digit to recognise.

    Args:
        source: index of a test digit, or path of an image with one digit, dark on light paper or
            the other way round.

    Returns:
        Pixels [28, 28], uint8, 0 is background and 255 is ink; and what to call the digit.

    Raises:
        ImageError: the index is out of range, or the file is missing, blank, or no image.
    """
    try:
        index = int(source)
    except ValueError:
        return read_picture(Path(source)), source
    _, test = load_mnist()
    last = len(test["label"]) - 1
    if not 0 <= index <= last:
        raise ImageError(f"received test digit {index}, expected an index from 0 to {last}")
    return test["image"][index], f"test digit {index}, labelled {test['label'][index]}"


def read_picture(path: Path) -> np.ndarray:
    """Reads an image file and gives it the size and place that MNIST digits have."""
    try:
        from PIL import Image, ImageOps  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImageError(
            f"reading {path} needs Pillow; install it with `{sys.executable} -m pip install pillow`"
        ) from None
    try:
        picture = Image.open(path).convert("RGBA")
    except OSError as error:
        raise ImageError(f"cannot read a picture or a test digit's index: {error}") from None
    paper = Image.new("RGBA", picture.size, "white")  # behind transparent pixels
    grey = ImageOps.autocontrast(Image.alpha_composite(paper, picture).convert("L"))
    if np.median(np.asarray(grey)) > 127:  # dark ink on light paper
        grey = ImageOps.invert(grey)
    if grey.size == (28, 28):
        return np.asarray(grey)
    ink = Image.fromarray(np.uint8(np.asarray(grey) > 127)).getbbox()
    if ink is None:
        raise ImageError(f"{path} is blank: no pixel stands out from the background")
    # As in MNIST: 20 x 20 pixels, placed so that the centre of mass is the middle of 28 x 28.
    image = np.asarray(ImageOps.expand(ImageOps.pad(grey.crop(ink), (20, 20)), 4))
    centre = [np.average(index, weights=image) for index in np.indices(image.shape)]
    return np.roll(image, [round(13.5 - c) for c in centre], axis=(0, 1))


def drawing(image: np.ndarray) -> str:
    """Draws a digit in 14 lines: a character is as high as two rows of pixels."""
    ink = image.reshape(14, 2, 28).mean(axis=1) / 256
    return "\n".join("".join(SHADES[int(v * len(SHADES))] for v in row).rstrip() for row in ink)
