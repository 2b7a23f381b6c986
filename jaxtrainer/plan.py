"""`Plan`: what a training step will cost, from the compiled program, with nothing allocated.

Figures are XLA's own cost and memory analysis. May import levels 0 to 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxtrainer.display.text import format_bytes, format_count
from jaxtrainer.flops import ModuleFlops
from jaxtrainer.offload import is_hosted
from jaxtrainer.state import TrainState, flat_items, size_of


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
        count_modules: Makes `module_flops`.
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
    count_modules: Callable[[], Mapping[str, ModuleFlops]] = field(
        default=dict, repr=False, compare=False
    )

    @functools.cached_property
    def module_flops(self) -> Mapping[str, ModuleFlops]:
        """Operations of a step on one device in each module, with those of the modules below it.

        By path, forward and backward; of all that `training_step` does as `""`. A loop's body
        counts as often as it runs, see `flops.module_flops`. The optimiser's update is not in it.
        Empty where the modules cannot be told apart in a trace: they must be those of NNX.

        Counted when first asked for, in a further trace of the step.
        """
        return self.count_modules()

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
        return Group(table, self._modules_table()) if self.module_flops else Group(table)

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
        return {
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
        counted = self.module_flops
        return {**vars(self), "module_flops": counted, "count_modules": dict}

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
    count_modules: Callable[[], Mapping[str, ModuleFlops]],
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
        count_modules: Returns the operations of a step in each module on one device.
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
    )


def peak_bytes_of(compiled: Any) -> int:
    """Return the bytes that a compiled program needs of each device: see `Plan.peak_bytes`."""
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(peak + memory.temp_size_in_bytes - memory.alias_size_in_bytes)


def _shard_bytes(spec: Any) -> int:
    return int(np.prod(spec.sharding.shard_shape(spec.shape))) * spec.dtype.itemsize
