"""`summarize`: the tree of a model's modules with their sizes, from the names of its arrays.

Runs no model and reads no array. May import levels 0 to 2, and rich to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from jaxtrainer.display.text import format_bytes, format_count
from jaxtrainer.errors import ConfigError
from jaxtrainer.result import render
from jaxtrainer.state import flat_items, size_of

_ARRAYS_WIDTH = 20
"""Characters in which shapes can be read, wrapped; the other columns do not wrap."""


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One module, with all that is below it.

    Attributes:
        path: Its name from the root, e.g. `"encoder/first"`.
        depth: 1 for a child of the model.
        kind: Its class, where known.
        arrays: Its own arrays with dtype and shape; `f32[64,512/8]` is divided over 8 devices.
        num_params: Numbers of its parameters.
        num_frozen: Those of them that no optimiser changes.
        num_state: Other numbers: statistics, counters, PRNG keys.
        size_bytes: Bytes of both.
        device_bytes: Bytes of them on one device.
        flops: Floating-point operations in it of a step on one device, forward and backward; None
            where they are not known.
        sharding: Which axes of the mesh divide its own arrays, `"kernel[-,model]"`, or those below
            it; empty where nothing is divided.
    """

    path: str
    depth: int
    kind: str
    arrays: str
    num_params: int
    num_frozen: int
    num_state: int
    size_bytes: int
    device_bytes: int
    flops: float | None = None
    sharding: str = ""

    @property
    def is_trainable(self) -> bool:
        """Whether it has anything to train."""
        return self.num_params > self.num_frozen

    @property
    def trains(self) -> str:
        """In a word: `"yes"`, `"partly"`, `"frozen"`, or `"no"` where there are no parameters."""
        if not self.num_frozen:
            return "yes" if self.num_params else "no"
        return "partly" if self.is_trainable else "frozen"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A model's modules and totals; it prints well.

    Attributes:
        rows: Modules, each followed by those below it.
        num_params: Numbers of the model's parameters.
        num_frozen: Those of them that no optimiser changes.
        num_state: Its other numbers.
        param_bytes: Bytes of the parameters.
        state_bytes: Bytes of the others.
        device_bytes: Bytes of all on one device.
        figures: Further lines to show below, by what they are.
    """

    rows: tuple[SummaryRow, ...]
    num_params: int
    num_frozen: int
    num_state: int
    param_bytes: int
    state_bytes: int
    device_bytes: int
    figures: Mapping[str, str] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.rows:
            yield self._table(options.max_width)
        yield Text(self._totals())
        lines = Table.grid(padding=(0, 2))
        for name, value in self.figures.items():
            lines.add_row(name, value)
        if self.figures:
            yield lines

    def __str__(self) -> str:
        return render(self, width=100)

    def _table(self, width: int) -> Table:
        columns = self._columns()
        # Where there is no room the least telling columns go, so that the others stay readable.
        for name in ("share", "arrays", "FLOPs", "divided by"):
            if name in columns and _needed(columns) > width:
                columns.pop(name)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for name in columns:
            is_number = name in ("params", "share", "FLOPs", "size", "per device")
            table.add_column(
                name, justify="right" if is_number else "left", no_wrap=name != "arrays"
            )
        for cells in zip(*columns.values(), strict=True):
            # As `Text`: rich would take the brackets of a shape for markup.
            table.add_row(*map(Text, cells))
        return table

    def _columns(self) -> dict[str, list[str]]:
        rows, whole = self.rows, max(self.num_params, 1)
        columns = {
            "module": ["  " * (r.depth - 1) + r.path.rpartition("/")[2] for r in rows],
            "type": [r.kind for r in rows],
            "arrays": [r.arrays for r in rows],
            "divided by": [r.sharding for r in rows],
            "params": [format_count(r.num_params) for r in rows],
            "share": [f"{r.num_params / whole:.1%}" for r in rows],
            "FLOPs": ["-" if r.flops is None else format_count(r.flops) for r in rows],
            "size": [format_bytes(r.size_bytes) for r in rows],
            "per device": [format_bytes(r.device_bytes) for r in rows],
            "trains": [r.trains for r in rows],
        }
        for name in ("type", "divided by"):
            if not any(columns[name]):
                columns.pop(name)
        if all(r.flops is None for r in rows):
            columns.pop("FLOPs")
        if all(r.device_bytes == r.size_bytes for r in rows):
            columns.pop("per device")
        return columns

    def _totals(self) -> str:
        frozen = f", of them {self.num_frozen:,} frozen" if self.num_frozen else ""
        size_bytes = self.param_bytes + self.state_bytes
        device = f", {format_bytes(self.device_bytes)} on each device"
        return (
            f"{self.num_params:,} parameters ({format_bytes(self.param_bytes)}){frozen}; "
            f"{self.num_state:,} other numbers ({format_bytes(self.state_bytes)})"
            f"{device if self.device_bytes < size_bytes else ''}"
        )


def summarize(
    params: Mapping[str, Any],
    model_state: Mapping[str, Any] | None = None,
    max_depth: int = 1,
    *,
    types: Mapping[str, str] | None = None,
    frozen: Collection[str] = (),
    flops: Mapping[str, float] | None = None,
    figures: Mapping[str, str] | None = None,
) -> Summary:
    """Return what a model is made of.

    Args:
        params: Nested dicts of the trainable arrays, allocated or abstract.
        model_state: Nested dicts of the other arrays.
        max_depth: Levels of modules in `rows`; -1 for all, 0 for none.
        types: Class name of each module by its path, in the order of the rows; see `module_types`.
        frozen: Names of the parameters that no optimiser changes, e.g. `"backbone/conv/kernel"`.
        flops: Operations of each module by its path; see `SummaryRow.flops`.
        figures: Lines to show below the table, by what they are.

    Raises:
        ConfigError: If these are no dicts.

    Example:
        >>> import numpy as np
        >>> dense = {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}
        >>> summary = summarize({"first": dense, "last": dense})
        >>> summary.num_params, summary.rows[0].arrays
        (30, 'kernel f64[4,3], bias f64[3]')
    """
    state = {} if model_state is None else model_state
    for what, tree in (("params", params), ("model_state", state)):
        if not isinstance(tree, Mapping):
            raise ConfigError(
                f"summarize needs {what} as nested dicts, got a {type(tree).__name__}; of an NNX "
                "model: `nnx.to_pure_dict(nnx.state(model, nnx.Param))`."
            )
    num_params, param_bytes = size_of(params)
    num_state, state_bytes = size_of(state)
    depth = max_depth if max_depth >= 0 else 1 << 30
    order = {path: i for i, path in enumerate(types or {})}
    rows = _rows(params, state, "", depth, lambda path: order.get(path, len(order)))
    kinds, fixed, known = types or {}, frozenset(frozen), flops or {}
    return Summary(
        rows=tuple(
            replace(_row(path, mine, rest, kinds.get(path, ""), fixed), flops=known.get(path))
            for path, mine, rest in rows
        ),
        num_params=num_params,
        num_frozen=_num_frozen(params, "", fixed),
        num_state=num_state,
        param_bytes=param_bytes,
        state_bytes=state_bytes,
        device_bytes=_device_bytes((params, state)),
        figures=figures or {},
    )


def _rows(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    above: str,
    levels: int,
    place: Callable[[str], int],
) -> Iterator[tuple[str, Any, Any]]:
    """Yield `(path, params, state)` of each module that is shown."""
    names = sorted({**params, **state}, key=lambda name: place(f"{above}{name}"))
    for name in names if levels else ():
        mine, rest = params.get(name, {}), state.get(name, {})
        is_module = isinstance(mine, Mapping) and isinstance(rest, Mapping)
        # An array is shown with its module; those of the model itself have none to be shown with.
        if not is_module and above:
            continue
        path = f"{above}{name}"
        yield path, mine, rest
        if is_module:
            yield from _rows(mine, rest, f"{path}/", levels - 1, place)


def _row(path: str, params: Any, state: Any, kind: str, frozen: frozenset[str]) -> SummaryRow:
    (num_params, param_bytes), (num_state, state_bytes) = size_of(params), size_of(state)
    return SummaryRow(
        path=path,
        depth=path.count("/") + 1,
        kind=kind,
        arrays=", ".join([*_arrays(params), *_arrays(state)]),
        num_params=num_params,
        num_frozen=_num_frozen(params, path, frozen),
        num_state=num_state,
        size_bytes=param_bytes + state_bytes,
        device_bytes=_device_bytes((params, state)),
        sharding=_divided(params),
    )


def _needed(columns: Mapping[str, Sequence[str]]) -> int:
    """Return the width at which a table of these columns can be read."""
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    if "arrays" in widths:
        widths["arrays"] = min(widths["arrays"], _ARRAYS_WIDTH)
    return sum(widths.values()) + 3 * len(widths) - 1


def _num_frozen(params: Any, path: str, frozen: frozenset[str]) -> int:
    named = flat_items(params, f"{path}/" if path else "") if isinstance(params, dict) else ()
    leaves = [leaf for name, leaf in named if name in frozen]
    return size_of(leaves if isinstance(params, dict) else [params] * (path in frozen))[0]


def _device_bytes(tree: Any) -> int:
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape")]
    return sum(math.prod(_shard_shape(x)) * x.dtype.itemsize for x in leaves)


def _shard_shape(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def _divided(params: Any) -> str:
    """Return how a module's own parameters are divided, or else the axes that divide any below."""
    if not isinstance(params, Mapping):
        return _axes(params)
    own = {name: _axes(leaf) for name, leaf in params.items() if not isinstance(leaf, Mapping)}
    if any(own.values()):
        return ", ".join(f"{name}{axes}" for name, axes in own.items() if axes)
    below = {axis: None for _, leaf in flat_items(params) for axis in _entries(leaf) if axis != "-"}
    return ", ".join(below)


def _axes(leaf: Any) -> str:
    entries = _entries(leaf)
    return f"[{','.join(entries)}]" if any(entry != "-" for entry in entries) else ""


def _entries(leaf: Any) -> list[str]:
    spec = tuple(getattr(getattr(leaf, "sharding", None), "spec", ()))
    names = [entry if isinstance(entry, str) else "+".join(entry or ()) for entry in spec]
    # As many as there are dimensions: what the spec leaves out is whole.
    return [name or "-" for name in names] + ["-"] * (len(leaf.shape) - len(spec))


def _arrays(tree: Any) -> Iterator[str]:
    if not isinstance(tree, Mapping):
        yield _described(tree)
        return
    for name, leaf in tree.items():
        if not isinstance(leaf, Mapping):
            yield f"{name} {_described(leaf)}"


def _described(leaf: Any) -> str:
    kind = str(leaf.dtype)
    for name, short in (("float", "f"), ("uint", "u"), ("int", "i")):
        kind = kind.replace(name, short)
    sizes = zip(leaf.shape, _shard_shape(leaf), strict=True)
    dims = (f"{size}/{size // part}" if part < size else f"{size}" for size, part in sizes)
    return f"{kind}[{','.join(dims)}]"
