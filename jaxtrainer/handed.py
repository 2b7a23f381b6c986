"""Arguments that a traced function hands back, also through calls of other traced functions.

`nnx.remat` and `nnx.jit` give every variable of a module back as a result of their own: a new
value to look at, and the same. Knows jaxprs, nothing of training. Imports nothing of the package.
"""

from __future__ import annotations

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Var


def handed_back(jaxpr: ClosedJaxpr) -> list[bool]:
    """Return of each argument whether it is the result in the same place; as many of both."""
    inner = jaxpr.jaxpr
    pairs = zip(inner.invars, inner.outvars, strict=True)
    return [_origin(inner, out) is given for given, out in pairs]


def _origin(jaxpr: Jaxpr, var: Any) -> Any:
    """Return the argument that a variable is; another variable if it was computed."""
    made_by = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    while isinstance(var, Var) and var in made_by:
        eqn = made_by[var]
        given = _through(eqn, eqn.outvars.index(var))
        if given is None:
            return var
        var = given
    return var


def _through(call: Any, index: int) -> Any:
    """Return the argument of a call that one of its results is; None if it is none of them."""
    called = call.params.get("jaxpr")
    inner = called.jaxpr if isinstance(called, ClosedJaxpr) else called
    if not isinstance(inner, Jaxpr):
        return None
    origin = _origin(inner, inner.outvars[index])
    places = [i for i, var in enumerate(inner.invars) if var is origin]
    if places and call.primitive.name == "scan":
        places = places if _is_same_of_all(call, inner, places[0], index) else []
    return call.invars[places[0]] if places else None


def _is_same_of_all(scan: Any, body: Jaxpr, given: int, result: int) -> bool:
    """Return whether a result of a loop's body that is its argument is so for the whole loop."""
    # By dimensions, because versions of JAX keep the numbers of these in different ways.
    num_sliced = sum(map(_has_another_axis, scan.invars, body.invars))
    num_carry = len(body.outvars) - sum(map(_has_another_axis, scan.outvars, body.outvars))
    first_slice = len(body.invars) - num_sliced
    # What each turn hands on to the next is; so is each slice that is stacked again.
    is_slice = given >= first_slice and result >= num_carry
    return is_slice or (result < num_carry and given == first_slice - num_carry + result)


def _has_another_axis(outer: Any, inner: Any) -> bool:
    return len(outer.aval.shape) > len(inner.aval.shape)
