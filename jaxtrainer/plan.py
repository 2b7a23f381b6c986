"""`Plan`: what a training step will cost, from the compiled program, with nothing allocated.

Figures are XLA's own cost and memory analysis. May import levels 0 to 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxtrainer.accelerators import Accelerator, parse_accelerator, rate_of
from jaxtrainer.collectives import Collective, collectives
from jaxtrainer.display.plan import Row, bytes_table, estimate_table, traffic_table
from jaxtrainer.display.text import format_bytes, format_count, format_span
from jaxtrainer.flops import Counted, ModuleFlops
from jaxtrainer.layout import axes_of
from jaxtrainer.offload import is_hosted
from jaxtrainer.peaks import Arithmetic
from jaxtrainer.roofline import Estimate, Traffic, estimate, scattered, traffic_of
from jaxtrainer.sharding import DATA_AXES
from jaxtrainer.state import TrainState, flat_items, size_of


def _nothing() -> Counted:
    return Counted({}, 0.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of one training step.

    Attributes:
        num_params: Trainable numbers.
        param_bytes: Bytes of the parameters, all devices' copies counted once.
        state_bytes: Bytes of the whole training state, optimiser included.
        device_bytes: Bytes of the state on one device, without what is kept on the host.
        flops: Floating-point operations of one step on one device, as XLA counts them in the
            program before its own optimisation, so that the figure is that of the step on every
            backend. The body of a loop (`lax.scan`) counts once, and a custom kernel not at all.
        bytes_accessed: Bytes that one step reads and writes on one device, after optimisation.
        peak_bytes: Bytes a device needs while the step runs: arguments, outputs and temporaries.
        batch_size: Samples of a step.
        num_devices: Devices of the mesh.
        shards: For each parameter its shape and the shape of its part on one device.
        frozen: Names of the parameters that no optimiser changes.
        modules: Class name of each of the model's modules by its path, as far as it has classes.
        count_modules: Counts what `module_flops` and `on` go by.
        mesh: Axis sizes of the mesh, in order.
        shard_axes: For each parameter the axes of the mesh along which it is divided.
        part_bytes: Bytes on one device of each part of the state, and of what the step needs
            beside it: `"temporaries"`, with activations and gradients.
        arithmetic: What most of the step computes in.
        accelerator: What `estimate` is about, if any.
        candidates: Where the mesh was chosen: each mesh that was tried, and its estimate.
        reason: Where the mesh was chosen: why this one.
        read_traffic: Makes `traffic`.
    """

    num_params: int
    param_bytes: int
    state_bytes: int
    device_bytes: int
    flops: float
    bytes_accessed: float
    peak_bytes: int
    batch_size: int
    num_devices: int
    shards: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    frozen: frozenset[str] = frozenset()
    modules: Mapping[str, str] = field(default_factory=dict)
    count_modules: Callable[[], Counted] = field(default=_nothing, repr=False, compare=False)
    mesh: Mapping[str, int] = field(default_factory=dict)
    shard_axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    part_bytes: Mapping[str, int] = field(default_factory=dict)
    arithmetic: Arithmetic = "tf32"
    accelerator: Accelerator | None = None
    candidates: tuple[tuple[Mapping[str, int], Estimate], ...] = ()
    reason: str = ""
    read_traffic: Callable[[], tuple[Traffic, ...]] = field(
        default=tuple, repr=False, compare=False
    )

    @functools.cached_property
    def counted(self) -> Counted:
        """What is counted in a further trace of the step, when first asked for."""
        return self.count_modules()

    @property
    def module_flops(self) -> Mapping[str, ModuleFlops]:
        """Operations of a step on one device in each module, with those of the modules below it.

        By path, forward and backward; of all that `training_step` does as `""`. A loop's body
        counts as often as it runs, see `flops.module_flops`. The optimiser's update is not in it.
        Empty where the modules cannot be told apart in a trace: they must be those of NNX.
        """
        return self.counted.flops

    @functools.cached_property
    def traffic(self) -> tuple[Traffic, ...]:
        """Collectives of a step, by kind and axes of the mesh; read when first asked for.

        As XLA's partitioner places them. Where the devices are CPUs, as in a plan for more than
        there are, sums of gradients of which each device keeps a part are counted as those for
        accelerators do them, see `roofline.scattered`.
        """
        return self.read_traffic()

    @property
    def divided(self) -> frozenset[str]:
        """Axes of the mesh along which some parameter is divided."""
        return frozenset(axis for axes in self.shard_axes.values() for axis in axes)

    def chosen(
        self, candidates: tuple[tuple[Mapping[str, int], Estimate], ...], reason: str
    ) -> Plan:
        """Return the same plan, with what it was chosen from and why."""
        # With what has been counted: the module's attributes may have changed since.
        counted, read = self.counted, self.traffic
        return replace(
            self,
            candidates=candidates,
            reason=reason,
            count_modules=lambda: counted,
            read_traffic=lambda: read,
        )

    @property
    def estimate(self) -> Estimate | None:
        """The least time of a step on `accelerator`; None without one."""
        return None if self.accelerator is None else self.on(self.accelerator)

    def on(self, accelerator: str | Accelerator) -> Estimate:
        """Return the least time of a step on an accelerator; nothing is compiled for it.

        Operations in loops count as often as they run, as far as `module_flops` knows them. Of
        memory it counts what no fusion can save: matrix products and convolutions, each once in a
        step, and the state, read and written.

        Args:
            accelerator: Its name in `accelerators.ACCELERATORS`, such as `"h100"`, or your own.

        Raises:
            ConfigError: If there is none of that name, or it has no rate for the arithmetic.
        """
        chosen = parse_accelerator(accelerator)
        known = self.module_flops.get("", ModuleFlops()).total
        return estimate(
            chosen,
            flops_per_s=rate_of(chosen, self.arithmetic),
            flops=max(self.flops, known),
            bytes_accessed=self.counted.product_bytes + 2 * self.device_bytes,
            peak_bytes=self.peak_bytes,
            traffic=self.traffic,
        )

    @property
    def arithmetic_intensity(self) -> float:
        """Floating-point operations for each byte accessed.

        References:
            Williams, Waterman, Patterson, "Roofline", 2009.
        """
        return self.flops / self.bytes_accessed if self.bytes_accessed else float("nan")

    def __rich__(self) -> Group:
        table = Table(title="plan of one training step", title_justify="left", show_header=False)
        count = format_count(self.num_params).strip()
        rows = {"parameters": f"{count} ({format_bytes(self.param_bytes)})", **self.figures()}
        for name, value in rows.items():
            table.add_row(name, value)
        tables = [table, *self._scale_tables()]
        return Group(*tables, self._modules_table()) if self.module_flops else Group(*tables)

    def _scale_tables(self) -> list[Table | Text]:
        """Return what is said of several devices, or of an accelerator."""
        tables: list[Table | Text] = []
        if self.num_devices > 1 or self.accelerator is not None:
            tables.append(bytes_table(self.part_bytes, self.peak_bytes))
        if self.traffic:
            rows = [Row(t.op, t.axes, t.num, t.size_bytes, t.sent_bytes) for t in self.traffic]
            tables.append(traffic_table(rows))
        if (found := self.estimate) is not None:
            tables.append(estimate_table(*_shown(found)))
        if self.reason:
            tables.append(Text(self.reason))
        return tables

    def _modules_table(self) -> Table:
        """Return the operations of the modules next to the root, and of the others together."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        names = ("module", "type", "forward", "backward", "share")
        for name in names:
            table.add_column(name, justify="left" if name in names[:2] else "right", no_wrap=True)
        whole = self.module_flops[""]
        for path, flops in self.module_flops.items():
            if "/" in path:
                continue
            cells = (f"{format_count(count)}FLOP" for count in flops)
            share = f"{flops.total / (whole.total or 1.0):.1%}"
            # As `Text`: rich would take brackets for markup.
            table.add_row(*map(Text, (path or "in all", self.modules.get(path, ""), *cells, share)))
        return table

    def figures(self) -> dict[str, str]:
        """Return what a table of the model's modules does not say, in words."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        return {
            **({"mesh": mesh} if self.num_devices > 1 else {}),
            "training state": format_bytes(self.state_bytes),
            "state on each device": f"{format_bytes(self.device_bytes)} x {self.num_devices}",
            "batch": f"{self.batch_size} samples",
            "operations a step": f"{format_count(self.flops)}FLOP on each device",
            "bytes moved a step": format_bytes(self.bytes_accessed),
            "arithmetic intensity": f"{self.arithmetic_intensity:.1f} FLOP/byte",
            "peak memory of a device": format_bytes(self.peak_bytes),
        }

    def __getstate__(self) -> dict[str, Any]:
        # What makes them has the traced step, which cannot be pickled.
        made = {"counted": self.counted, "traffic": self.traffic}
        return {**vars(self), **made, "count_modules": _nothing, "read_traffic": tuple}

    def __str__(self) -> str:
        from jaxtrainer.result import render

        return render(self.__rich__())


def plan_of(
    compiled: Any,
    target: TrainState,
    *,
    flops: float,
    batch_size: int,
    num_devices: int,
    frozen: frozenset[str],
    modules: Mapping[str, str],
    count_modules: Callable[[], Counted],
    mesh: Mapping[str, int],
    arithmetic: Arithmetic,
    accelerator: Accelerator | None = None,
) -> Plan:
    """Return the plan of a compiled training step.

    Args:
        compiled: The program, from `lowered.compile()`.
        target: Specs of the state, with shardings.
        flops: Floating-point operations of a step on all devices together.
        batch_size: Samples of a step.
        num_devices: Devices of the mesh.
        frozen: Names of the parameters that no optimiser changes.
        modules: Class names of the model's modules by path.
        count_modules: Returns what a step does on one device.
        mesh: Axis sizes.
        arithmetic: What most of the step computes in.
        accelerator: What to estimate the time of a step on.
    """
    cost = compiled.cost_analysis() or {}
    num_params, param_bytes = size_of(target.params)
    shards = {
        name: (spec.shape, spec.sharding.shard_shape(spec.shape))
        for name, spec in flat_items(target.params)
    }
    return Plan(
        num_params=num_params,
        param_bytes=param_bytes,
        state_bytes=size_of(target)[1],
        device_bytes=sum(_shard_bytes(x) for x in jax.tree.leaves(target) if not is_hosted(x)),
        flops=float(flops) / num_devices,
        bytes_accessed=float(cost.get("bytes accessed", float("nan"))),
        peak_bytes=peak_bytes_of(compiled),
        batch_size=batch_size,
        num_devices=num_devices,
        shards=shards,
        frozen=frozen,
        modules=modules,
        count_modules=count_modules,
        mesh=mesh,
        shard_axes={name: _axes(spec.sharding) for name, spec in flat_items(target.params)},
        part_bytes=_part_bytes(compiled, target),
        arithmetic=arithmetic,
        accelerator=accelerator,
        read_traffic=lambda: _traffic(compiled, target, mesh),
    )


def _traffic(compiled: Any, target: TrainState, mesh: Mapping[str, int]) -> tuple[Traffic, ...]:
    # Of one device there is none, and the text of a large program is long.
    if math.prod(mesh.values()) == 1:
        return ()
    found: Iterable[Collective] = collectives(compiled.as_text() or "")
    params = list(flat_items(target.params))
    if params and params[0][1].sharding.mesh.devices.flat[0].platform == "cpu":
        divided = dict(_gathered(spec) for _, spec in params)
        found = scattered(found, mesh, {shape: axes for shape, axes in divided.items() if axes})
    return traffic_of(found, mesh)


def _gathered(spec: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return a parameter's shape where a step uses it, in order of size, and what it is cut along.

    Cut in use it stays along axes that divide no batch: its gradient is too.
    """
    mesh, shape = spec.sharding.mesh.shape, list(spec.shape)
    for i, entry in enumerate(spec.sharding.spec):
        shape[i] //= math.prod(mesh[axis] for axis in axes_of(entry) if axis not in DATA_AXES)
    axes = tuple(axis for axis in _axes(spec.sharding) if axis in DATA_AXES)
    return tuple(sorted(shape)), axes


def _part_bytes(compiled: Any, target: TrainState) -> dict[str, int]:
    """Return the bytes on one device of parts of the state, and of temporaries."""
    named = {
        "parameters": target.params,
        "model state": target.model_state,
        "optimiser state": target.opt_state,
        "accumulated gradients": target.accumulated,
        "averaged weights": target.averaged,
    }
    sizes = {
        name: sum(_shard_bytes(x) for x in jax.tree.leaves(tree)) for name, tree in named.items()
    }
    kept = {name: size for name, size in sizes.items() if size}
    return {**kept, "temporaries": int(compiled.memory_analysis().temp_size_in_bytes)}


def _axes(sharding: Any) -> tuple[str, ...]:
    """Return the mesh axes that a sharding divides along."""
    axes = (axis for entry in sharding.spec for axis in axes_of(entry))
    return tuple(axis for axis in axes if sharding.mesh.shape[axis] > 1)


def _shown(found: Estimate) -> tuple[str, dict[str, str]]:
    """Return the title of an estimate, and its rows in words."""
    room = format_bytes(found.accelerator.memory_bytes)
    verdict = "fits" if found.fits else "does not fit"
    waited = f"{format_span(found.exposed_s)} not hidden"
    return f"a step on {found.accelerator.name}, at least", {
        "step": f"{format_span(found.step_s)}, bound by {found.bound}",
        "compute": f"{format_span(found.compute_s)} at {format_count(found.flops_per_s)}FLOP/s",
        "memory": format_span(found.memory_s),
        "communication": f"{format_span(found.communication_s)}, {waited}",
        "MFU": f"{found.mfu:.1%} at most",
        "peak memory": f"{format_bytes(found.peak_bytes)} of {room}: {verdict}",
    }


def peak_bytes_of(compiled: Any) -> int:
    """Return the bytes that a compiled program needs of each device: see `Plan.peak_bytes`."""
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(peak + memory.temp_size_in_bytes - memory.alias_size_in_bytes)


def _shard_bytes(spec: Any) -> int:
    return int(np.prod(spec.sharding.shard_shape(spec.shape))) * spec.dtype.itemsize
