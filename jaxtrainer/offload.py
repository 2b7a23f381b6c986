"""Optimiser state that lives in the host's memory, and is on the device while it is used.

Imports `errors` and `types` only.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrainer.errors import ConfigError
from jaxtrainer.types import PyTree

HOST = "pinned_host"
"""The memory of the host that a device reads and writes by itself."""


def refuse_offload(mesh: Mesh) -> None:
    """Raise ConfigError unless the devices of a mesh can reach the host's memory."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"offload_optimizer=True: {device.device_kind} has no memory of the kind {HOST!r}, "
            f"only {', '.join(map(repr, kinds))}. Leave it out; to divide the optimiser's state "
            "over several devices is what a mesh is for."
        )


def hosted(specs: PyTree) -> PyTree:
    """Return the specs of arrays that live on the host, but for scalars, which are not worth it."""

    def spec(x: Any) -> Any:
        if not x.shape:
            return x
        sharding = x.sharding.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(spec, specs)


def is_hosted(spec: Any) -> bool:
    """Return whether an array of that spec lives on the host."""
    return spec.sharding.memory_kind == HOST


def to_device(tree: PyTree) -> PyTree:
    """Copy hosted arrays to the device (traced)."""
    return _moved(tree, jax.memory.Space.Device)


def to_host(tree: PyTree) -> PyTree:
    """Copy arrays back to the host (traced)."""
    return _moved(tree, jax.memory.Space.Host)


def _moved(tree: PyTree, space: Any) -> PyTree:
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.shape else x, tree)
