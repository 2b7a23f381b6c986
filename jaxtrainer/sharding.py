"""The device mesh, and where state and batches live on it.

Imports `errors` and `types` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.types import PyTree

DATA_AXES = ("data", "fsdp")


def build_mesh(mesh: Mapping[str, int] | Mesh | None) -> Mesh:
    """Return the mesh over all devices of all processes.

    Args:
        mesh: Axis sizes, one of them -1 for "the rest" (`{"data": -1}`, the default), or a Mesh.

    Raises:
        ConfigError: If the sizes do not make up the devices there are.
    """
    if isinstance(mesh, Mesh):
        # The compiler divides what is computed, also on a mesh of `jax.make_mesh`, whose axes
        # are explicit and would ask the model to say it.
        return Mesh(mesh.devices, mesh.axis_names)
    if not isinstance(mesh, Mapping | None):
        raise ConfigError(f"mesh={mesh!r}: pass axis sizes, `mesh={{'data': 2}}`, or a Mesh.")
    sizes = dict(mesh or {"data": -1})
    for axis in sizes:
        if axis not in DATA_AXES and (hint := did_you_mean(axis, DATA_AXES)):
            raise ConfigError(f"mesh={sizes} divides no batch: no axis is called {axis!r}.{hint}")
    devices = jax.devices()
    fixed = int(np.prod([n for n in sizes.values() if n != -1]))
    if list(sizes.values()).count(-1) > 1 or fixed < 1 or len(devices) < fixed:
        raise ConfigError(
            f"mesh={sizes} does not fit the {len(devices)} devices there are; "
            'at most one axis may be -1: `mesh={"data": -1}`.'
        )
    sizes = {name: len(devices) // fixed if n == -1 else n for name, n in sizes.items()}
    count = int(np.prod(list(sizes.values())))
    return Mesh(arranged(devices[:count], sizes), tuple(sizes))


def arranged(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Return devices in the shape of a mesh, so that slow links carry little.

    Along the axes that divide the batch devices exchange gradients, once a step; along others
    activations, in each layer. So the former lie across hosts (or slices), as far as they can, and
    the latter within one. Within a TPU slice neighbours in the mesh are neighbours in its torus.
    Elsewhere the order is that of JAX.
    """
    hosts = {_host_of(device) for device in devices}
    across, left = dict.fromkeys(sizes, 1), len(hosts)
    for axis in sorted(sizes, key=lambda axis: (*DATA_AXES, axis).index(axis)):
        across[axis] = math.gcd(sizes[axis], left)
        left //= across[axis]
    shape = tuple(sizes.values())
    if len(hosts) > 1 and left == 1:
        within = [size // across[axis] for axis, size in sizes.items()]
        by_process = isinstance(next(iter(hosts))[0], str)
        return mesh_utils.create_hybrid_device_mesh(
            within, tuple(across.values()), devices, process_is_granule=by_process
        )
    if devices[0].platform == "tpu" and len(devices) == jax.device_count():
        return mesh_utils.create_device_mesh(shape, devices)
    return np.array(devices).reshape(shape)


def num_data_shards(mesh: Mesh) -> int:
    """Return over how many parts of the mesh a batch is divided."""
    return int(np.prod([mesh.shape[a] for a in DATA_AXES if a in mesh.shape]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return abstract arrays that live whole on every device of the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _host_of(device: Any) -> tuple[Any, ...]:
    """Return what tells the hosts of devices apart: slices joined by a network, or processes."""
    slice_index = getattr(device, "slice_index", None)
    return ("process", device.process_index) if slice_index is None else (slice_index,)


def batch_sharding(mesh: Mesh, batch_size: int, *, stacked: bool) -> NamedSharding:
    """Return where a batch lives: rows divided over the data axes, or whole on each device.

    A batch that does not divide evenly (the last one of an evaluation) is padded by the feed and
    cut to its rows in the step, so that no row is dropped and none counts twice.

    Args:
        mesh: The device mesh.
        batch_size: Rows of the batch, with its padding.
        stacked: Whether batches are stacked along a leading axis, `[steps, batch, ...]`.
    """
    axes = tuple(a for a in DATA_AXES if a in mesh.shape)
    if not axes or batch_size % num_data_shards(mesh):
        return replicated(mesh)
    return NamedSharding(mesh, P(None, axes) if stacked else P(axes))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raise ConfigError if a training batch does not divide over the mesh."""
    shards = num_data_shards(mesh)
    if batch_size % shards:
        raise ConfigError(
            f"a batch of {batch_size} rows does not divide over {shards} devices; use a multiple "
            f'of {shards}, or fewer devices: `Trainer(mesh={{"data": 1}})`.'
        )


def is_lockstep(mesh: Mesh) -> bool:
    """Return whether each dispatch must end before the next: on several CPU devices of a process.

    Their collectives wait for each other on the threads of one pool; with more programs queued
    the last thread can be taken by one of those, and XLA aborts the process after 40 s.
    """
    return mesh.devices.flat[0].platform == "cpu" and len(mesh.local_devices) > 1


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Put a pytree of host arrays on the devices; each process has the arrays whole."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: _placed(x, sharding), tree)


def _placed(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable:
            return x if x.sharding == sharding else jax.jit(lambda a: a, out_shardings=sharding)(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            words = _placed(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    # Not `device_put`, which compares the arrays of all processes: that is a collective, and the
    # feed's thread would run it at another place among the others than its peers.
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
