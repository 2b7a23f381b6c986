"""Where a computation first stops being finite: its jaxpr, run one operation after the other.

Knows jaxprs and arrays, nothing of training. May import level 1.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxtrainer.scopes import path_in

MAX_ITERATIONS = 1000
"""Iterations up to which a loop is looked into; a longer one is one operation."""

_CALLS = {"pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"}
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", __name__.split(".")[0])


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a traced function, and where it was written.

    Attributes:
        primitive: JAX's name of it: `"log"`, `"div"`.
        file: File of the line in the user's program; empty if none is known.
        line: Its number.
        function: The function it is in.
        module: Path of the model's module that was called there; empty if it was none.
        is_gradient: Whether it belongs to the backward pass of that line.
        shapes: Types of what it gives: `"float32[8]"`.
        kind: `"nan"` or `"inf"`.
    """

    primitive: str
    file: str
    line: int
    function: str
    module: str
    is_gradient: bool
    shapes: str
    kind: str

    def __str__(self) -> str:
        found = "NaN" if self.kind == "nan" else "infinity"
        where = f"{self.file}:{self.line}, in {self.function}" if self.file else "unknown line"
        module = f", module `{self.module}`" if self.module else ""
        kind = "backward pass of " if self.is_gradient else ""
        return f"{found} from `{self.primitive}` ({self.shapes}), {kind}{where}{module}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where numbers stopped being finite.

    Attributes:
        output: Name of the output from which it was traced back.
        origin: The operation that first gave no number, or infinity; None if an input was none.
        source: Name of an input that is not finite itself and went into it, or None.
        path: The operations from there to the output, the origin first; eight of them at most.
    """

    output: str
    origin: Operation | None
    source: str | None
    path: tuple[Operation, ...]

    def __str__(self) -> str:
        if self.origin is None:
            return f"{self.output} is not finite: the input {self.source} is not"
        fed = f", fed by {self.source}, which is not finite" if self.source else ""
        return f"{self.output} is not finite: first {self.origin}{fed}"


def first_non_finite(
    jaxpr: ClosedJaxpr, arguments: Sequence[Any], inputs: Sequence[str], outputs: Sequence[str]
) -> Finding | None:
    """Return where the first output that is not finite comes from; None if all are finite.

    From that output back through what is not finite. An infinity that goes nowhere near it, like
    that of a mask, is no finding.

    Args:
        jaxpr: The function.
        arguments: Its inputs, arrays.
        inputs: Their names.
        outputs: Names of its outputs in the order in which to ask; what has none is not asked.
            An empty name leaves the output out.
    """
    trail = _Trail()
    given = [trail.add(x, None, name=name) for x, name in zip(arguments, inputs, strict=True)]
    results = trail.run(jaxpr.jaxpr, jaxpr.consts, given)
    for name, value in zip(outputs, results, strict=True):
        if name and trail.kinds[value.index]:
            return trail.trace_back(name, value.index)
    return None


@dataclass(slots=True)
class _Value:
    array: Any
    index: int


@dataclass(slots=True)
class _Step:
    equation: Any
    inputs: list[int]
    at: _Place


class _Place(NamedTuple):
    """Where an operation stands: the names around it, and the call that a line is known of.

    Inside a function of a library JAX knows the line from which it was traced first, which may be
    anywhere in the program: the call is what says where it is now.
    """

    scope: str = ""
    call: Any = None

    def inside(self, eqn: Any, body: Any) -> _Place:
        """Return the place of what an operation calls."""
        source = getattr(getattr(body, "debug_info", None), "func_src_info", None) or ""
        is_library = _is_library(source.rpartition(" at ")[2].rpartition(":")[0])
        call = (self.call or eqn) if is_library else None
        return _Place(f"{self.scope}/{eqn.source_info.name_stack}", call)


@dataclass
class _Trail:
    """What was computed, from what, and whether it was finite; arrays live while they are used.

    Attributes:
        kinds: Of each value `""`, `"inf"` or `"nan"`.
        steps: Of each value the operation that gave it; None for inputs and constants.
        names: Names of the inputs by index.
    """

    kinds: list[str] = field(default_factory=list)
    steps: list[_Step | None] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def add(self, array: Any, step: _Step | None, name: str = "") -> _Value:
        self.kinds.append(_kind(array))
        self.steps.append(step)
        if name:
            self.names[len(self.kinds) - 1] = name
        return _Value(array, len(self.kinds) - 1)

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        arguments: Sequence[_Value],
        at: _Place = _Place(),  # noqa: B008 (it is immutable)
    ) -> list[_Value]:
        """Run a jaxpr on values."""
        known = [self.add(x, None) for x in consts]
        variables = getattr(jaxpr, "all_invars", None) or [*jaxpr.constvars, *jaxpr.invars]
        values = dict(zip(variables, [*known, *arguments], strict=True))
        last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if _is_variable(v)}
        kept = {v for v in jaxpr.outvars if _is_variable(v)}

        def read(atom: Any) -> _Value:
            return self.add(atom.val, None) if isinstance(atom, Literal) else values[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            found = self._apply(eqn, [read(v) for v in eqn.invars], at)
            values.update(zip(eqn.outvars, found, strict=True))
            for v in {v for v in (*eqn.invars, *eqn.outvars) if _is_variable(v)} - kept:
                if last.get(v, -1) <= i:
                    values.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def _apply(self, eqn: Any, given: list[_Value], at: _Place) -> list[_Value]:
        if (body := _body(eqn)) is not None:
            return self.run(*body, given, at.inside(eqn, body[0]))
        if eqn.primitive.name == "cond":
            branch = eqn.params["branches"][int(given[0].array)]
            return self.run(branch.jaxpr, branch.consts, given[1:], at.inside(eqn, branch.jaxpr))
        if eqn.primitive.name == "scan" and eqn.params["length"] <= MAX_ITERATIONS:
            return self._scan(eqn, given, at)
        if eqn.primitive.name == "while":
            return self._while(eqn, given, at)
        return self._bind(eqn, given, at)

    def _bind(self, eqn: Any, given: list[_Value], at: _Place) -> list[_Value]:
        arrays = [value.array for value in given]
        with eqn.ctx.manager:
            result = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
        results = result if eqn.primitive.multiple_results else [result]
        step = _Step(eqn, [value.index for value in given], at)
        return [self.add(x, step) for x in results]

    def _scan(self, eqn: Any, given: list[_Value], at: _Place) -> list[_Value]:
        p, closed = eqn.params, eqn.params["jaxpr"]
        # Named otherwise in each version of JAX; what is scanned over has one dimension more.
        num_scanned = _num_larger(eqn.invars, closed.jaxpr.invars)
        num_carry = len(eqn.outvars) - _num_larger(eqn.outvars, closed.jaxpr.outvars)
        num_consts = len(given) - num_scanned - num_carry
        consts, carry = given[:num_consts], given[num_consts : num_consts + num_carry]
        stacked = given[num_consts + num_carry :]
        inside, order = at.inside(eqn, closed.jaxpr), range(p["length"])
        rows: list[list[_Value]] = []
        for i in reversed(order) if p["reverse"] else order:
            sliced = [self.add(x.array[i], _Step(eqn, [x.index], at)) for x in stacked]
            results = self.run(closed.jaxpr, closed.consts, [*consts, *carry, *sliced], inside)
            carry = results[:num_carry]
            rows.append(results[num_carry:])
        if p["reverse"]:
            rows.reverse()
        columns = zip(*rows, strict=True)
        return [*carry, *(self._stacked(eqn, column, at) for column in columns)]

    def _stacked(self, eqn: Any, column: Sequence[_Value], at: _Place) -> _Value:
        step = _Step(eqn, [value.index for value in column], at)
        return self.add(jnp.stack([value.array for value in column]), step)

    def _while(self, eqn: Any, given: list[_Value], at: _Place) -> list[_Value]:
        p = eqn.params
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        of_test, of_body, carry = given[:first], given[first:second], given[second:]
        test, body = p["cond_jaxpr"], p["body_jaxpr"]
        inside = at.inside(eqn, body.jaxpr)
        for _ in range(MAX_ITERATIONS):
            if not self.run(test.jaxpr, test.consts, [*of_test, *carry], inside)[0].array:
                return carry
            carry = self.run(body.jaxpr, body.consts, [*of_body, *carry], inside)
        return self._bind(eqn, [*given[:second], *carry], at)

    def trace_back(self, output: str, index: int) -> Finding:
        """Return where a value comes from, as far back as it is not finite."""
        user = self._users(index)
        # Indices are the order of computation.
        origin = min((i for i in user if not self._bad_inputs(i)), default=None)
        if origin is None:
            # An infinite constant is meant; what made no number of it may not be.
            origin = min(user, key=lambda i: (self.kinds[i] != "nan", i))
        source = self.names.get(origin) if self.steps[origin] is None else None
        path: list[int] = [] if source else [origin]
        at = user[origin]
        while at is not None:
            path.append(at)
            at = user[at]
        operations = [self._operation(at) for at in path[:8]]
        first = operations[0] if operations else None
        return Finding(output=output, origin=first, source=source, path=tuple(operations))

    def _users(self, index: int) -> dict[int, int | None]:
        """Return what a value that is not finite was made of, each with what it went into."""
        user: dict[int, int | None] = {index: None}
        queue = [index]
        for at in queue:
            for i in self._bad_inputs(at):
                if i not in user and not self._is_constant(i):
                    user[i] = at
                    queue.append(i)
        return user

    def _bad_inputs(self, index: int) -> list[int]:
        step = self.steps[index]
        return [] if step is None else [i for i in step.inputs if self.kinds[i]]

    def _is_constant(self, index: int) -> bool:
        return self.steps[index] is None and index not in self.names

    def _operation(self, index: int) -> Operation:
        step = self.steps[index]
        assert step is not None
        eqn, scope = step.equation, f"{step.at.scope}/{step.equation.source_info.name_stack}"
        file, line, function = next(_frames(step.at.call or eqn), ("", 0, ""))
        shapes = (f"{v.aval.dtype}{list(v.aval.shape)}" for v in eqn.outvars)
        return Operation(
            primitive=eqn.primitive.name,
            file=file,
            line=line,
            function=function,
            module=(path_in(scope) or "").replace("/", "."),
            is_gradient="transpose(" in scope,
            shapes=", ".join(shapes),
            kind=self.kinds[index],
        )


def _body(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """Return the jaxpr that an operation only calls, and its constants."""
    if eqn.primitive.name not in _CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(name)
        if body is not None:
            return (body.jaxpr, body.consts) if isinstance(body, ClosedJaxpr) else (body, ())
    return None


def _frames(eqn: Any) -> Iterator[tuple[str, int, str]]:
    """Yield the lines of the user's program that an operation stems from, innermost first."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not _is_library(frame.file_name):
            yield frame.file_name, frame.line_num, frame.function_name


@functools.cache
def _is_library(file: str) -> bool:
    modules = [sys.modules[name] for name in _LIBRARIES if name in sys.modules]
    roots = [os.path.dirname(m.__file__) + os.sep for m in modules if m.__file__]
    stdlib = sysconfig.get_paths()["stdlib"] + os.sep
    # What a user has installed may lie below the standard library.
    is_standard = file.startswith((stdlib, "<")) and "site-packages" not in file
    return is_standard or file.startswith(tuple(roots))


def _num_larger(atoms: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(atoms, inside, strict=True)
    return sum(a.aval.shape != b.aval.shape for a, b in pairs)


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _kind(array: Any) -> str:
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        array = np.asarray(array)
        dtype = array.dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        return ""
    if bool(_holds(jnp.isfinite, array)):
        return ""
    return "inf" if bool(_holds(_is_number, array)) else "nan"


def _is_number(x: Any) -> Any:
    return ~jnp.isnan(x)


def _holds(test: Callable[[Any], Any], array: Any) -> Any:
    return jnp.all(test(array))


def names_of(tree: Any, prefix: str) -> list[str]:
    """Return a name for each leaf of a tree: `"batch/x"`."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    parts = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat)
    return [f"{prefix}/{part}" if part else prefix for part in parts]
