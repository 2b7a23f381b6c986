"""Meshes of more devices than there are, to compile for and not to run on.

May import level 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxlib import xla_client

from jaxtrainer.errors import ConfigError

MAX_DEVICES = 2048
"""Devices that one process can have of a CPU client: XLA numbers them so."""


def planned_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Return a mesh to plan for: of the devices there are, or virtual ones if they are too few.

    Virtual devices are those of a further CPU client of XLA in this process. A program can be
    compiled for them as for any; they hold no memory, and only their number is real.

    Args:
        sizes: Axis sizes, each 1 or more.

    Raises:
        ConfigError: If there are more devices in it than can be numbered.
    """
    count = math.prod(sizes.values())
    if count > MAX_DEVICES:
        raise ConfigError(
            f"mesh={dict(sizes)} has {count:,} devices, and a plan can have {MAX_DEVICES:,} at "
            "most. Divide `data` and the batch by the same number: what each device holds, "
            "computes and sends stays the same, but for the ring's (n - 1) / n."
        )
    there = jax.devices()
    devices = there[:count] if count <= len(there) else _devices(count)
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes))


def is_virtual(mesh: Mesh) -> bool:
    """Return whether the devices of a mesh are virtual."""
    return mesh.devices.flat[0].client is not jax.devices()[0].client


@functools.lru_cache(maxsize=8)
def _devices(count: int) -> tuple[Any, ...]:
    # Kept: a program does not keep the client that it was compiled for.
    return tuple(xla_client.make_cpu_client(num_devices=count).devices())
