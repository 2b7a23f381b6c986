"""Faults on purpose: a loader that breaks at a batch, a callback that breaks at a step.

May import levels 0 to 2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxtrainer.callback import HOOKS, Callback
from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree


class FaultyLoader:
    """A loader whose batch at one index does not come as it should.

    Args:
        loader: Where the batches come from; an iterable that can be read again.
        at: Index of the batch, in each pass over the loader.
        raises: Raise this in place of the batch.
        sleep_s: Wait so long before it.
        change: Give what this makes of it, e.g. `with_nan`.
        in_pass: The only pass in which it happens, counted from 0; None for every one.

    Attributes:
        num_passes: How often it was iterated.

    Example:
        >>> loader = FaultyLoader([1, 2, 3], at=1, change=lambda batch: -batch)
        >>> list(loader)
        [1, -2, 3]
    """

    def __init__(
        self,
        loader: Iterable[PyTree],
        at: int,
        *,
        raises: BaseException | None = None,
        sleep_s: float = 0.0,
        change: Callable[[PyTree], PyTree] | None = None,
        in_pass: int | None = None,
    ) -> None:
        if raises is None and not sleep_s and change is None:
            raise ConfigError("FaultyLoader needs a fault: pass raises=, sleep_s= or change=.")
        self.loader = loader
        self.at = at
        self.raises, self.sleep_s, self.change = raises, sleep_s, change
        self.in_pass = in_pass
        self.num_passes = 0

    def __len__(self) -> int:
        return len(self.loader)  # pyright: ignore[reportArgumentType] (TypeError if it has none)

    def __iter__(self) -> Iterator[PyTree]:
        is_faulty = self.in_pass in (None, self.num_passes)
        self.num_passes += 1
        return self._batches(self.at if is_faulty else -1)

    def _batches(self, at: int) -> Iterator[PyTree]:
        for i, batch in enumerate(self.loader):
            yield self._broken(batch) if i == at else batch

    def _broken(self, batch: PyTree) -> PyTree:
        time.sleep(self.sleep_s)
        if self.raises is not None:
            raise self.raises
        return batch if self.change is None else self.change(batch)


def with_nan(batch: PyTree) -> PyTree:
    """Return the batch with NaN for its first sample, in every floating-point leaf."""

    def poison(leaf: Any) -> Any:
        array = np.array(leaf)
        if jax.numpy.issubdtype(array.dtype, np.floating):
            array[0] = np.nan
        return array

    return jax.tree.map(poison, batch)


class FaultAt(Callback):
    """Strikes once, in one hook, when the run has reached an optimiser step.

    Args:
        hook: Where, e.g. `"on_train_batch_end"`, `"on_validation_start"` or `"on_save_point"`.
        step: From which step on; a dispatch ends there.
        raises: Raise this.
        sends: Send the process this signal: `signal.SIGKILL`, `signal.SIGTERM`.
        calls: Call this with the run.

    Attributes:
        has_struck: Whether it has.

    Example:
        >>> fault = FaultAt("on_train_batch_end", step=3, raises=RuntimeError("on purpose"))
    """

    def __init__(
        self,
        hook: str,
        *,
        step: int = 0,
        raises: BaseException | None = None,
        sends: int | None = None,
        calls: Callable[[Run], object] | None = None,
    ) -> None:
        if hook not in HOOKS:
            raise ConfigError(f"there is no hook {hook!r}.{did_you_mean(hook, HOOKS)}")
        if raises is None and sends is None and calls is None:
            raise ConfigError("FaultAt needs a fault: pass raises=, sends= or calls=.")
        self.step = step
        self.at_train_steps = (step,)
        self.raises, self.sends, self.calls = raises, sends, calls
        self.has_struck = False
        setattr(self, hook, self._strike)

    def _strike(self, run: Run, *arguments: Any) -> None:
        if self.has_struck or run.global_step < self.step:
            return
        self.has_struck = True
        if self.calls is not None:
            self.calls(run)
        if self.sends is not None:
            os.kill(os.getpid(), self.sends)
        if self.raises is not None:
            raise self.raises
