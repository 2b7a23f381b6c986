"""Pictures that recipes write, read back by hand."""

import struct
import zlib

import numpy as np

from mnist_image import write_grid


def test_grid_is_a_grey_png_row_by_row(tmp_path):
    images = np.arange(6, dtype=np.float32).reshape(6, 1, 1) / 5 * np.ones((6, 2, 3))
    write_grid(tmp_path / "new" / "grid.png", images, columns=3)
    content = (tmp_path / "new" / "grid.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (9, 4)
    [size] = struct.unpack(">I", content[33:37])
    lines = np.frombuffer(zlib.decompress(content[41 : 41 + size]), np.uint8).reshape(4, 10)
    assert lines[0].tolist() == [0, 0, 0, 0, 51, 51, 51, 102, 102, 102]
    assert lines[2].tolist() == [0, 153, 153, 153, 204, 204, 204, 255, 255, 255]


def test_chunks_of_a_grid_have_their_checksums(tmp_path):
    write_grid(tmp_path / "grid.png", np.full((1, 2, 2), 2.0), columns=1)
    content, names, at = (tmp_path / "grid.png").read_bytes(), [], 8
    while at < len(content):
        [size] = struct.unpack(">I", content[at : at + 4])
        body, end = content[at + 4 : at + 8 + size], at + 12 + size
        assert struct.unpack(">I", content[end - 4 : end]) == (zlib.crc32(body),)
        names.append(body[:4])
        at = end
    assert names == [b"IHDR", b"IDAT", b"IEND"]
