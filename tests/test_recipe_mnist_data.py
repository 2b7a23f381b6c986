"""The MNIST reader: the shipped files are read exactly, and every kind of damage is named."""

import gzip
import shutil
import struct

import numpy as np
import pytest

import mnist_data
from mnist_data import MnistFileError, load_mnist, read_idx

REMEDY = "git checkout -- recipes/data/mnist"
IMAGES = struct.pack(">BBBBII", 0, 0, 0x08, 2, 2, 3) + bytes(range(6))


@pytest.fixture
def write(tmp_path):
    """Writes bytes as a gzip file and gives its path."""

    def write(content):
        path = tmp_path / "digits.gz"
        path.write_bytes(gzip.compress(content))
        return path

    return write


@pytest.fixture
def copied_root(tmp_path):
    """A copy of the label files, which are small; the images are linked."""
    for name in (f"{stem}.gz" for stem in mnist_data.SHA256):
        if "labels" in name:
            shutil.copyfile(mnist_data.DATA_DIR / name, tmp_path / name)
        else:
            (tmp_path / name).symlink_to(mnist_data.DATA_DIR / name)
    return tmp_path


@pytest.fixture(scope="module")
def mnist():
    return load_mnist()


def test_load_mnist_gives_documented_shapes_and_dtypes(mnist):
    for split, size in zip(mnist, (60_000, 10_000), strict=True):
        assert list(split) == ["image", "label"]
        assert split["image"].shape == (size, 28, 28)
        assert split["label"].shape == (size,)
        assert {array.dtype for array in split.values()} == {np.dtype(np.uint8)}
        assert all(array.flags.writeable for array in split.values())


def test_load_mnist_gives_known_label_counts(mnist):
    train, test = (np.bincount(split["label"]).tolist() for split in mnist)
    assert train == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_load_mnist_gives_known_mean_pixel(mnist):
    # Known to five digits, hence the tolerance.
    assert mnist[0]["image"].mean() / 255 == pytest.approx(0.13066, abs=5e-6)


def test_load_mnist_refuses_other_contents(copied_root):
    path = copied_root / "t10k-labels-idx1-ubyte.gz"
    labels = bytearray(gzip.decompress(path.read_bytes()))
    labels[-1] ^= 1
    path.write_bytes(gzip.compress(labels))
    with pytest.raises(MnistFileError, match=r"t10k-labels.*SHA-256.*expected ff7bcfd4"):
        load_mnist(copied_root)


def test_load_mnist_accepts_other_compression(copied_root):
    path = copied_root / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1))
    _, test = load_mnist(copied_root)
    assert test["label"][:5].tolist() == [7, 2, 1, 0, 4]


def test_missing_file_names_path_and_remedy(tmp_path):
    with pytest.raises(MnistFileError, match="no such file") as caught:
        load_mnist(tmp_path)
    assert str(tmp_path / "train-images-idx3-ubyte.gz") in str(caught.value)
    assert REMEDY in str(caught.value)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")],
)
def test_read_idx_reads_every_dtype(write, code, dtype):
    expected = np.arange(-3, 3).reshape(2, 3).astype(dtype)
    header = struct.pack(">BBBBII", 0, 0, code, 2, 2, 3)
    array = read_idx(write(header + expected.astype(f">{dtype}").tobytes()))
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    "magic",
    [b"", b"\0\0\x08", b"\1\0\x08\1", b"\0\0\x0a\1", b"\0\0\x08\0", b"\0\0\x08\xff", b"\x89PNG"],
    ids=["empty", "short", "no_zeros", "unknown_dtype", "no_dims", "many_dims", "other_format"],
)
def test_read_idx_refuses_wrong_magic(write, magic):
    with pytest.raises(MnistFileError, match=rf"received magic number '{magic[:4].hex(' ')}'"):
        read_idx(write(magic + bytes(8) if len(magic) == 4 else magic))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IMAGES[:10], "received 10 bytes, expected a header of 12 bytes for 2 dimensions"),
        (IMAGES[:-1], r"received 17 bytes, expected 18 bytes for the declared uint8 \[2, 3\]"),
        (IMAGES + b"\0", r"received 19 bytes, expected 18 bytes for the declared uint8 \[2, 3\]"),
        (IMAGES[:4] + b"\xff" * 8, r"received 12 bytes, expected 18446744065119617037 bytes"),
    ],
    ids=["short_header", "short_values", "trailing_byte", "absurd_sizes"],
)
def test_read_idx_refuses_wrong_sizes(write, content, message):
    with pytest.raises(MnistFileError, match=message):
        read_idx(write(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: content[:12] + bytes([content[12] ^ 0xFF]) + content[13:],
        lambda content: content[:-8] + bytes(4) + content[-4:],
        lambda content: content + b"trailing",
        lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["cut", "flipped", "wrong_crc", "trailing_bytes", "not_gzip"],
)
def test_read_idx_refuses_damaged_gzip(write, damage):
    path = write(IMAGES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MnistFileError, match="damaged gzip data"):
        read_idx(path)
