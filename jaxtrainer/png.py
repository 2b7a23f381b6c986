"""Pictures as PNG, with the standard library alone. Imports nothing of the package."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_COLOUR_TYPE = {1: 0, 3: 2, 4: 6}
"""By channels: grey, RGB, RGBA (PNG specification, third edition, table 9)."""


def encode_png(pixels: np.ndarray) -> bytes:
    """Return a PNG file.

    Args:
        pixels: `[height, width, channels]`, uint8, with 1, 3 or 4 channels.
    """
    height, width, channels = pixels.shape
    # Before each row of pixels a zero: that it is not filtered.
    rows = np.pad(pixels.reshape(height, width * channels), ((0, 0), (1, 0)))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    chunks = (
        _chunk(b"IHDR", header),
        _chunk(b"IDAT", zlib.compress(rows.tobytes())),
        _chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
