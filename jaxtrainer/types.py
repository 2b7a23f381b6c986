"""Aliases and the small Protocols behind which the parts of the package meet.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array
Stage: TypeAlias = Literal["train", "validate", "test", "predict"]
Reduce: TypeAlias = Literal["mean", "sum", "min", "max"]
Clock: TypeAlias = Callable[[], float]
"""Seconds from an arbitrary origin, never going back: `time.monotonic` or a manual clock."""


class LogFn(Protocol):
    """What `TrainModule.log` and the traced part of a callback call to record a scalar."""

    def __call__(
        self,
        name: str,
        value: Any,
        *,
        prog_bar: bool = False,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce: Reduce = "mean",
        weight: Any = None,
    ) -> None:
        """Record one scalar of the running step."""
        ...


@runtime_checkable
class IndexedLoader(Protocol):
    """A loader over arrays in memory whose batches are rows chosen by an index.

    The feed asks it for indices instead of batches, so that a whole chunk is gathered in
    one call, or on the device where the arrays may live (`data.from_arrays` makes one).
    """

    batch_size: int

    @property
    def arrays(self) -> Mapping[str, Any] | PyTree:
        """Pytree of `[num_samples, ...]` NumPy arrays."""
        ...

    def batch_indices(self, epoch: int) -> Any:
        """Return the rows of an epoch in order: `[num_samples]`, int32."""
        ...

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...


@runtime_checkable
class StatefulIterator(Protocol):
    """An iterator that can say where it is and go back there (Grain's do)."""

    def __iter__(self) -> Iterator[Any]:
        """Return itself."""
        ...

    def __next__(self) -> Any:
        """Return the next batch."""
        ...

    def get_state(self) -> Any:
        """Return the position as JSON data or bytes."""
        ...

    def set_state(self, state: Any) -> None:
        """Go to a position that `get_state` returned."""
        ...
