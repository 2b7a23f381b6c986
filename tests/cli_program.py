"""What the tests of the command line name on it: modules and data of a user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrainer import Callback, DataModule, Run
from jaxtrainer.testing import TinyModule
from tests import tiny


class Keyed(TinyModule):
    """A module with a secret."""

    def __init__(self, learning_rate: float = 1e-2, api_key: str = "") -> None:
        super().__init__(learning_rate)
        self.api_key = api_key


class Acted(TinyModule):
    """A module whose defaults are no plain data."""

    def __init__(self, act: Callable[[Any], Any] = jax.nn.relu, dtype: Any = jnp.float32) -> None:
        super().__init__()
        self.act, self.dtype = act, dtype


class Broken(TinyModule):
    def __init__(self) -> None:
        raise TypeError("mine to mend")


class Mark(Callback):
    """Counts the runs that it was part of."""

    seen: list[str] = []  # noqa: RUF012 (the test reads it)

    def __init__(self, word: str) -> None:
        self.word = word

    def on_fit_end(self, run: Run) -> None:
        self.seen.append(self.word)


class Data(DataModule):
    def __init__(self, rows: int = 32, batch_size: int = 8) -> None:
        self.rows, self.batch_size = rows, batch_size

    def train_dataloader(self) -> Any:
        return tiny.make_loader(self.rows, self.batch_size)


def make_pair(batch_size: int = 8, **options: Any) -> Any:
    loaders = tiny.make_loader(32, batch_size, **options), tiny.make_batches(2, batch_size)
    return loaders


def make_stages() -> dict[str, Any]:
    return {"train": tiny.make_batches(2), "test": tiny.make_batches(3)}


def make_rows() -> Any:
    return tiny.make_batches(3)


NUMBER = 3
