"""The persistent cache of compiled programs, and how often it was hit. Imports nothing here."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import jax

_HIT = "/jax/compilation_cache/cache_hits"
_MISS = "/jax/compilation_cache/cache_misses"


@dataclass
class CacheCounts:
    """Programs found in the cache, and compiled because they were not."""

    hits: int = 0
    misses: int = 0


COUNTS = CacheCounts()
"""Counted over the process, from the first use of the cache on."""

_listening: list[bool] = []


def use_compilation_cache(directory: Path) -> bool:
    """Keep every compiled program on disk, unless the user has chosen a cache already.

    Returns:
        Whether there is a cache now; without one that can be written, JAX would warn each time.
    """
    if not _listening:
        jax.monitoring.register_event_listener(_count)
        _listening.append(True)
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return True
    if not _can_write(directory):
        return False
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Small programs too: an eager one-liner costs tens of milliseconds to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return True


def default_directory() -> Path | None:
    """Return a directory in the user's cache, one for each kind of CPU; None without a home.

    XLA's keys do not tell CPUs apart, and code for one may not run on another that shares the
    home directory.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "jaxtrainer" / "xla" / _cpu_name()


def _cpu_name() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        first = platform.processor()
    # `flags` on x86, `Features` on Arm.
    kept = [line for line in first.splitlines() if line.startswith(("model name", "flags", "Feat"))]
    digest = hashlib.sha256("\n".join(kept or [first]).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


def _can_write(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)


def _count(event: str, **_: str | int) -> None:
    COUNTS.hits += event == _HIT
    COUNTS.misses += event == _MISS
