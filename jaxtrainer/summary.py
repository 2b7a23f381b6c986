"""`summarize`: the tree of a model's modules with their sizes, from the names of its arrays.

Runs no model and reads no array. May import levels 0 to 2, and rich to draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from rich.table import Table
from rich.text import Text

from jaxtrainer.display.text import format_bytes
from jaxtrainer.errors import ConfigError
from jaxtrainer.result import render
from jaxtrainer.state import size_of


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One module, with all that is below it.

    Attributes:
        path: Its name from the root, e.g. `"encoder/first"`.
        depth: 1 for a child of the model.
        kind: Its class, where known.
        arrays: Its own arrays with dtype and shape.
        num_params: Trainable numbers.
        num_state: Other numbers: statistics, counters, PRNG keys.
        size_bytes: Bytes of both.
    """

    path: str
    depth: int
    kind: str
    arrays: str
    num_params: int
    num_state: int
    size_bytes: int

    @property
    def is_trainable(self) -> bool:
        """Whether it has anything to train."""
        return self.num_params > 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A model's modules and totals; it prints well.

    Attributes:
        rows: Modules, each followed by those below it.
        num_params: Trainable numbers of the model.
        num_state: Its other numbers.
        param_bytes: Bytes of the trainable ones.
        state_bytes: Bytes of the others.
    """

    rows: tuple[SummaryRow, ...]
    num_params: int
    num_state: int
    param_bytes: int
    state_bytes: int

    def __rich__(self) -> Table:
        table = Table(title="model", caption=self._totals(), title_justify="left")
        table.caption_justify = "left"
        shows_kind = any(row.kind for row in self.rows)
        table.add_column("module", no_wrap=True)
        if shows_kind:
            table.add_column("type", no_wrap=True)
        # The only column that wraps: on a narrow terminal all others stay readable.
        table.add_column("arrays")
        for name in ("params", "share", "state", "size"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("trainable", no_wrap=True)
        for row in self.rows:
            name = "  " * (row.depth - 1) + row.path.rpartition("/")[2]
            cells = [name, row.kind] if shows_kind else [name]
            # As `Text`: rich would take the brackets of a shape for markup.
            table.add_row(*cells, Text(row.arrays), *self._numbers(row))
        table.add_section()
        size_bytes = self.param_bytes + self.state_bytes
        numbers = (f"{self.num_params:,}", "", f"{self.num_state:,}", format_bytes(size_bytes))
        table.add_row("total", *([""] if shows_kind else []), "", *numbers)
        return table

    def __str__(self) -> str:
        return render(self.__rich__(), width=100)

    def _numbers(self, row: SummaryRow) -> tuple[str, ...]:
        share = row.num_params / self.num_params if self.num_params else 0.0
        return (
            f"{row.num_params:,}",
            f"{share:.1%}",
            f"{row.num_state:,}",
            format_bytes(row.size_bytes),
            "yes" if row.is_trainable else "no",
        )

    def _totals(self) -> str:
        return (
            f"{self.num_params:,} trainable numbers ({format_bytes(self.param_bytes)}), "
            f"{self.num_state:,} others ({format_bytes(self.state_bytes)})"
        )


def summarize(
    params: Mapping[str, Any],
    model_state: Mapping[str, Any] | None = None,
    max_depth: int = 1,
    *,
    types: Mapping[str, str] | None = None,
) -> Summary:
    """Return what a model is made of.

    Args:
        params: Nested dicts of the trainable arrays, allocated or abstract.
        model_state: Nested dicts of the other arrays.
        max_depth: Levels of modules in `rows`; -1 for all, 0 for none.
        types: Class name of each module by its path, see `module_types`.

    Raises:
        ConfigError: If these are no dicts.

    Example:
        >>> import numpy as np
        >>> dense = {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}
        >>> summary = summarize({"first": dense, "last": dense})
        >>> summary.num_params, summary.rows[0].arrays
        (30, 'kernel f64[4, 3], bias f64[3]')
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
    return Summary(
        rows=tuple(_rows(params, state, "", depth, types or {})),
        num_params=num_params,
        num_state=num_state,
        param_bytes=param_bytes,
        state_bytes=state_bytes,
    )


def module_types(model: Any) -> dict[str, str]:
    """Return the class name of each module of an `nnx.Module` by its path; else nothing.

    Example:
        >>> module_types(nnx.Dict(head=nnx.Linear(2, 1, rngs=nnx.Rngs(0))))["head"]
        'Linear'
    """
    if not isinstance(model, nnx.Module):
        return {}
    modules = nnx.iter_modules(model)
    return {"/".join(map(str, path)): type(module).__name__ for path, module in modules}


def _rows(
    params: Mapping[str, Any], state: Mapping[str, Any], above: str, levels: int, types: Any
) -> Iterator[SummaryRow]:
    for name in {**params, **state} if levels else ():
        mine, rest = params.get(name, {}), state.get(name, {})
        is_module = isinstance(mine, Mapping) and isinstance(rest, Mapping)
        # An array is shown with its module; those of the model itself have none to be shown with.
        if not is_module and above:
            continue
        path = f"{above}{name}"
        yield _row(path, mine, rest, types.get(path, ""))
        if is_module:
            yield from _rows(mine, rest, f"{path}/", levels - 1, types)


def _row(path: str, params: Any, state: Any, kind: str) -> SummaryRow:
    (num_params, param_bytes), (num_state, state_bytes) = size_of(params), size_of(state)
    return SummaryRow(
        path=path,
        depth=path.count("/") + 1,
        kind=kind,
        arrays=", ".join([*_arrays(params), *_arrays(state)]),
        num_params=num_params,
        num_state=num_state,
        size_bytes=param_bytes + state_bytes,
    )


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
    return f"{kind}[{', '.join(map(str, leaf.shape))}]"
