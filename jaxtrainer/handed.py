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
        places = places if _is_same_of_all(call.params, places[0], index) else []
    return call.invars[places[0]] if places else None


def _is_same_of_all(scan: Any, given: int, result: int) -> bool:
    """Return whether a result of a loop's body that is its argument is so for the whole loop."""
    # What each turn hands on to the next is; so is each slice that is stacked again.
    first, num_carry = scan["num_consts"], scan["num_carry"]
    is_slice = given >= first + num_carry and result >= num_carry
    return is_slice or (result < num_carry and given == first + result)
