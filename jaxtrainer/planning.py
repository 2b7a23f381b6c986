"""`Trainer.plan` for meshes larger than the host, and the choice of one.

May import levels 0 to 6, but not what drives a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrainer.accelerators import Accelerator, parse_accelerator
from jaxtrainer.display.text import format_bytes, format_span
from jaxtrainer.errors import ConfigError
from jaxtrainer.options import Options, check_count
from jaxtrainer.plan import Plan
from jaxtrainer.roofline import Estimate
from jaxtrainer.virtual import planned_mesh

Sizes = Mapping[str, int]
Make = Callable[[Options, Accelerator | None], Plan]

_AXES = ("data", "fsdp", "model")
_MAX_MODEL = 8
"""Devices along `model` at most, in a choice: more than a node has would wait for the network in
every layer (Narayanan et al., 2021, takeaway 1)."""


def plan_on(
    make: Make,
    options: Options,
    *,
    mesh: Sizes | Mesh | str | None,
    num_devices: int | None,
    accelerator: str | Accelerator | None,
) -> Plan:
    """Return a plan for a mesh, which may have more devices than there are.

    Args:
        make: Makes the plan of a trainer with these options.
        options: The trainer's.
        mesh: Axis sizes, a Mesh, `"auto"` to choose one, or None for the trainer's.
        num_devices: Devices of the mesh, where its sizes do not say.
        accelerator: What to estimate the time of a step on, if anything.
    """
    chosen = None if accelerator is None else parse_accelerator(accelerator)
    count = None if num_devices is None else check_count("num_devices", num_devices)
    if mesh is None and count is None:
        return make(options, chosen)
    if isinstance(mesh, str):
        return _choose(make, options, _asked(mesh, count, chosen), chosen)
    mesh = options.mesh if mesh is None else mesh
    if not isinstance(mesh, Mesh):
        mesh = planned_mesh(_filled(mesh, count))
    elif count not in (None, mesh.size):
        raise ConfigError(
            f"num_devices={count} and a mesh of {mesh.size} devices: leave out num_devices."
        )
    return make(replace(options, mesh=mesh), chosen)


def _asked(mesh: str, count: int | None, chosen: Accelerator | None) -> int:
    if mesh != "auto":
        raise ConfigError(f"mesh={mesh!r}: pass axis sizes, `mesh={{'data': 2}}`, or `'auto'`.")
    if chosen is None:
        raise ConfigError(
            'mesh="auto" goes by the time of a step: say on what, e.g. `accelerator="h100"`.'
        )
    return jax.device_count() if count is None else count


def _filled(mesh: Sizes | None, count: int | None) -> Sizes:
    """Return the sizes of axes, with -1 as what is left of the devices."""
    sizes = dict(mesh or {"data": -1})
    total = jax.device_count() if count is None else count
    for size in sizes.values():
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise ConfigError(f"mesh={sizes}: sizes are 1 or more, or -1 once for the rest.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or (open_axes and total % fixed):
        raise ConfigError(
            f"mesh={sizes} does not make up {total} devices; at most one axis may be -1, and the "
            "others divide the devices: `mesh={'data': -1, 'fsdp': 8}, num_devices=64`."
        )
    filled = {name: total // fixed if size == -1 else size for name, size in sizes.items()}
    if count not in (None, math.prod(filled.values())):
        raise ConfigError(
            f"mesh={sizes} has {math.prod(filled.values())} devices, and num_devices={count}: "
            "leave out one of the two."
        )
    return filled


def _choose(make: Make, options: Options, count: int, chosen: Accelerator | None) -> Plan:
    """Return the plan of the mesh with the shortest step of those that fit."""
    plans: list[Plan] = []
    unused: set[str] = set()
    for sizes in factorisations(count):
        if unused.intersection(axis for axis, size in sizes.items() if size > 1):
            continue
        try:
            plan = make(replace(options, mesh=planned_mesh(sizes)), chosen)
        except ConfigError:
            # The batch, or a parameter, does not divide over it.
            continue
        spread = {axis for axis in ("fsdp", "model") if sizes[axis] > 1}
        # Where the rules divide nothing along an axis, larger ones need no try.
        unused |= {axis for axis in spread if not plan.divided.intersection({axis})}
        if not unused.intersection(spread):
            plans.append(plan)
    if not plans:
        raise ConfigError(
            f"no mesh of {count} devices divides this batch; use a batch of a multiple of {count} "
            "samples, or fewer devices."
        )
    tried = [(plan, _estimated(plan)) for plan in plans]
    best, found = min(tried, key=lambda pair: _rank(*pair))
    return best.chosen(tuple((plan.mesh, e) for plan, e in tried), _reason(best, found, tried))


def factorisations(count: int) -> Iterator[dict[str, int]]:
    """Yield the meshes of so many devices over `data`, `fsdp` and `model`, simple ones first."""
    parts = [n for n in range(1, count + 1) if count % n == 0]
    pairs = itertools.product((n for n in parts if n <= _MAX_MODEL), parts)
    for model, fsdp in sorted(pairs, key=lambda pair: (pair[0], pair[1])):
        if count % (model * fsdp) == 0:
            yield dict(zip(_AXES, (count // (model * fsdp), fsdp, model), strict=True))


def _estimated(plan: Plan) -> Estimate:
    assert plan.estimate is not None, "the choice of a mesh has an accelerator"
    return plan.estimate


def _rank(plan: Plan, found: Estimate) -> tuple[Any, ...]:
    # Of equal steps the mesh that divides less; where none fits, what is nearest to it.
    sizes = plan.mesh["model"], plan.mesh["fsdp"]
    return (not found.fits, 0.0 if found.fits else found.peak_bytes, found.step_s, *sizes)


def _reason(best: Plan, found: Estimate, tried: Sequence[tuple[Plan, Estimate]]) -> str:
    names, room = found.accelerator.name, format_bytes(found.accelerator.memory_bytes)
    if not found.fits:
        return (
            f"None of {len(tried)} meshes of {best.num_devices} {names} fits into {room}; this one "
            f"needs least, {format_bytes(found.peak_bytes)}. Use a smaller batch, "
            "rematerialisation, more devices, or rules that divide more."
        )
    fitting = [e for _, e in tried if e.fits]
    slowest = max(e.step_s for e in fitting)
    return (
        f"Shortest step of the {len(fitting)} of {len(tried)} meshes of {best.num_devices} {names} "
        f"that fit into {room}: {format_span(found.step_s)}, the slowest "
        f"{format_span(slowest)}. Bound by {found.bound}."
    )
