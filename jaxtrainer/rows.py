"""Which rows of a batch a process holds, and how they come onto its devices.

All processes read one order of samples. Of each batch a process needs the rows of its own devices,
which the mesh says, and not its index: a mesh may have its devices in any order. May import levels
0 and 1.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrainer.sharding import batch_sharding, num_data_shards
from jaxtrainer.types import PyTree


class Held(NamedTuple):
    """The part of a batch that the devices of a process hold.

    Attributes:
        rows: Which rows of the batch, ascending, int32.
        padding: Rows of no meaning that come after them.
        places: Where all of them are in the batch with its padding, ascending.
    """

    rows: np.ndarray
    padding: int
    places: np.ndarray

    def of(self, leaf: Any) -> np.ndarray:
        """Return the part of a leaf `[batch, ...]`: `[held, ...]`, zeros where it is padding."""
        array = np.asarray(leaf)
        # Most often the rows follow one another: a slice copies nothing.
        first, count = (int(self.rows[0]) if len(self.rows) else 0), len(self.rows)
        follow = count == 0 or int(self.rows[-1]) - first + 1 == count
        return self.padded(array[first : first + count] if follow else array[self.rows])

    def padded(self, part: Any) -> np.ndarray:
        """Return a part `[rows, ...]` with its padding."""
        array = np.asarray(part)
        if not self.padding:
            return array
        return np.concatenate([array, np.zeros((self.padding, *array.shape[1:]), array.dtype)])

    def of_indices(self, block: np.ndarray) -> np.ndarray:
        """Return the part of indices `[batches, batch]`, 0 where it is padding."""
        return np.pad(block[:, self.rows], ((0, 0), (0, self.padding)))


def padded_rows(mesh: Mesh, rows: int) -> int:
    """Return how many rows a batch has when each device gets as many.

    Example:
        >>> padded_rows(jax.make_mesh((1,), ("data",)), 5)
        5
    """
    shards = num_data_shards(mesh)
    return -(-rows // shards) * shards


@functools.lru_cache(maxsize=256)
def held_rows(mesh: Mesh, rows: int, devices: tuple[Any, ...] | None = None) -> Held:
    """Return which rows of a batch the devices of this process hold.

    Args:
        mesh: All devices.
        rows: Rows of the batch.
        devices: Those of the process, if it is another one.
    """
    padded = padded_rows(mesh, rows)
    where = batch_sharding(mesh, padded, stacked=False).devices_indices_map((padded,))
    mine = mesh.local_devices if devices is None else devices
    blocks = sorted({where[device][0].indices(padded)[:2] for device in mine})
    places = np.concatenate([np.arange(*block, dtype=np.int32) for block in blocks])
    held = places[places < rows]
    return Held(held, len(places) - len(held), places)


def place_chunk(tree: PyTree, mesh: Mesh, rows: int) -> PyTree:
    """Put a chunk of batches on the devices.

    Args:
        tree: Leaves `[capacity, held, ...]`, NumPy: of each batch the part that `held_rows` says.
        mesh: All devices.
        rows: Rows of a batch.

    Returns:
        Leaves `[capacity, padded, ...]`, the batches divided over the devices.
    """
    padded = padded_rows(mesh, rows)
    sharding = batch_sharding(mesh, padded, stacked=True)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    places = held_rows(mesh, rows).places

    def place(leaf: np.ndarray) -> jax.Array:
        def block(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(padded)
            at = int(np.searchsorted(places, start))
            return leaf[:, at : at + stop - start]

        shape = (leaf.shape[0], padded, *leaf.shape[2:])
        return jax.make_array_from_callback(shape, sharding, block)

    return jax.tree.map(place, tree)


def with_rows(spec: PyTree, rows: int) -> PyTree:
    """Return the spec of a batch with another number of rows."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), spec)


def digest_of(batch: PyTree) -> str:
    """Return a digest of a batch's numbers."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(batch):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def first_rows(batches: Sequence[PyTree]) -> str:
    """Return a digest of the first row of each batch, which costs little whatever their size."""
    return digest_of([jax.tree.map(lambda a: np.asarray(a[:1]), batch) for batch in batches])


def local_batch(chunk: jax.Array, index: int, num_held: int) -> Any:
    """Return one batch of a leaf `[capacity, padded, ...]`, as far as this process holds it.

    Args:
        chunk: A leaf of a chunk, on the devices.
        index: Of the batch.
        num_held: Rows of it that are here.
    """
    if chunk.is_fully_addressable:
        batch = chunk[index]
        return batch if len(batch) == num_held else batch[:num_held]
    blocks = {s.index[1].indices(chunk.shape[1])[0]: s.data for s in chunk.addressable_shards}
    return np.concatenate([np.asarray(blocks[i][index]) for i in sorted(blocks)])[:num_held]


def of_this_process(array: Any) -> Any:
    """Return an array as one that needs no other process, if each device holds it whole."""
    is_whole = isinstance(array, jax.Array) and array.is_fully_replicated
    return on_this_process(array) if is_whole else array


def on_this_process(array: jax.Array) -> jax.Array:
    """Return an array that every device holds whole as one that needs no other process."""
    return array if array.is_fully_addressable else array.addressable_data(0)
