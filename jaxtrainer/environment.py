"""The machine and the libraries that a run had: nothing that names a host or a user.

Imports `memory` only, and metadata of installed packages.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxtrainer.memory import host_bytes

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy", "rich")


def environment() -> dict[str, str]:
    """Return versions, devices and what is known of the host, as short texts by name."""
    return {
        "jaxtrainer": version_of("jaxtrainer") or "not installed",
        "python": platform.python_version(),
        **{name: version_of(name) or "not installed" for name in LIBRARIES},
        "devices": describe_devices(jax.devices()),
        "processes": str(jax.process_count()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": str(num_cores()),
        "memory": f"{host_bytes() / 2**30:.1f} GiB",
    }


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_devices(devices: Iterable[Any]) -> str:
    """Return `8 x cpu` or `4 x gpu (NVIDIA H100)`."""
    kinds = Counter((device.platform, device.device_kind) for device in devices)
    return ", ".join(
        f"{count} x {name}" if name == kind else f"{count} x {name} ({kind})"
        for (name, kind), count in kinds.items()
    )


def num_cores() -> int:
    """Return the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Return the model of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
