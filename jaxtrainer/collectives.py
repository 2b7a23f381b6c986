"""What a compiled program sends between devices: its collectives, read from the text of its HLO.

Knows that text and meshes, nothing of training. Imports nothing of the package.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OPERATIONS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_LINE = re.compile(
    r"^\s*(?:ROOT )?%?(\S+) = (.*?) (" + "|".join(map(re.escape, OPERATIONS)) + r")(-start)?\((.*)$"
)
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=(\{[^}]*\}|%[^\s,)]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_AXES = re.compile(
    r"replica_groups=(?:@?\w*)mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([\d,]*\))?)\))?\s*"
    r"\{([^}]*)\}"
)
_ORDER = re.compile(r"^\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One operation of a program in which devices exchange data.

    Attributes:
        op: What it does, one of `OPERATIONS`.
        name: Its name in the program.
        shapes: Dtype (as XLA writes it) and shape of each result on one device. The compiler puts
            small operations together, and then there are several.
        groups: Which devices exchange data with each other, as positions in the mesh's devices.
            Of a permutation the pairs `(from, to)`; empty where the text does not say.
        times: How often it runs in one call of the program, as far as the trip counts of the
            loops around it are known; the body of any other loop counts once.
        scope: Name of the traced operation that it comes from.
    """

    op: str
    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[int, ...], ...]
    times: int = 1
    scope: str = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each result on one device."""
        return tuple(_bits(kind) * math.prod(shape) // 8 for kind, shape in self.shapes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all results on one device."""
        return sum(self.sizes)

    @property
    def group_size(self) -> int:
        """Devices that exchange data with each other."""
        return len(self.groups[0]) if self.groups else 1

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in one run of it, by the ring algorithm.

        References:
            Patarasu, Yuan, "Bandwidth optimal all-reduce algorithms", 2009.
        """
        n = self.group_size
        if self.op == "collective-permute":
            return float(self.size_bytes)
        if self.op == "reduce-scatter":
            return float(self.size_bytes * (n - 1))
        rounds = 2 if self.op == "all-reduce" else 1
        return rounds * self.size_bytes * (n - 1) / n

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Return the axes of the mesh along which its devices lie; empty if it is none of them.

        Args:
            mesh: Axis sizes in order, `mesh.shape`.
        """
        devices = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
        wanted = {frozenset(group) for group in self.groups}
        wide = [axis for axis, size in mesh.items() if size > 1]
        for count in range(1, len(wide) + 1):
            for axes in itertools.combinations(wide, count):
                chosen = [list(mesh).index(axis) for axis in axes]
                if {frozenset(g) for g in _along(devices, chosen)} == wanted:
                    return axes
        return ()


def collectives(hlo: str) -> list[Collective]:
    """Return the collectives of a compiled program, in the order of its text.

    Args:
        hlo: `compiled.as_text()`.

    Example:
        >>> line = "%x = f32[8,4]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}"
        >>> [found] = collectives(line)
        >>> found.op, found.size_bytes, found.group_size, found.axes({"data": 2, "fsdp": 4})
        ('all-gather', 128, 4, ('fsdp',))
    """
    times = _times(hlo)
    found, computation = [], ""
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            computation = head[2]
        elif match := _LINE.match(line):
            found.append(_collective(match, line, times.get(computation, 1)))
    return found


def _collective(match: re.Match[str], line: str, times: int) -> Collective:
    name, result, op, started, _ = match.groups()
    shapes = [
        (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _SHAPE.findall(result)
    ]
    # What has been started has its operands, and some room of its own, beside the results.
    if started and op != "all-reduce" and len(shapes) > 1:
        shapes = [s for s in shapes if s[0] != "u32" or s[1]]
        shapes = shapes[len(shapes) // 2 :]
    scope = _SCOPE.search(line)
    return Collective(
        op=op,
        name=name,
        shapes=tuple(shapes),
        groups=_groups(line),
        times=times,
        scope=scope[1] if scope else "",
    )


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    if found := _IOTA.search(line):
        shape, dims, order = (_numbers(part or "") for part in found.groups())
        return _rows(_counted(dims, order).reshape(shape))
    if found := _AXES.search(line):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        names = re.findall(r"'([^']+)'(:\(\d+\)\d+)?", found[3])
        # A part of an axis is in no program that has been seen; better unknown than wrong.
        if any(part for _, part in names):
            return ()
        devices = _ordered(found[2], math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return _along(devices, [list(sizes).index(name) for name, _ in names])
    if found := _LISTED.search(line) or _PAIRS.search(line):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1]))
    return ()


def _ordered(ids: str | None, count: int) -> np.ndarray:
    """Return devices in the order that a mesh in the text lists them."""
    if ids is None:
        return np.arange(count)
    if found := _ORDER.match(ids):
        return _counted(_numbers(found[1]), _numbers(found[2] or ""))
    return np.array(_numbers(ids.replace(" ", "")))


def _counted(dims: Sequence[int], order: Sequence[int]) -> np.ndarray:
    devices = np.arange(math.prod(dims)).reshape(dims)
    return devices.transpose(order) if order else devices


def _along(devices: np.ndarray, axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices that differ in these axes only."""
    last = np.moveaxis(devices, axes, range(-len(axes), 0))
    size = math.prod(devices.shape[axis] for axis in axes)
    return _rows(last.reshape(-1, size))


def _rows(devices: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in row) for row in devices)


def _times(hlo: str) -> dict[str, int]:
    """Return how often each computation runs, by its name."""
    callers: dict[str, list[tuple[str, int]]] = {}
    computation = ""
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            computation = head[2]
            continue
        for called in _called(line):
            trips = _TRIPS.search(line)
            callers.setdefault(called, []).append((computation, int(trips[1]) if trips else 1))
    return {name: _runs(name, callers) for name in callers}


def _called(line: str) -> Iterator[str]:
    for names in _CALLED.findall(line):
        yield from re.findall(r"%([^\s,}]+)", names)


def _runs(name: str, callers: Mapping[str, Sequence[tuple[str, int]]]) -> int:
    if name not in callers:
        return 1
    return sum(_runs(caller, callers) * trips for caller, trips in callers[name])


def _bits(kind: str) -> int:
    """Return the bits of a number of an XLA type, such as `bf16`, `s32`, `f8e4m3fn`."""
    digits = re.match(r"[a-z]+(\d+)", kind)
    return _BITS[kind] if kind in _BITS else int(digits[1]) if digits else 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
