"""How parameters are divided over a mesh: rules, annotations of the model, FSDP.

Settled on names and shapes, before anything is compiled; what follows from it is in `layout`. May
import levels 0 and 1, `layout`, `state` and `optim`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.layout import Layout, axes_of
from jaxtrainer.optim import matching, nearest
from jaxtrainer.sharding import DATA_AXES
from jaxtrainer.state import Nested, flat_items

MIN_SIZE = 4096
"""Numbers below which a parameter is left whole unless a rule says otherwise.

Biases and scales: all of them together are some thousandth of a model, and gathering one costs
the latency of a message, whatever its size.
"""

Rules = Mapping[str, Any]
"""What `Trainer(sharding=...)` says, pattern by pattern."""

_EXAMPLE = "`sharding={'blocks/*/up/kernel': jax.P(None, 'model')}`"


def build_layout(
    mesh: Mesh,
    sharding: Any,
    params: Nested,
    variables: Mapping[str, Any],
    *,
    may_idle: bool = False,
) -> Layout:
    """Return where the parameters of a model live.

    Args:
        mesh: The devices.
        sharding: `Trainer(sharding=...)`.
        params: Abstract parameters.
        variables: Path and abstract variable of each parameter by its name, as
            `Adapter.variables` gives them.
        may_idle: Whether an axis of the mesh may divide nothing.

    Raises:
        ConfigError: For rules that do not fit the parameters or the mesh, naming both.
    """
    rules, option = parse_sharding(sharding)
    axis = _fsdp_axis(mesh, option)
    shapes = {name: leaf.shape for name, leaf in flat_items(params)}
    specs: dict[str, P] = {}
    if option != "ddp":
        _refuse_unmatched(rules, variables)
        given = {**_annotated(mesh, rules, variables), **_ruled(rules, shapes)}
        for name, (spec, source) in given.items():
            _check_spec(mesh, name, shapes[name], spec, source)
        specs = {name: spec for name, (spec, _) in given.items()}
    undivided: list[str] = []
    if axis is not None:
        rest = {name: shape for name, shape in shapes.items() if name not in specs}
        found = {name: fsdp_spec(shape, axis, mesh.shape[axis]) for name, shape in rest.items()}
        specs |= {name: spec for name, spec in found.items() if spec is not None}
        undivided = [n for n, s in rest.items() if math.prod(s) >= MIN_SIZE and n not in specs]
    specs = {name: spec for name, spec in specs.items() if _parts(mesh, spec) > 1}
    used = {axis for spec in specs.values() for axis in _axes_in(spec)}
    if not may_idle:
        _refuse_idle(mesh, used)
    return Layout(
        mesh=mesh,
        specs=specs,
        gathered=tuple(axis for axis in DATA_AXES if axis in used),
        undivided=tuple(undivided),
    )


def fsdp_spec(shape: tuple[int, ...], axis: str, size: int) -> P | None:
    """Return how a parameter is divided where no rule says it: along its largest dimension.

    The largest that the axis divides; of equal ones the first, whose parts lie together in
    memory. None for less than `MIN_SIZE` numbers, or if no dimension is a multiple.

    Example:
        >>> fsdp_spec((256, 1024), "fsdp", 8) == P(None, "fsdp")
        True
        >>> fsdp_spec((1024,), "fsdp", 8) is None
        True
    """
    fits = [i for i, n in enumerate(shape) if n and n % size == 0]
    if not fits or math.prod(shape) < MIN_SIZE:
        return None
    chosen = max(fits, key=lambda i: (shape[i], -i))
    return P(*(axis if i == chosen else None for i in range(chosen + 1)))


def check_sharding(sharding: Any) -> Any:
    """Return the option, or raise ConfigError; see `parse_sharding`."""
    parse_sharding(sharding)
    return sharding


def parse_sharding(sharding: Any) -> tuple[Rules, str | None]:
    """Return the rules by pattern, and the word, of the option `sharding`.

    Raises:
        ConfigError: For anything that is neither.
    """
    if sharding is None or sharding in ("ddp", "fsdp"):
        return {}, sharding
    if isinstance(sharding, str):
        hint = did_you_mean(sharding, ("ddp", "fsdp"))
        raise ConfigError(
            f"sharding={sharding!r}: use 'ddp' (parameters whole on each device), 'fsdp' (divided "
            f"over the data axis), or rules: {_EXAMPLE}.{hint}"
        )
    pairs = list(sharding.items()) if isinstance(sharding, Mapping) else sharding
    is_list = isinstance(pairs, Sequence) and all(_is_pair(pair) for pair in pairs)
    if not is_list or len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError(
            f"sharding={sharding!r}: expected 'ddp', 'fsdp', or rules as a mapping or as pairs of "
            f"a pattern and a PartitionSpec, each pattern once: {_EXAMPLE}."
        )
    for name, value in pairs:
        if not (isinstance(value, P) or _is_mesh_axis(value)):
            raise ConfigError(
                f"sharding: {name!r} has {value!r}; expected a `jax.sharding.PartitionSpec` for a "
                "pattern of parameter paths, or for a logical axis name the mesh axis: "
                f"{_EXAMPLE}, `sharding={{'mlp': 'model', 'embed': None}}`."
            )
    return dict(pairs), None


def _ruled(rules: Rules, shapes: Mapping[str, Any]) -> dict[str, tuple[P, str]]:
    """Return the specs that rules give, with the rule; the first that matches counts."""
    found: dict[str, tuple[P, str]] = {}
    for pattern, spec in rules.items():
        for name in matching(shapes, pattern) if isinstance(spec, P) else ():
            found.setdefault(name, (spec, f"the rule {pattern!r}"))
    return found


def _annotated(mesh: Mesh, rules: Rules, variables: Mapping[str, Any]) -> dict[str, tuple[P, str]]:
    """Return the specs that the model's own annotations give, in axes of the mesh."""
    divides_more = any(n > 1 for axis, n in mesh.shape.items() if axis not in DATA_AXES)
    known = {**{axis: axis for axis in mesh.shape}, **_logical(rules)}
    found: dict[str, tuple[P, str]] = {}
    for name, (_, variable) in variables.items():
        logical, own = _annotation(variable)
        if logical is None:
            continue
        table = {**own, **known}
        lost = [a for entry in logical for a in axes_of(entry) if a not in table]
        if lost and (divides_more or _logical(rules)):
            raise ConfigError(
                f"parameter {name!r} is annotated with {tuple(logical)}, and neither the mesh "
                f"{dict(mesh.shape)} nor `sharding` knows the axis {lost[0]!r}; say where it goes, "
                f"or None: `Trainer(sharding={{{lost[0]!r}: 'model'}})`."
                f"{did_you_mean(lost[0], [*table])}"
            )
        # On a mesh that divides the batch alone there is nothing that they could mean.
        if not lost:
            entries = [_translated(entry, table) for entry in logical]
            found[name] = (_once(entries), f"its annotation {tuple(logical)}")
    return found


def _annotation(variable: Any) -> tuple[Any, Mapping[str, Any]]:
    """Return the axis names that an NNX variable was made with, if any, and its own rules."""
    metadata = variable.get_metadata() if hasattr(variable, "get_metadata") else {}
    names = metadata.get("out_sharding") or None
    names = getattr(names, "spec", names)
    return names, dict(metadata.get("sharding_rules") or ())


def _once(entries: Sequence[Any]) -> P:
    # As in Flax's own rules: of two dimensions that go to one axis the first gets it.
    seen: set[str] = set()
    kept = []
    for entry in entries:
        free = tuple(axis for axis in axes_of(entry) if axis not in seen)
        seen.update(free)
        kept.append(free if len(free) > 1 else free[0] if free else None)
    return P(*kept)


def _translated(entry: Any, table: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(axis for name in axes_of(entry) for axis in axes_of(table[name]))


def _logical(rules: Rules) -> dict[str, Any]:
    return {name: axis for name, axis in rules.items() if not isinstance(axis, P)}


def _refuse_unmatched(rules: Rules, variables: Mapping[str, Any]) -> None:
    names = {a for _, v in variables.values() for e in _annotation(v)[0] or () for a in axes_of(e)}
    for pattern, value in rules.items():
        if isinstance(value, P):
            if not matching(variables, pattern):
                raise ConfigError(
                    f"sharding: the rule {pattern!r} matches no parameter; they are "
                    f"{_listed(variables)}.{nearest(pattern, variables)}"
                )
        elif not names or matching(variables, pattern):
            # A table of logical names may be shared by models, which need not use all of them.
            raise ConfigError(
                f"sharding: {pattern!r} has {value!r}, which says where a logical axis goes, and "
                f"{'it is the path of a parameter' if names else 'the model has none'}. For paths "
                f"write a PartitionSpec: {_EXAMPLE}."
            )


def _check_spec(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P, source: str) -> None:
    what = f"sharding: {source} gives parameter {name!r} of shape {shape} the {spec}"
    if len(spec) > len(shape):
        raise ConfigError(
            f"{what}, which has {len(spec)} entries for {len(shape)} dimensions; use at most "
            f"{len(shape)}: `jax.{P(*tuple(spec)[: len(shape)])}`."
        )
    axes = _axes_in(spec)
    for axis in axes:
        if axis not in mesh.shape:
            sizes = dict(mesh.shape)
            raise ConfigError(
                f"{what}, and the mesh {sizes} has no axis {axis!r}; use one of {', '.join(sizes)}"
                f", or add it: `mesh={ {**sizes, axis: 2} }`.{did_you_mean(axis, [*sizes])}"
            )
    for axis in {axis for axis in axes if axes.count(axis) > 1}:
        raise ConfigError(f"{what}: the axis {axis!r} can divide one dimension only.")
    for i, entry in enumerate(spec):
        parts = math.prod(mesh.shape[axis] for axis in axes_of(entry))
        if shape[i] % parts:
            fits = [str(j) for j, n in enumerate(shape) if n % parts == 0]
            other = f"dimension {' or '.join(fits)} does" if fits else "no dimension does"
            raise ConfigError(
                f"{what}: dimension {i} of {shape[i]} does not divide by {parts}, the size of "
                f"{entry!r}; {other}. Divide that one, use an axis of another size, or leave it "
                f"whole: `{name!r}: jax.P()`."
            )


def _refuse_idle(mesh: Mesh, used: set[str]) -> None:
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used and axis not in DATA_AXES:
            raise ConfigError(
                f"mesh={dict(mesh.shape)}: the axis {axis!r} divides neither the batch nor a "
                f"parameter, so that {size} devices would all compute the same. Divide parameters "
                f"along it, {_EXAMPLE.replace('model', axis)}, or call it 'data' or 'fsdp'."
            )


def _fsdp_axis(mesh: Mesh, option: str | None) -> str | None:
    if option == "ddp":
        return None
    if "fsdp" in mesh.shape:
        return "fsdp"
    if option == "fsdp" and "data" not in mesh.shape:
        raise ConfigError(
            f"sharding='fsdp' divides parameters along the axis 'fsdp' of the mesh, or 'data', and "
            f"{dict(mesh.shape)} has neither: `mesh={{'fsdp': -1}}`."
        )
    return "data" if option == "fsdp" else None


def _parts(mesh: Mesh, spec: P) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes_in(spec))


def _axes_in(spec: P) -> list[str]:
    return [axis for entry in spec for axis in axes_of(entry)]


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str)


def _is_mesh_axis(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(axis, str) for axis in value)
    return value is None or isinstance(value, str)


def _listed(names: Mapping[str, Any]) -> str:
    shown = ", ".join([*names][:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
