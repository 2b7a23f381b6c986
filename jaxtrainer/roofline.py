"""How long a step takes at least, from what it does and what a device and its links can do.

May import levels 0 and 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from jaxtrainer.accelerators import Accelerator
from jaxtrainer.collectives import Collective

Shape = tuple[int, ...]
Bound = Literal["compute", "memory", "communication"]

_HIDDEN = {"data", "fsdp"}
"""Axes whose collectives are of parameters and gradients, and can run beside the computation."""


class Traffic(NamedTuple):
    """The collectives of one kind in a step, along the same axes of the mesh.

    Attributes:
        op: What they do: `"all-reduce"`, `"all-gather"`, `"reduce-scatter"` and so on.
        axes: The axes of the mesh along which devices exchange data; empty where the group is
            none of the mesh's.
        num: How many run in a step.
        size_bytes: Bytes of their results on one device.
        sent_bytes: Bytes that a device sends, by the ring algorithm.
        group: Positions in the mesh of the devices of the first group.
    """

    op: str
    axes: tuple[str, ...]
    num: int
    size_bytes: int
    sent_bytes: float
    group: tuple[int, ...]


def scattered(
    found: Iterable[Collective], mesh: Mapping[str, int], divided: Mapping[Shape, Sequence[str]]
) -> Iterator[Collective]:
    """Yield collectives as a backend for accelerators has them, from those of the one for CPUs.

    On a CPU a gradient of which each device keeps a part is summed whole, and then cut. Elsewhere
    XLA scatters the sum along the axes that divide it, and sums the parts along the others (its
    passes `ReduceScatterCreator` and `AllReduceSplitter`).

    Args:
        found: Of a step compiled for CPUs.
        mesh: Axis sizes in order.
        divided: Shapes of divided parameters, dimensions in order of size, and along which axes:
            what is summed and has such a shape is taken to be its gradient.
    """
    for one in found:
        axes = one.axes(mesh) if one.op == "all-reduce" else ()
        whole = []
        for kind, shape in one.shapes:
            along = tuple(divided.get(tuple(sorted(shape)), ()))
            if not along or not set(along) <= set(axes):
                whole.append((kind, shape))
                continue
            parts = math.prod(mesh[axis] for axis in along)
            part = ((kind, (math.prod(shape) // parts,)),)
            rest = tuple(axis for axis in axes if axis not in along)
            group = groups_along(mesh, along)
            yield replace(one, op="reduce-scatter", shapes=part, groups=group)
            if rest:
                yield replace(one, shapes=part, groups=groups_along(mesh, rest))
        if whole:
            yield replace(one, shapes=tuple(whole))


def groups_along(mesh: Mapping[str, int], axes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return which devices differ in these axes only, as positions in the mesh.

    Example:
        >>> groups_along({"data": 2, "fsdp": 2}, ["data"])
        ((0, 2), (1, 3))
    """
    devices = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    moved = np.moveaxis(devices, [list(mesh).index(a) for a in axes], range(-len(axes), 0))
    rows = moved.reshape(-1, math.prod(mesh[axis] for axis in axes))
    return tuple(tuple(int(i) for i in row) for row in rows)


def traffic_of(found: Iterable[Collective], mesh: Mapping[str, int]) -> tuple[Traffic, ...]:
    """Return what a step's collectives send, those of a kind together, the most bytes first.

    Args:
        found: Of the compiled step.
        mesh: Axis sizes in order.
    """
    alike: dict[tuple[str, tuple[str, ...]], list[Collective]] = defaultdict(list)
    for collective in found:
        if collective.group_size > 1:
            alike[collective.op, collective.axes(mesh)].append(collective)
    rows = [
        Traffic(
            op,
            axes,
            num=sum(c.times for c in some),
            size_bytes=sum(c.times * c.size_bytes for c in some),
            sent_bytes=sum(c.times * c.sent_bytes for c in some),
            group=some[0].groups[0],
        )
        for (op, axes), some in alike.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.sent_bytes))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The least time that a step can take on an accelerator: a roofline.

    Each part at the vendor's full rate, so that a real step takes longer: large transformers reach
    40 to 55 % of the peak (Chowdhery et al., 2022, table 3: 46 %; Narayanan et al., 2021: 52 %;
    Grattafiori et al., 2024, table 4: 38 to 43 %). Latencies are not in it, which count where
    there are many small collectives, nor the time of the host.

    Attributes:
        accelerator: What it is about.
        flops_per_s: Peak rate of the arithmetic that the step computes in.
        compute_s: Operations at that rate.
        memory_s: Bytes read and written, at the rate of the device's memory.
        communication_s: Bytes sent, at the rate of the links between the devices of each group.
        exposed_s: The part of it that no computation can hide: collectives of activations
            (on axes other than `data` and `fsdp`) as a whole, and of the others what takes longer
            than the rest of the step.
        peak_bytes: Bytes that a device needs.

    References:
        Williams, Waterman, Patterson, "Roofline", 2009; Austin et al., "How to scale your model",
        2025.
    """

    accelerator: Accelerator
    flops_per_s: float
    compute_s: float
    memory_s: float
    communication_s: float
    exposed_s: float
    peak_bytes: int

    @property
    def step_s(self) -> float:
        """Seconds of a step: the longer of computing and memory, and what communication adds."""
        return max(self.compute_s, self.memory_s) + self.exposed_s

    @property
    def bound(self) -> Bound:
        """Which of the three takes longest."""
        times: dict[Bound, float] = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "communication": self.communication_s,
        }
        return max(times, key=lambda name: times[name])

    @property
    def mfu(self) -> float:
        """Part of the peak rate that the step's operations are, at most."""
        return self.compute_s / self.step_s if self.step_s else float("nan")

    @property
    def fits(self) -> bool:
        """Whether the bytes that a device needs are no more than its memory."""
        return self.peak_bytes <= self.accelerator.memory_bytes


def estimate(
    accelerator: Accelerator,
    *,
    flops_per_s: float,
    flops: float,
    bytes_accessed: float,
    peak_bytes: int,
    traffic: Iterable[Traffic],
) -> Estimate:
    """Return the least time of a step, see `Estimate`.

    Args:
        accelerator: Where it would run.
        flops_per_s: Its rate in the step's arithmetic.
        flops: Operations of a step on one device.
        bytes_accessed: Bytes that a step reads and writes on one device.
        peak_bytes: Bytes that a device needs.
        traffic: What its collectives send.
    """
    compute_s = flops / flops_per_s
    memory_s = bytes_accessed / accelerator.memory_bytes_per_s
    hidden_s = waited_s = 0.0
    for row in traffic:
        seconds = row.sent_bytes / accelerator.bytes_per_s(row.group)
        if row.axes and _HIDDEN.issuperset(row.axes):
            hidden_s += seconds
        else:
            waited_s += seconds
    return Estimate(
        accelerator=accelerator,
        flops_per_s=flops_per_s,
        compute_s=compute_s,
        memory_s=memory_s,
        communication_s=hidden_s + waited_s,
        exposed_s=waited_s + max(0.0, hidden_s - max(compute_s, memory_s)),
        peak_bytes=peak_bytes,
    )
