"""Batches of several shapes in one loader: which ones there are, and the program for each.

`Shapes` admits them as they are read, `ByShape` runs them. What a shape may differ in is the length
of axes; structure, dtypes and number of axes are the first batch's. Imports `data`, `errors` and
`types` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import jax

from jaxtrainer.data import check_spec, leaf_name, num_rows
from jaxtrainer.errors import BatchSpecError
from jaxtrainer.types import PyTree

Shape = tuple[tuple[int, ...], ...]
"""Shapes of a batch's leaves, in the order of the tree."""


def shape_of(tree: PyTree) -> Shape:
    """Return the shapes of a tree's leaves.

    Example:
        >>> import numpy as np
        >>> shape_of({"x": np.zeros((8, 4)), "label": np.zeros(8)})
        ((8,), (8, 4))
    """
    return tuple(x.shape for x in jax.tree.leaves(tree))


@final
class Shapes:
    """The shapes that a loader's batches may have: the first one, and as many others as allowed.

    The thread that reads admits them; the one that runs the batches notes their first use.

    Args:
        spec: Of the first batch that is read.
        allowed: How many other shapes there may be.
        saved: Shapes that a run which is resumed has used, in order.

    Attributes:
        used: Shapes that were run, in the order of their first use.
    """

    def __init__(
        self, spec: PyTree, allowed: int, saved: Sequence[Sequence[Sequence[int]]] = ()
    ) -> None:
        self._allowed = allowed
        own = shape_of(spec)
        before = [tuple(tuple(leaf) for leaf in shape) for shape in saved]
        # Of another model's loader they mean nothing here.
        self.used: list[Shape] = [s for s in before if _ranks(s) == _ranks(own)] or [own]
        self._where: dict[Shape, str] = dict.fromkeys(self.used, "")
        specs = map(_in_shape, jax.tree.leaves(spec), self.used[0])
        self._first = jax.tree.unflatten(jax.tree.structure(spec), list(specs))

    @property
    def rows(self) -> int:
        """Samples of a batch of the first shape."""
        return self.used[0][0][0]

    def check(self, batch: PyTree, where: str) -> int:
        """Return the rows of a batch; raise unless structure, dtypes and axes are the first's."""
        got, treedef = jax.tree.flatten(batch)
        first, wanted_def = jax.tree.flatten(self._first)
        expected = self._first
        if treedef == wanted_def:
            leaves = [_in_shape(f, x.shape) for f, x in zip(first, got, strict=True)]
            expected = jax.tree.unflatten(wanted_def, leaves)
        check_spec(batch, expected, where)
        return num_rows(batch, where)

    def refuse(self, shape: Shape, where: str) -> BatchSpecError | None:
        """Admit a shape, or return why it is one too many."""
        if shape not in self._where:
            if len(self._where) > self._allowed:
                return BatchSpecError(self._one_too_many(shape, where))
            self._where[shape] = where
        return None

    def is_cut(self, shape: Shape) -> bool:
        """Return whether it is a new shape that is one of the others, but for fewer samples."""
        return shape not in self._where and any(_is_cut(shape, other) for other in [*self._where])

    def use(self, shape: Shape, tell: Callable[[str], None]) -> None:
        """Take note that batches of an admitted shape are run now; a new one is reported."""
        if shape in self.used:
            return
        self.used.append(shape)
        leaves = changes(self._first, shape)
        changed = ", ".join(f"{name}: {old} -> {new}" for name, old, new in leaves)
        tell(
            f"{self._where[shape]} has another shape, for which the step is compiled once "
            f"({len(self.used) - 1} of max_recompiles={self._allowed}): {changed}"
        )

    def _one_too_many(self, shape: Shape, where: str) -> str:
        leaves = changes(self._first, shape)
        changed = "\n".join(
            f"  leaf {n}: {new}, in the first batch {old}" for n, old, new in leaves
        )
        lines = [
            f"  {described(self._first, s)}" + f" ({w})" * bool(w) for s, w in self._where.items()
        ]
        so_far = "\n".join(lines)
        return (
            f"{where} has a new shape, and there are {len(self._where)} already, which is what "
            f"`max_recompiles={self._allowed}` allows:\n{changed}\nshapes so far:\n{so_far}\n"
            "Pad the batches in the loader to few lengths (`np.pad`), and give each batch the same "
            "number of rows (`drop_remainder=True`); or pass a larger "
            f"`Trainer(max_recompiles={2 * self._allowed})`: each shape is compiled once."
        )


@final
class ByShape:
    """A compiled step for each shape of chunks; one that is missing is compiled on first use.

    Args:
        chunk: Specs of the chunks that `step` is for.
        step: A compiled form of the step: `step(state, resident, chunk, control)`.
        compile_for: Compiles the same form for chunks like the one that it is given.
    """

    def __init__(
        self,
        chunk: PyTree,
        step: Callable[..., Any],
        compile_for: Callable[[PyTree], Callable[..., Any]],
    ) -> None:
        self._steps = {shape_of(chunk): step}
        self._compile_for = compile_for

    def __call__(self, state: Any, resident: PyTree, chunk: PyTree, control: Any) -> Any:
        """Run the step that is compiled for the chunk's shape."""
        shape = shape_of(chunk)
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = self._compile_for(chunk)
        return step(state, resident, chunk, control)


def changes(spec: PyTree, shape: Shape) -> list[tuple[str, str, str]]:
    """Return name, old and new form of each leaf of a spec that another shape changes."""
    flat = jax.tree_util.tree_flatten_with_path(spec)[0]
    return [
        (leaf_name(path), f"{x.dtype}{list(x.shape)}", f"{x.dtype}{list(new)}")
        for (path, x), new in zip(flat, shape, strict=True)
        if x.shape != new
    ]


def described(spec: PyTree, shape: Shape | None = None) -> str:
    """Return the leaves of a spec, if given in another shape, in words."""
    flat = jax.tree_util.tree_flatten_with_path(spec)[0]
    leaves = zip(flat, shape or shape_of(spec), strict=True)
    return ", ".join(f"{leaf_name(path)}: {x.dtype}{list(axes)}" for (path, x), axes in leaves)


def _ranks(shape: Shape) -> list[int]:
    return [len(leaf) for leaf in shape]


def _in_shape(first: Any, shape: tuple[int, ...]) -> Any:
    """Return the spec of the first batch's leaf in another shape, if that has as many axes."""
    has_as_many = len(first.shape) == len(shape)
    return jax.ShapeDtypeStruct(shape if has_as_many else first.shape, first.dtype)


def _is_cut(shape: Shape, other: Shape) -> bool:
    pairs = list(zip(shape, other, strict=True))
    return all(a[1:] == b[1:] and a[0] < b[0] for a, b in pairs)
