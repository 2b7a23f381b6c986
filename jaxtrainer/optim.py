"""Optimisers and the parameters that each owns: what `configure_optimizers` may return.

Ownership is settled on names and shapes, before anything is traced. May import levels 0 and 1,
and `state`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.precision import wide, widened
from jaxtrainer.state import Nested, flat_items, nest
from jaxtrainer.types import Array, PyTree

Variables = Mapping[str, tuple[tuple[Any, ...], Any]]
"""The path and the variable of each parameter, as NNX filters get them, by its name."""

_SHOWN = 12
"""Parameters that a message names."""

_EXAMPLE = (
    "`return {'generator': Optimizer(optax.adam(1e-4), wrt='generator'), 'critic': "
    "Optimizer(optax.adam(1e-4), wrt='critic')}`, with `from jaxtrainer import Optimizer`"
)


@dataclass(frozen=True)
class Optimizer:
    """An Optax transformation, and the parameters that it owns.

    `TrainModule.configure_optimizers` returns one, or a dict of several by name. A parameter that
    none owns is frozen: it does not change, has no optimiser state, and no gradient is computed
    for it.

    Args:
        tx: The transformation. It sees its own parameters only, so that what it does over all of
            them (a global norm) is over those.
        wrt: The name of an array or of a module with all that is below it (`"backbone/conv1"`);
            a pattern of such names with `*`, `?` or `[...]`, where `*` stands for any characters,
            `/` too (`"*/bias"`); an NNX filter (`nnx.LoRAParam`, `nnx.PathContains("head")`, or a
            function `(path, variable) -> bool` with the path as a tuple of keys); a list of these,
            for what any of them matches; or `...`, all that no other optimiser owns.
        start_epoch: Its parameters are frozen before this epoch (counted from 0). Their gradients
            are computed meanwhile, but enter no norm. The optimiser's own counters, such as the
            step of a schedule, start with it.
        start_step: Likewise, before so many training steps have been made.

    Raises:
        ConfigError: For anything that is no Optax transformation, with the corrected code.

    Example:
        >>> optimizers = {
        ...     "backbone": Optimizer(optax.adam(1e-5), wrt="backbone"),
        ...     "rest": Optimizer(optax.adam(1e-3)),
        ... }
    """

    tx: optax.GradientTransformation
    wrt: Any = ...
    _: KW_ONLY
    start_epoch: int = 0
    start_step: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.tx, optax.GradientTransformation):
            raise ConfigError(
                f"Optimizer got {_kind(self.tx)}, expected an `optax.GradientTransformation`; "
                f"{_instead(self.tx, 'pass')}."
            )
        for name in ("start_epoch", "start_step"):
            start = getattr(self, name)
            if not isinstance(start, int) or isinstance(start, bool) or start < 0:
                raise ConfigError(f"{name} must be an integer of at least 0, got {start!r}.")


def parse_optimizers(returned: Any, owner: str, variables: Variables) -> dict[str, Optimizer]:
    """Return what `configure_optimizers` returned by name, each `wrt` as a tuple of names.

    A plain transformation, or an `Optimizer` alone, is called `"default"`.

    Args:
        returned: What the user's method returned.
        owner: Class of the user's module, for messages.
        variables: The model's parameters.

    Raises:
        ConfigError: For anything else, with the corrected code; for a parameter that two own, or
            an optimiser that owns none.
    """
    where = f"{owner}.configure_optimizers"
    if isinstance(returned, optax.GradientTransformation):
        returned = Optimizer(returned)
    if isinstance(returned, Optimizer):
        returned = {"default": returned}
    if not isinstance(returned, Mapping) or not returned or not _are_optimizers(returned):
        raise ConfigError(
            f"{where} returned {_kind(returned)}, expected an `optax.GradientTransformation`, an "
            f"`Optimizer`, or a dict of those by name; {_instead(returned)}."
        )
    return resolve(returned, where, variables)


def resolve(
    optimizers: Mapping[str, Optimizer], where: str, variables: Variables
) -> dict[str, Optimizer]:
    """Return the optimisers with each `wrt` as a tuple of names; errors as `parse_optimizers`."""
    owned = {k: _owned(o.wrt, variables, where) for k, o in optimizers.items() if o.wrt is not ...}
    taken = {name for names in owned.values() for name in names}
    rest = tuple(name for name in variables if name not in taken)
    owned = {k: owned.get(k, rest) for k in optimizers}
    for name, optimizer in optimizers.items():
        if not owned[name]:
            raise ConfigError(_owns_nothing(f"{where}: optimizer {name!r}", optimizer, variables))
    _refuse_shared(owned, where)
    return {
        name: replace(o, tx=optax.with_extra_args_support(o.tx), wrt=owned[name])
        for name, o in optimizers.items()
    }


def owners(optimizers: Mapping[str, Optimizer]) -> dict[str, str]:
    """Return the optimiser of each parameter by name; those that are not there are frozen.

    Args:
        optimizers: As `parse_optimizers` returns them.

    Example:
        >>> owners({"head": Optimizer(optax.sgd(0.1), wrt=("head/bias", "head/kernel"))})
        {'head/bias': 'head', 'head/kernel': 'head'}
    """
    return {path: name for name, optimizer in optimizers.items() for path in optimizer.wrt}


def matching(names: Iterable[str], pattern: str) -> tuple[str, ...]:
    """Return the names that are the pattern, are below it, or that it matches with wildcards.

    Example:
        >>> matching(["net/first/bias", "net/last/bias", "net_ema/bias"], "net")
        ('net/first/bias', 'net/last/bias')
        >>> matching(["net/first/bias", "net/last/kernel"], "*/bias")
        ('net/first/bias',)
    """
    if any(c in pattern for c in "*?["):
        return tuple(name for name in names if fnmatch.fnmatchcase(name, pattern))
    below = pattern.rstrip("/") + "/"
    return tuple(name for name in names if name == pattern or name.startswith(below))


def nearest(part: str, names: Iterable[str]) -> str:
    """Return `" Did you mean 'encoder'?"` for the closest module or parameter, or nothing."""
    paths = [name.split("/") for name in names]
    parts = {"/".join(path[:n]) for path in paths for n in range(1, len(path) + 1)}
    return did_you_mean(part, sorted(parts))


def listed(names: Sequence[str]) -> str:
    """Return the first names, for a message."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def select(nested: Mapping[str, Any], names: Collection[str]) -> Nested:
    """Return the arrays of those names, as nested dicts."""
    wanted = set(names)
    return nest({name: leaf for name, leaf in flat_items(nested) if name in wanted})


def join(nested: Mapping[str, Any], part: Mapping[str, Any]) -> Nested:
    """Return the first with the arrays of the second in place of its own."""
    return nest({**dict(flat_items(nested)), **dict(flat_items(part))})


def clip(grads: PyTree, limit: float, algorithm: str) -> tuple[PyTree, Array | None]:
    """Clip gradients, and return them with their global norm before (None if not computed).

    Args:
        grads: Pytree of gradients.
        limit: Largest norm of all gradients together (`"norm"`), or of each number (`"value"`).
        algorithm: `"norm"` or `"value"`.

    References:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013.
    """
    if algorithm == "value":
        return jax.tree.map(lambda g: jnp.clip(g, -limit, limit), grads), None
    norm = optax.tree.norm(widened(grads))
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-16))
    return jax.tree.map(lambda g: (g.astype(wide(g.dtype)) * scale).astype(g.dtype), grads), norm


def _owned(wrt: Any, variables: Variables, where: str) -> tuple[str, ...]:
    matches = _predicate(wrt, variables, where)
    return tuple(name for name in variables if matches(name))


def _predicate(wrt: Any, variables: Variables, where: str) -> Callable[[str], bool]:
    """Return whether a parameter of that name is meant."""
    if isinstance(wrt, str):
        return set(matching(variables, wrt)).__contains__
    if isinstance(wrt, Sequence | set | frozenset):
        each = [_predicate(part, variables, where) for part in wrt]
        return lambda name: any(matches(name) for matches in each)
    if not callable(wrt):
        raise ConfigError(
            f"{where}: wrt={wrt!r}: pass the name of a module or parameter (`wrt='backbone'`), a "
            "pattern (`'*/bias'`), an NNX filter, a list of these, or `...` for all others."
        )
    given: Any = wrt
    chosen = nnx.filterlib.to_predicate(given)
    return lambda name: bool(chosen(*variables[name]))


def _refuse_shared(owned: Mapping[str, Sequence[str]], where: str) -> None:
    by_path: dict[str, list[str]] = {}
    for name, paths in owned.items():
        for path in paths:
            by_path.setdefault(path, []).append(name)
    shared = [f"{path} ({' and '.join(names)})" for path, names in by_path.items() if names[1:]]
    if shared:
        raise ConfigError(
            f"{where}: parameters that two optimizers own: {listed(shared)}. Each may have one "
            "owner; `wrt=...` (an Ellipsis) is all that no other owns."
        )


def _owns_nothing(what: str, optimizer: Optimizer, variables: Variables) -> str:
    if optimizer.wrt is ...:
        return f"{what} owns no parameter, because the others own all of them. Leave it out."
    wrt = optimizer.wrt
    hint = nearest(wrt, variables) if isinstance(wrt, str) else ""
    return f"{what} owns no parameter: wrt={wrt!r} matches none of {listed([*variables])}.{hint}"


def _are_optimizers(returned: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and k and isinstance(o, Optimizer) for k, o in returned.items())


def _kind(value: Any) -> str:
    if value == {}:
        return "an empty dict"
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _instead(returned: Any, verb: str = "return") -> str:
    """Return what to write in place of something that is no optimiser."""
    if isinstance(returned, tuple | list | Mapping):
        values = list(returned.values() if isinstance(returned, Mapping) else returned)
        several = [x for x in values if isinstance(x, optax.GradientTransformation | Optimizer)]
        if isinstance(returned, Mapping) and several and len(several) == len(values):
            return f"say which parameters each owns: {_EXAMPLE}"
        if len(several) > 1:
            return f"name several, and say which parameters each owns: {_EXAMPLE}"
        return (
            f"a schedule is part of its optimizer: {verb} e.g. "
            "`optax.adam(optax.cosine_decay_schedule(1e-3, steps))`"
        )
    if isinstance(returned, nnx.Optimizer):
        alone = "the transformation alone, without params"
        return f"the trainer keeps its state itself: {verb} {alone}"
    if hasattr(returned, "gradient_transformation"):
        return f"{verb} its `.gradient_transformation()`"
    if callable(returned):
        return f"call it: {verb} e.g. `optax.adam(1e-3)`, or `optax.adam(schedule)`"
    return f"{verb} e.g. `optax.adam(1e-3)`"
