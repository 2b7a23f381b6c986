"""What a user's step returned, checked while it is traced.

May import levels 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxtrainer.errors import StepError
from jaxtrainer.metrics import as_array
from jaxtrainer.types import Array, PyTree

_MAX_LEAVES = 8
"""Leaves of a batch that a note shows."""


def step_outputs(returned: Any, where: str, *, training: bool) -> dict[str, Any]:
    """Return what a step returned as a dict; a `"loss"` in it is a float32 scalar.

    Args:
        returned: The loss, a dict, or None from an evaluation step.
        where: The step's name, for messages.
        training: Whether there must be a loss that has a gradient.

    Raises:
        StepError: With the corrected `return`.
    """
    if returned is None and not training:
        return {}
    if not isinstance(returned, Mapping):
        return {"loss": scalar_loss(returned, f"{where} returned", _expected(training), training)}
    outputs = dict(returned)
    if "loss" in outputs:
        what = f"{where} returned a dict with 'loss':"
        outputs["loss"] = scalar_loss(outputs["loss"], what, _expected(training), training)
    elif training:
        keys = ", ".join(map(repr, outputs)) or "none"
        raise StepError(
            f"{where} returned a dict without 'loss' (keys: {keys}); {_expected(training)}."
        )
    return outputs


def scalar_loss(loss: Any, what: str, expected: str, training: bool = True) -> Array:
    """Return a loss as a float32 scalar.

    Args:
        loss: What is to be one.
        what: Whose it is, for messages: `"Mine.training_step returned"`.
        expected: What to write, for the message about something else.
        training: Whether it must have a gradient.

    Raises:
        StepError: If it is no real floating-point scalar.
    """
    array = as_array(loss)
    if array is None:
        raise StepError(f"{what} {_kind(loss)}; {expected}.")
    got = f"{what} {array.dtype}{list(array.shape)}"
    if array.shape != ():
        hint = "reduce it: `loss.mean()`" if training else "log it, or return it under another key"
        raise StepError(f"{got}, expected a scalar loss; {hint}.")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise StepError(f"{got}, expected a real loss; take a part of it: `loss.real`.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise StepError(
            f"{got}, expected a floating-point loss, which has a gradient; make it from the "
            "logits, not from their `argmax` or a comparison."
        )
    if training and not isinstance(loss, Tracer):
        raise StepError(
            f"{what} the constant {loss!r}, which has no gradient; compute the loss with "
            "`jax.numpy` from `model` and `batch`."
        )
    return array.astype(jnp.float32)


def _expected(training: bool) -> str:
    if training:
        return "write `return loss`, or `return {'loss': loss, 'logits': logits}`"
    return "return a dict, e.g. `{'loss': loss, 'logits': logits}`, or nothing"


def batch_weight(outputs: Mapping[str, Any], where: str, default: float) -> Array:
    """Return the weight of the batch under gradient accumulation: `[]`, float32."""
    given = outputs.get("weight", default)
    weight = as_array(given)
    if weight is None or weight.shape != () or weight.dtype.kind == "c":
        got = _kind(given) if weight is None else f"{weight.dtype}{list(weight.shape)}"
        raise StepError(
            f"{where} returned a dict with 'weight': {got}; it is one number for the whole batch, "
            "e.g. `mask.sum()`."
        )
    return weight.astype(jnp.float32)


def check_predictions(predictions: PyTree, where: str) -> None:
    """Raise StepError unless the predictions are a pytree of arrays."""
    leaves = jax.tree.leaves(predictions)
    wrong = [x for x in leaves if not hasattr(x, "shape")]
    if wrong or not leaves:
        got = _kind(wrong[0]) if wrong else _kind(predictions)
        raise StepError(
            f"{where} returned {got}; return an array, or a pytree of arrays: "
            "`return model(batch['x'])`."
        )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def noting(where: str, batch: PyTree) -> Iterator[None]:
    """Add to an error which step was being traced, and on what batch."""
    try:
        yield
    except Exception as error:
        flat = jax.tree_util.tree_flatten_with_path(batch)[0]
        shown = [f"{_name(path)}{x.dtype}{list(x.shape)}" for path, x in flat[:_MAX_LEAVES]]
        more = ", ..." if len(flat) > _MAX_LEAVES else ""
        error.add_note(f"while tracing {where} on a batch of {', '.join(shown)}{more}")
        raise


def _name(path: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"{name}: " if name else ""


def refuse_leaked(consts: Any, where: str) -> None:
    """Raise if the constants of a traced step are values of another trace, which is over."""
    leaked = [c for c in consts if isinstance(c, Tracer)]
    if leaked:
        found = ", ".join(f"{x.dtype}{list(x.shape)}" for x in leaked)
        raise StepError(
            f"{where} used traced values that do not live any more ({found}). They were kept by "
            "a function inside scan, vmap, grad or jit, or as an attribute: return them from "
            "that function instead (an output of the scan, `has_aux=True`)."
        )
