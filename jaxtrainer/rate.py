"""`TrialRate`: the learning rate of a range test, which optimisers take for a schedule.

Traced into the step of the test. Imports `errors` and `types` only.
"""

from __future__ import annotations

from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from jaxtrainer.errors import ConfigError
from jaxtrainer.types import Array

_COMPUTED = (
    *("add", "radd", "sub", "rsub", "rtruediv", "pow", "rpow", "matmul", "rmatmul"),
    *("float", "int", "lt", "le", "gt", "ge", "array", "jax_array"),
)


class TrialRate:
    """An Optax schedule that gives step `i` the rate `rates[i]`, and can be scaled.

    `rate * 0.1` is a schedule as well, for a group of parameters with a rate of its own. All other
    arithmetic is refused with the correction, because a schedule is no number.

    Args:
        rates: `[steps]`, float64; the last one stays on.
        attribute: The module's attribute that it stands for, for messages.

    Attributes:
        was_used: Whether it, or a multiple of it, was asked for a rate.

    Example:
        >>> rate = TrialRate(np.array([0.25, 0.5]), "Digits.learning_rate")
        >>> float((rate / 2)(1)), rate.was_used
        (0.25, True)
    """

    # NumPy's scalars would otherwise make an array of objects when they come first.
    __array_ufunc__ = None

    def __init__(self, rates: np.ndarray, attribute: str, *, source: TrialRate | None = None):
        self.rates = rates
        self.attribute = attribute
        self.was_used = False
        self._source = source or self

    def __call__(self, count: Any) -> Array:
        """Return the rate of a step: `[]`, float32."""
        self._source.was_used = True
        return jnp.asarray(self.rates, jnp.float32)[jnp.minimum(count, len(self.rates) - 1)]

    def __mul__(self, factor: Any) -> TrialRate:
        if not isinstance(factor, int | float | np.number):
            self._refuse()
        return TrialRate(self.rates * float(factor), self.attribute, source=self._source)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> TrialRate:
        if not isinstance(divisor, int | float | np.number):
            self._refuse()
        return self * (1 / float(divisor))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        owner, name = self.attribute.rsplit(".", 1)
        raise ConfigError(
            f"the range test puts an Optax schedule in the place of {self.attribute}, and "
            f"{owner} computed with it as with a number. Where a schedule is made of it, write "
            f"`rate = self.{name}`, `schedule = rate if callable(rate) else "
            "optax.cosine_decay_schedule(rate, steps)`: the test then finds its highest rate."
        )


for _name in _COMPUTED:
    setattr(TrialRate, f"__{_name}__", TrialRate._refuse)
