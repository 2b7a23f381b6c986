"""How much memory a device can give, and the words by which it says that it cannot.

Imports nothing of the package.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_STATM = Path("/proc/self/statm")


def free_bytes(devices: Sequence[Any]) -> int:
    """Return the bytes that each of the devices can still give out, the least of them.

    CPU devices share the memory of the host, all of it counted: what other programs hold of it
    now says little about later.

    Args:
        devices: Devices of this process.
    """
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)
    return host_bytes() // len(devices)


def total_bytes(devices: Sequence[Any]) -> int:
    """Return the memory that each of the devices has for this process, the least of them."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] for s in stats)
    return host_bytes() // len(devices)


def host_bytes() -> int:
    """Return the memory that this process may use: the host's, or its container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def rss_bytes() -> int:
    """Return the memory of the host that this process has now; 0 where the system does not say."""
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of JAX, or of NumPy, says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    is_jax = isinstance(error, jax.errors.JaxRuntimeError)
    return is_jax and ("RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower())
