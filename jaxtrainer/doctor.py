"""`jaxtrainer doctor`: whether this machine can train, and what to do where it cannot.

Imports of the package happen inside the checks, so that a broken library is one line of the list.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "note", "warn", "fail"]
_STYLES: dict[Status, str] = {"ok": "green", "note": "dim", "warn": "yellow", "fail": "bold red"}

OLDEST = {
    "jax": "0.10",
    "jaxlib": "0.10",
    "flax": "0.12.8",
    "optax": "0.2.8",
    "grain": "0.2.18",
    "orbax-checkpoint": "0.12.8",
    "rich": "14",
    "numpy": "2",
}
"""The versions that the package needs at least."""

_SWITCHES = {
    "JAX_DISABLE_JIT": "nothing is compiled, which is many times slower",
    "JAX_DEBUG_NANS": "every result is checked on the host, which is slow; `NonFinite` is not",
    "JAX_DEBUG_INFS": "every result is checked on the host, which is slow; `NonFinite` is not",
    "JAX_CHECK_TRACER_LEAKS": "tracing takes several times longer",
    "JAX_LOG_COMPILES": "every compilation prints lines",
}
"""Variables of JAX that are for finding faults, and what they cost."""

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor.

    Attributes:
        status: `"fail"`: no training; `"warn"`: slower, or not as meant; `"note"`: optional.
        name: What was looked at.
        text: What was found.
        advice: What to do; empty if there is nothing.
    """

    status: Status
    name: str
    text: str
    advice: str = ""


Findings = Iterator[Finding]


def examine(environ: Mapping[str, str] | None = None, directory: Path | None = None) -> Findings:
    """Yield the findings, each when it is there; no check stops those after it.

    Args:
        environ: The environment's variables; None for those of this process.
        directory: Where runs would be kept; None for the current one.
    """
    environ = os.environ if environ is None else environ
    directory = Path.cwd() if directory is None else directory
    checks: dict[str, Callable[[], Findings]] = {
        "versions": check_versions,
        "devices": lambda: check_devices(environ),
        "computation": check_computation,
        "compilation cache": check_cache,
        "disk": lambda: check_disk(directory),
        "variables": lambda: check_variables(environ),
        "extras": check_extras,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # of whatever is broken, which is what a doctor is for
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            yield Finding(
                status="fail",
                name=name,
                text=text,
                advice="install anew in a fresh environment: `pip install --force-reinstall "
                "jaxtrainer`",
            )


def check_versions() -> Findings:
    """Look at Python and the libraries, one by one and together."""
    found = {name: _version(name) for name in OLDEST}
    known = [f"{name} {version}" for name, version in found.items() if version is not None]
    text = ", ".join([f"Python {platform.python_version()}", *known])
    yield Finding(status="ok", name="versions", text=text)
    own = _version("jaxtrainer")
    if own is None:
        advice = "run `pip install .` in its folder, for the command and the extras"
        yield Finding(status="note", name="jaxtrainer", text="not installed", advice=advice)
    else:
        yield Finding(status="ok", name="jaxtrainer", text=own)
    for name, oldest in OLDEST.items():
        yield from judge_version(name, found[name], oldest)
    yield from check_pair(found["jax"], found["flax"])


def check_pair(jax: str | None, flax: str | None) -> Findings:
    """Look whether JAX and Flax suit each other: Flax up to 0.12.8 breaks on JAX from 0.11 on."""
    if jax and flax and _parsed(jax) >= (0, 11) and _parsed(flax) < (0, 12, 12):
        yield Finding(
            status="fail",
            name="jax with flax",
            text=f"flax {flax} does not work with jax {jax}",
            advice="`pip install --upgrade 'flax>=0.12.12'` (Python 3.12 or newer), or "
            "`pip install 'jax<0.11'`",
        )


def check_devices(environ: Mapping[str, str]) -> Findings:
    """Look for the devices that JAX finds, and for a GPU that it does not."""
    jax = importlib.import_module("jax")
    describe = importlib.import_module("jaxtrainer.environment").describe_devices
    devices = jax.devices()
    text = describe(devices)
    if devices[0].platform != "cpu" or not _has_nvidia():
        yield Finding(status="ok", name="devices", text=text)
    elif "JAX_PLATFORMS" in environ or environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        advice = "unset JAX_PLATFORMS and CUDA_VISIBLE_DEVICES to use it"
        yield Finding(status="warn", name="devices", text=f"{text}; a GPU is there", advice=advice)
    else:
        advice = "`pip install 'jaxtrainer[cuda]'` (`[cuda12]` for drivers with CUDA 12 only)"
        text = f"{text}; an NVIDIA GPU is there that JAX cannot use"
        yield Finding(status="warn", name="devices", text=text, advice=advice)


def check_computation() -> Findings:
    """Compile a tiny program, run it and compare its result."""
    jax = importlib.import_module("jax")
    jnp = importlib.import_module("jax.numpy")
    start = time.monotonic()
    total = float(jax.jit(lambda x: (x @ x.T).sum())(jnp.ones((8, 8), jnp.float32)))
    spent = time.monotonic() - start
    if total != 512.0:
        advice = "the device or its driver computes wrongly: update the driver, try another device"
        text = f"8x8 products sum to {total}, expected 512"
        yield Finding(status="fail", name="computation", text=text, advice=advice)
    else:
        text = f"compiled and ran a program in {spent:.2f} s"
        yield Finding(status="ok", name="computation", text=text)


def check_cache() -> Findings:
    """Look whether compiled programs can be kept, and how large the cache is."""
    jax = importlib.import_module("jax")
    cache = importlib.import_module("jaxtrainer.cache")
    chosen = jax.config.values["jax_compilation_cache_dir"] or cache.default_directory()
    name = "compilation cache"
    if chosen is None or not _is_writable(Path(chosen)):
        advice = "pass `Trainer(compilation_cache='a/directory')`, or set XDG_CACHE_HOME to one"
        text = f"{chosen or 'no home directory'} cannot be written: every run compiles anew"
        yield Finding(status="warn", name=name, text=text, advice=advice)
        return
    files = [file.stat().st_size for file in Path(chosen).glob("*") if file.is_file()]
    text = f"{chosen}: {len(files)} files, {sum(files) / _GIB:.2f} GiB"
    if sum(files) > 10 * _GIB:
        advice = f"it may be deleted at any time: `rm -r {chosen}`"
        yield Finding(status="warn", name=name, text=text, advice=advice)
    else:
        yield Finding(status="ok", name=name, text=text)


def check_disk(directory: Path) -> Findings:
    """Look for room for checkpoints, and for the right to write them."""
    free = shutil.disk_usage(directory).free / _GIB
    text = f"{free:.1f} GiB free in {directory}"
    if not os.access(directory, os.W_OK | os.X_OK):
        advice = "start from a directory of yours, or pass `Trainer(default_root_dir=...)`"
        text = f"{directory} cannot be written"
        yield Finding(status="warn", name="disk", text=text, advice=advice)
    elif free < 1.0:
        advice = "make room, or keep runs elsewhere with `Trainer(default_root_dir=...)`"
        yield Finding(status="warn", name="disk", text=text, advice=advice)
    else:
        yield Finding(status="ok", name="disk", text=text)


def check_variables(environ: Mapping[str, str]) -> Findings:
    """Look for variables of the environment that change what JAX does."""
    found: list[Finding] = []

    def tell(status: Status, name: str, what: str, advice: str) -> None:
        text = f"{name}={environ[name]}: {what}"
        found.append(Finding(status=status, name="variable", text=text, advice=advice))

    for name, cost in _SWITCHES.items():
        if _is_on(environ.get(name)):
            tell("warn", name, cost, f"`unset {name}` unless you look for a fault")
    if "JAX_PLATFORMS" in environ:
        tell("note", "JAX_PLATFORMS", "other devices are not used", "")
    if _is_on(environ.get("JAX_ENABLE_X64")):
        tell("note", "JAX_ENABLE_X64", "arrays may have 64 bits, which is slower", "")
    if environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false"):
        advice = "`unset JAX_ENABLE_COMPILATION_CACHE`"
        tell("warn", "JAX_ENABLE_COMPILATION_CACHE", "every run compiles anew", advice)
    if "host_platform_device_count" in environ.get("XLA_FLAGS", ""):
        advice = "`unset XLA_FLAGS` for training: several devices on one CPU are for tests"
        tell("warn", "XLA_FLAGS", "the CPU is divided into devices", advice)
    elif environ.get("XLA_FLAGS"):
        tell("note", "XLA_FLAGS", "changes what is compiled", "")
    yield from found or [Finding(status="ok", name="variables", text="none changes what JAX does")]


def check_extras() -> Findings:
    """Look which optional packages are there."""
    try:
        requirements = metadata.requires("jaxtrainer") or []
    except metadata.PackageNotFoundError:
        return
    for extra, packages in sorted(extras_of(requirements).items()):
        missing = [name for name in packages if _version(name) is None]
        if missing:
            text = f"without {', '.join(missing)}"
            advice = f"if you want it: `pip install 'jaxtrainer[{extra}]'`"
            yield Finding(status="note", name=f"extra {extra}", text=text, advice=advice)
        else:
            text = ", ".join(f"{name} {_version(name)}" for name in packages)
            yield Finding(status="ok", name=f"extra {extra}", text=text)


def extras_of(requirements: list[str]) -> dict[str, list[str]]:
    """Return the packages of each extra; those of JAX itself are seen by its devices.

    Example:
        >>> extras_of(["rich>=14", "gcsfs>=1; extra == 'gcs'", "jax[cuda13]; extra == 'cuda'"])
        {'gcs': ['gcsfs']}
    """
    found: dict[str, list[str]] = {}
    for requirement in requirements:
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", requirement)
        if package and extra and package[0] not in ("jax", "jaxtrainer"):
            found.setdefault(extra[1], []).append(package[0])
    return found


def show(findings: Findings, console: Console | None = None) -> int:
    """Print findings as they come, and what they come to; return 1 if one of them fails, else 0."""
    console = console or Console(highlight=False)
    counts: dict[Status, int] = dict.fromkeys(_STYLES, 0)
    for finding in findings:
        counts[finding.status] += 1
        _print(console, finding)
    if counts["fail"]:
        console.print(f"{counts['fail']} of these must be put right before a run can work.")
        return 1
    warned = f", {counts['warn']} to look at" if counts["warn"] else ""
    console.print(f"ready to train{warned}")
    return 0


def _print(console: Console, finding: Finding) -> None:
    lines = [f"{finding.name}: {finding.text}", *filter(None, [finding.advice])]
    if not console.is_terminal:
        # A log has no width.
        for word, line in zip((finding.status, ""), lines, strict=False):
            console.print(Text(f"{word:<5}{line}"), soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(width=5, style=_STYLES[finding.status])
    grid.add_column(overflow="fold")
    for word, line in zip((finding.status, ""), lines, strict=False):
        grid.add_row(word, Text(line))
    console.print(grid)


def show_devices(console: Console | None = None) -> int:
    """Print the devices, their memory, and the meshes that suit them; return 0."""
    jax = importlib.import_module("jax")
    console = console or Console(highlight=False)
    devices = jax.devices()
    for device in devices:
        console.print(Text(describe_device(device)))
    for line in suggested_meshes(len(devices)):
        console.print(Text(line))
    return 0


def describe_device(device: Any) -> str:
    """Return a line about a device: kind, memory, peak rate and process."""
    peak = importlib.import_module("jaxtrainer.peaks").peak_of(device.device_kind)
    stats = device.memory_stats() or {}
    parts = [f"{device.platform}:{device.id}"]
    if device.device_kind != device.platform:
        parts.append(device.device_kind)
    if "bytes_limit" in stats:
        used = stats.get("bytes_in_use", 0) / _GIB
        parts.append(f"{stats['bytes_limit'] / _GIB:.1f} GiB, {used:.1f} GiB in use")
    if peak is not None and peak.bf16 is not None:
        parts.append(f"{peak.bf16 / 1e12:.0f} TFLOP/s bfloat16")
    if device.process_index:
        parts.append(f"process {device.process_index}")
    return "  ".join(parts)


def suggested_meshes(count: int) -> list[str]:
    """Return lines about the meshes for so many devices."""
    if count == 1:
        return ["One device: leave `mesh` out of the `Trainer`."]
    return [
        f'All {count} share each batch: Trainer(mesh={{"data": {count}}}), the default.',
        f'A model too large for one: kept in {count} parts by Trainer(mesh={{"fsdp": {count}}}).',
    ]


def judge_version(name: str, version: str | None, oldest: str) -> Findings:
    """Yield what is wrong with the version of a library, if anything."""
    if version is None:
        advice = f"`pip install '{name}>={oldest}'`"
        yield Finding(status="fail", name=name, text="not installed", advice=advice)
    elif _parsed(version) < _parsed(oldest):
        advice = f"`pip install --upgrade '{name}>={oldest}'`"
        text = f"{version}, needs {oldest} or newer"
        yield Finding(status="fail", name=name, text=text, advice=advice)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _is_on(value: str | None) -> bool:
    return value is not None and value.lower() not in ("", "0", "false", "off")


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def _is_writable(directory: Path) -> bool:
    while not directory.exists():
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)
