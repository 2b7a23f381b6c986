"""The persistent cache of compiled programs, and how often it was hit. Imports nothing here."""

from __future__ import annotations

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


def use_compilation_cache(directory: Path) -> None:
    """Keep every compiled program on disk, unless the user has chosen a cache already."""
    if not _listening:
        jax.monitoring.register_event_listener(_count)
        _listening.append(True)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # Small programs too: an eager one-liner costs tens of milliseconds to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _count(event: str, **_: str | int) -> None:
    COUNTS.hits += event == _HIT
    COUNTS.misses += event == _MISS
