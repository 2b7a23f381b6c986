"""`LearningRateMonitor`: the learning rate of each report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, checks_options, did_you_mean
from jaxtrainer.metrics import host_scalar
from jaxtrainer.optim import Optimizer
from jaxtrainer.run import Run

_RATE = "learning_rate"
_UNSAID = {"default", "hyperparams", _RATE}
_UNSEEN = (
    "LearningRateMonitor cannot see the learning rate: the optimiser does not keep it in its "
    "state. Pass the schedule, `LearningRateMonitor(schedule=schedule)`, or return "
    "`optax.inject_hyperparams(optax.adam)(learning_rate=schedule)`."
)


class LearningRateMonitor(Callback):
    """Record the learning rate at every report, as a step series.

    An Optax schedule is part of the compiled step, which keeps no learning rate. It is known if
    you pass the schedule here too, or if the optimiser keeps it in its state
    (`optax.inject_hyperparams`): then nothing else is needed, and a rate that was changed by hand
    or by a plateau is seen as well. The rate of step `n` is the one with which update `n` was
    made, counted from 1: `schedule(n - 1)`.

    Args:
        name: Name of the series; of several rates, `name/<optimiser>` each, or `name/<label>`.
        schedule: The schedule given to the optimiser, a function of its step, or a constant; of
            several optimisers a dict of those by name. Of one that starts late pass none: its
            steps are counted from its start.

    Raises:
        ConfigError: Before anything compiles, if the rate cannot be known.

    Example:
        >>> import optax
        >>> schedule = optax.cosine_decay_schedule(1e-3, decay_steps=1000)
        >>> monitor = LearningRateMonitor(schedule=schedule)
    """

    _elsewhere: ClassVar[dict[str, str]] = {
        "logging_interval": "It records at reports: `Trainer(log_every_n_steps=...)`.",
        "log_key_prefix": "Pass the whole name: `name='optimizer/lr'`.",
        "log_momentum": "What `optax.inject_hyperparams` keeps is in `run.state.opt_state`.",
        "log_weight_decay": "What `optax.inject_hyperparams` keeps is in `run.state.opt_state`.",
    }

    @checks_options
    def __init__(
        self,
        *,
        name: str = "lr",
        schedule: Callable[[Any], Any] | float | Mapping[str, Any] | None = None,
    ) -> None:
        by_name = schedule if isinstance(schedule, Mapping) else {"": schedule}
        for given in by_name.values() if schedule is not None else ():
            if not callable(given) and not _is_number(given):
                raise ConfigError(
                    f"schedule={given!r}: pass the function of the step that the optimiser got, "
                    "or a number; of several optimisers a dict by name."
                )
        self.name = name
        self.schedule = schedule
        self._schedules = {f"{name}/{k}" if k else name: s for k, s in by_name.items()}
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None

    def wrap_optimizers(
        self, run: Run, optimizers: Mapping[str, Optimizer]
    ) -> Mapping[str, Optimizer]:
        """Say what to pass before anything compiles, if the rate will not be seen; change none."""
        if self.schedule is None and not any(_may_inject(o.tx) for o in optimizers.values()):
            raise ConfigError(_UNSEEN)
        return optimizers

    def on_fit_start(self, run: Run) -> None:
        """Find the rate, or say what to pass."""
        self._pending = None
        for name in self.schedule if isinstance(self.schedule, Mapping) else ():
            if name not in run.state.opt_state:
                known = ", ".join(map(repr, run.state.opt_state))
                hint = did_you_mean(name, run.state.opt_state)
                raise ConfigError(
                    f"LearningRateMonitor got a schedule for the optimizer {name!r}; there are "
                    f"{known}.{hint}"
                )
        if self.schedule is None and not _injected(run.state.opt_state):
            raise ConfigError(_UNSEEN)

    def on_report(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        """Record the rate of the reported step, or of an injected one what is known by now."""
        if self.schedule is not None:
            rates = {name: self._scheduled(name, step) for name in self._schedules}
            run.record("step", rates, step)
        elif self._pending is None or self._pending[0] < run.global_step:
            # The newest state is still being computed: it is read at the next report.
            self._flush(run)
            rates = _injected(run.state.opt_state)
            # Copies, because the next step takes over the memory of the state.
            copies = {k: jnp.copy(v) for k, v in rates.items()}
            self._pending = run.global_step, run.samples, copies

    def on_train_end(self, run: Run) -> None:
        """Record what is left."""
        self._flush(run)

    def _scheduled(self, name: str, step: int) -> float:
        schedule = self._schedules[name]
        if not callable(schedule):
            return host_scalar(name, schedule)
        # On the accelerator it would wait behind the steps in the queue.
        with _on_cpu():
            return host_scalar(name, schedule(max(step - 1, 0)))

    def _flush(self, run: Run) -> None:
        if self._pending is None:
            return
        (step, samples, rates), self._pending = self._pending, None
        values = jax.device_get(rates)
        many = len(rates) > 1
        names = {key: f"{self.name}/{key}" if key and many else self.name for key in rates}
        known = {n: host_scalar(n, values[key]) for key, n in names.items()}
        run.record("step", known, step, samples)


def _may_inject(tx: optax.GradientTransformation) -> bool:
    """Return whether an optimiser keeps rates, as far as one parameter can tell."""
    try:
        return bool(_injected(jax.eval_shape(tx.init, {"": jnp.zeros(())})))
    except Exception:
        # One that goes by the names of its parameters is looked at when it has them.
        return True


def _injected(opt_state: Any) -> dict[str, jax.Array]:
    """Return the rates in an optimiser's state, by the labels on the way to them."""
    found = list(_rates(opt_state))
    labels = [label for label, _ in found]
    unique = len(set(labels)) == len(labels)
    return {label if unique else str(i): rate for i, (label, rate) in enumerate(found)}


def _rates(opt_state: Any) -> Iterator[tuple[str, jax.Array]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        if keys[-2:] == ["hyperparams", _RATE]:
            labels = [k for k, key in zip(keys, path, strict=True) if isinstance(key, DictKey)]
            said = [k.removeprefix("default.") for k in labels if k not in _UNSAID]
            yield "/".join(said), leaf


def _on_cpu() -> AbstractContextManager[Any]:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return nullcontext()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
