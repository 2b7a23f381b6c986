"""`Probe`: what a callback that tunes may ask of the machinery, before the step is compiled.

The trainer's side of it is `tuning.py`. May import levels 0 to 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtrainer.module import TrainModule
from jaxtrainer.run import Run


class Sizes(NamedTuple):
    """Sizes of a loader.

    Attributes:
        batch_size: Samples of a batch.
        num_samples: Samples of an epoch, if known.
        num_shards: Over how many parts of the mesh a batch is divided, evenly.
    """

    batch_size: int
    num_samples: int | None
    num_shards: int


class Probe(Protocol):
    """One call of `fit` or `tune`, between `setup` and the compilation of the training step.

    Attributes:
        run: The host's record.
        module: What will be trained; its attributes may be set.
        datamodule: Where the loaders come from, or None.
        loader: The training loader; another one may be put in its place.
        is_resumed: Whether the run goes on from a checkpoint. What the callback kept there it has
            got back by then.
    """

    run: Run
    module: TrainModule
    datamodule: Any
    loader: Any
    is_resumed: bool

    def range_test(self, attr: str, rates: np.ndarray) -> np.ndarray:
        """Train a copy with a rate for each step, and return the losses: `[steps]`, float64.

        Args:
            attr: Attribute of the module that `configure_optimizers` takes the rate from.
            rates: `[steps]`, float64.

        Raises:
            ConfigError: If the optimiser does not use the attribute.
        """
        ...

    @property
    def asks_for_loader(self) -> bool:
        """Return whether the loader comes from a `train_dataloader`, not from an argument."""
        ...

    def reload(self) -> None:
        """Ask that `train_dataloader` again."""
        ...

    def sizes(self) -> Sizes:
        """Return the sizes of the loader, whose first batch is read for it."""
        ...

    def free_bytes(self) -> int:
        """Return the bytes that a device can still give out."""
        ...

    def step_bytes(self, batch_size: int) -> int | None:
        """Return what training on batches of that size needs of a device, from specs alone.

        None if the compiler already knows that it is too much.
        """
        ...

    def try_step(self, batch_size: int) -> bool:
        """Return whether one step of that size runs without running out of memory."""
        ...
