"""The MNIST digits as NumPy arrays, read from the IDX files in data/mnist and verified.

What a step is to do with them first is here too, as functions for `device_transform`.

Standard library and NumPy only; batching and shuffling are left to the loader.
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Split = dict[str, np.ndarray]
NUM_PIXELS, NUM_CLASSES = 28 * 28, 10

DATA_DIR = Path(__file__).parent / "data" / "mnist"

# File name without .gz -> digest of the uncompressed file, so that compressing anew does no harm.
# In the order in which `load_mnist` unpacks them.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class MnistFileError(ValueError):
    """A data file is missing, damaged, or not the one expected."""

    def __init__(self, path: Path, received: str, expected: str) -> None:
        super().__init__(
            f"{path}: received {received}, expected {expected}. Restore the shipped files with "
            "`git checkout -- recipes/data/mnist`, or name the folder that holds them: "
            "`load_mnist(root)`."
        )


def load_mnist(root: str | Path = DATA_DIR) -> tuple[Split, Split]:
    """Reads the four MNIST files and verifies their checksums.

    Args:
        root: folder with the four `.gz` files.

    Returns:
        `(train, test)` with 60,000 and 10,000 digits, each a dict of
        `image`: [n, 28, 28], uint8, 0 is background and 255 is ink;
        `label`: [n], uint8, the digit 0-9.

    Raises:
        MnistFileError: a file is missing, damaged, or has other contents than the original.
    """
    images, labels, test_images, test_labels = (
        read_idx(Path(root) / f"{name}.gz", sha256=digest) for name, digest in SHA256.items()
    )
    return (
        {"image": images, "label": labels},
        {"image": test_images, "label": test_labels},
    )


def to_float(batch: dict[str, Any]) -> dict[str, Any]:
    """Pixels in a row: [n, 784], float32, from 0 to 1.

    Traced into the step, so that they travel to the device as uint8.
    """
    return {**batch, "image": batch["image"].reshape(-1, NUM_PIXELS).astype(np.float32) / 255}


def to_float_maps(batch: dict[str, Any]) -> dict[str, Any]:
    """The same for convolutions: [n, 28, 28, 1]."""
    return {**batch, "image": batch["image"][..., None].astype(np.float32) / 255}


def read_idx(path: str | Path, *, sha256: str | None = None) -> np.ndarray:
    """Reads one gzip-compressed IDX file.

    The format: two zero bytes, a dtype code, the number of dimensions, each dimension as a
    big-endian uint32, then the values in row-major order, big-endian.

    Args:
        path: the `.gz` file.
        sha256: hexadecimal digest that the uncompressed file must have; None skips the check.

    Returns:
        The values in the shape and dtype that the file declares, in native byte order.

    Raises:
        MnistFileError: the file is missing, damaged, not IDX, of another size than it declares,
            or has another digest.
    """
    path = Path(path)
    content = _decompress(path)
    dtype, shape, start = _parse_header(path, content)
    # math.prod is exact: dimensions from a damaged header would overflow a NumPy integer.
    size_bytes = start + math.prod(shape) * dtype.itemsize
    if len(content) != size_bytes:
        declared = f"{size_bytes} bytes for the declared {dtype.name} {list(shape)}"
        raise MnistFileError(path, f"{len(content)} bytes", declared)
    if sha256 is not None and (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise MnistFileError(path, f"contents with SHA-256 {digest}", sha256)
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))  # a copy: writable, and without the header


def _decompress(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise MnistFileError(path, "no such file", "a gzip-compressed IDX file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        # A cut file ends early, a changed one fails its CRC, a pointer file is no gzip at all.
        raise MnistFileError(path, f"damaged gzip data ({error})", "an intact .gz file") from error


def _parse_header(path: Path, content: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    magic = content[:4]
    code, num_dims = (magic[2], magic[3]) if len(magic) == 4 else (0, 0)
    if magic[:2] != b"\0\0" or code not in IDX_DTYPES or not 1 <= num_dims <= 8:
        expected = f"00 00, a dtype code of {bytes(IDX_DTYPES).hex(' ')}, and 1 to 8 dimensions"
        raise MnistFileError(path, f"magic number '{magic.hex(' ')}'", expected)
    start = 4 + 4 * num_dims
    if len(content) < start:
        expected = f"a header of {start} bytes for {num_dims} dimensions"
        raise MnistFileError(path, f"{len(content)} bytes", expected)
    return np.dtype(IDX_DTYPES[code]), struct.unpack(f">{num_dims}I", content[4:start]), start
