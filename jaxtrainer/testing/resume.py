"""Digests of states, and the check that an interrupted run goes on to the same bits.

May import everything but the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxtrainer.datamodule import Loaders
from jaxtrainer.errors import ConfigError
from jaxtrainer.module import TrainModule
from jaxtrainer.types import PyTree
from jaxtrainer.verify import Subject, Verification, compare_runs, digest, host_arrays


def digest_of(thing: TrainModule | nnx.Module | PyTree) -> str:
    """Return one hash over all arrays of a state, a model or a module that was trained.

    Equal bits, names, shapes and dtypes have equal digests, on any machine and in any process.

    Args:
        thing: `run.state`, `module` (its `model`), an `nnx.Module`, or any pytree of arrays.

    Raises:
        ConfigError: If there is no array in it.

    Example:
        >>> import numpy as np
        >>> digest_of({"x": np.zeros(2)}) == digest_of({"x": np.ones(2)})
        False
    """
    found = thing
    if isinstance(found, TrainModule):
        found = found.model
    if isinstance(found, nnx.Module):
        found = nnx.to_pure_dict(nnx.state(found))
    if not [leaf for leaf in jax.tree.leaves(found) if hasattr(leaf, "dtype")]:
        raise ConfigError(
            f"digest_of got a {type(thing).__name__} without arrays; pass `run.state`, a model, or "
            "a module after `fit`."
        )
    return digest(host_arrays(found))


def check_resume(
    make_trainer: Callable[[], Any],
    make_module: Callable[[], TrainModule],
    make_loader: Callable[[], Any],
    *,
    make_val_loader: Callable[[], Any] | None = None,
    at_steps: int | Sequence[int] | None = None,
    steps: int = 20,
) -> Verification:
    """Train with and without interruptions, and fail unless every array has the same bits.

    As `Trainer.verify_resume`, with everything made anew for each run, as a new process would.
    Callbacks that save, show or find something take no part.

    Args:
        make_trainer: Makes the trainer.
        make_module: Makes the module.
        make_loader: Makes the training loader.
        make_val_loader: Makes the validation loader, if there is one.
        at_steps: After how many optimiser updates to interrupt and resume; several, one after the
            other. None: after a third of the steps.
        steps: Optimiser updates of each run.

    Returns:
        What was compared.

    Raises:
        AssertionError: If the resumed run ends with other bits, naming the arrays.

    Example:
        >>> from jaxtrainer import Trainer
        >>> from jaxtrainer.testing import TinyModule, tiny_loader
        >>> def make_trainer():
        ...     return Trainer(max_epochs=3, enable_progress_bar=False)
        >>> def test_resume():
        ...     check_resume(make_trainer, TinyModule, tiny_loader, at_steps=[3, 9])
    """

    def make() -> Subject:
        trainer, module = make_trainer(), make_module()
        validate = None if make_val_loader is None else make_val_loader()
        loaders = Loaders("fit", module, None, train=make_loader(), validate=validate)
        parts = {"options": trainer.options, "lineup": trainer._lineup}
        return Subject(**parts, module=module, loaders=loaders)

    report = compare_runs(make, steps=steps, at=at_steps)
    if not report.is_equal:
        raise AssertionError(str(report))
    return report
