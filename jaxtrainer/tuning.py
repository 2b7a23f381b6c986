"""What callbacks that tune get to work with: the training step of a session, on copies.

Runs between `setup` and the compilation of the training step; see `Callback.tune`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrainer.assemble import compile_form
from jaxtrainer.control import APPLY, ENDS_WINDOW, STOP
from jaxtrainer.data import device_transform_of
from jaxtrainer.dispatch import CHUNK_BYTES
from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.feed import Feed
from jaxtrainer.memory import free_bytes, is_out_of_memory
from jaxtrainer.module import TrainModule, thaw
from jaxtrainer.plan import peak_bytes_of
from jaxtrainer.probe import Sizes
from jaxtrainer.programs import shardings
from jaxtrainer.rate import TrialRate
from jaxtrainer.reread import rereadable, rewind
from jaxtrainer.session import Session
from jaxtrainer.shapes import ByShape
from jaxtrainer.sharding import num_data_shards, place, replicated
from jaxtrainer.traced import TracedStep
from jaxtrainer.trial import TrialSpecs


def tune(session: Session) -> None:
    """Let the callbacks that tune choose, one after the other, and take what they chose."""
    if not session.hooks.tuners:
        return
    probe, states = SessionProbe(session), (session.record or {}).get("callbacks", {})
    for callback in session.hooks.tuners:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])
        with session.run.timings.phase("tune"):
            callback.tune(probe)
    probe.finish()


class SessionProbe:
    """A `Probe` on an entered session."""

    def __init__(self, session: Session) -> None:
        assert session.loaders is not None
        self._session, self._loaders = session, session.loaders
        self.run, self.module = session.run, session.module
        self.datamodule = session.loaders.datamodule
        self.is_resumed = session.record is not None
        self.loader: Any = self._loaders.get("train")
        self._specs: TrialSpecs | None = None
        self._steps: dict[int, tuple[TracedStep, Any]] = {}

    def finish(self) -> None:
        """Hand the loader to the session, with none of its batches read."""
        rewind(self.loader)
        # Also if it is the one that was asked for: `train_dataloader` is not called once more.
        self._loaders.given["train"] = self.loader

    @property
    def asks_for_loader(self) -> bool:
        """See `Probe`."""
        return self._loaders.given.get("train") is None

    def reload(self) -> None:
        """See `Probe`."""
        self.loader = self._loaders.get("train")

    def range_test(self, attr: str, rates: np.ndarray) -> np.ndarray:
        """See `Probe`."""
        session, owner = self._session, type(self.module).__name__
        _require_attribute(self.module, attr)
        self.loader = rereadable(self.loader)
        rate = TrialRate(rates, f"{owner}.{attr}")
        feed = session.train_feed(self.loader, endless=True)
        try:
            with _replaced(self.module, attr, rate):
                test = _RangeTest(session, feed, device_transform_of(self.loader), len(rates))
            if not rate.was_used:
                raise ConfigError(
                    f"LearningRateFinder found that {owner}.configure_optimizers does not use "
                    f"`self.{attr}`, which it would change; write e.g. `optax.adam(self.{attr})`, "
                    f"or name the attribute: `LearningRateFinder(attr=...)`."
                )
            return test.losses()
        finally:
            session.close(feed)

    def sizes(self) -> Sizes:
        """See `Probe`."""
        self.loader = rereadable(self.loader)
        if self._specs is None or self._specs.loader is not self.loader:
            self._specs, self._steps = TrialSpecs(self.loader, self._session.mesh), {}
        shards = num_data_shards(self._session.mesh)
        return Sizes(self._specs.rows, self._specs.num_samples, shards)

    def free_bytes(self) -> int:
        """See `Probe`."""
        return free_bytes(self._session.mesh.local_devices)

    def step_bytes(self, batch_size: int) -> int | None:
        """See `Probe`."""
        session = self._session
        try:
            _, compiled = self._compiled(batch_size)
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise
        assert self._specs is not None
        waiting = self._specs.waiting_bytes(batch_size, session.options.steps_per_dispatch)
        return peak_bytes_of(compiled) + waiting

    def try_step(self, batch_size: int) -> bool:
        """See `Probe`."""
        step, compiled = self._compiled(batch_size)
        *arrays, control = step.arguments
        try:
            state, resident, chunk = (_zeros(specs) for specs in arrays)
            jax.block_until_ready(
                compiled(state, resident, chunk, np.zeros(control.shape, np.int32))
            )
        except Exception as error:
            if is_out_of_memory(error):
                return False
            raise
        return True

    def _compiled(self, batch_size: int) -> tuple[TracedStep, Any]:
        self.sizes()
        assert self._specs is not None
        if batch_size not in self._steps:
            spec = self._specs.feed_spec(batch_size)
            try:
                step = TracedStep(self._session, spec, device_transform_of(self.loader), 1)
                lowered = step.lower(step.program.single)
            finally:
                thaw(self.module)
            name = f"train step for {batch_size} samples"
            self._steps[batch_size] = step, self._session.compile(name, lowered.compile)
        return self._steps[batch_size]


class _RangeTest:
    """The training step as one scanned program, and the feed that it reads.

    Args:
        session: Entered.
        feed: Of the training loader, without an end; started here.
        transform: Of the loader, for the device.
        steps: Optimiser steps to take.
    """

    def __init__(self, session: Session, feed: Feed, transform: Any, steps: int) -> None:
        self.session, self.feed, self.steps = session, feed, steps
        self.accumulate = session.run.accumulate
        fed = jax.tree.leaves(feed.spec.fed)
        size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in fed)
        self.capacity = max(1, min(steps * self.accumulate, CHUNK_BYTES // max(size, 1)))
        self.step = TracedStep(session, feed.spec, transform, self.capacity)
        self._column = _loss_column(self.step, type(session.module).__name__)
        self._test = self.step.lower(self.step.program.fused)
        self._init = self.step.init.lower(*self.step.init_arguments)

    def losses(self) -> np.ndarray:
        """Return the loss of each optimiser step: `[steps]`, float64."""
        step, accumulate, total = self.step, self.accumulate, self.steps * self.accumulate
        program, make_state = self._compile()
        run = ByShape(step.arguments[2], program, self._for_shape)
        totals = place(step.program.totals.initial(), replicated(self.session.mesh))
        state = make_state(*step.init_arguments)._replace(totals=totals)
        losses: list[float] = []
        for chunk in self.feed.start(self.capacity):
            count = min(chunk.size, total - len(losses))
            control = np.zeros(step.arguments[-1].shape, np.int32)
            control[STOP] = count
            ends = (len(losses) + 1 + np.arange(count)) % accumulate == 0
            control[APPLY : APPLY + count] = ENDS_WINDOW * ends
            state, rows = run(state, self.feed.resident, chunk.tree, control)
            losses += np.asarray(rows)[:count, self._column].tolist()
            if len(losses) == total:
                break
        means = np.array(losses).reshape(self.steps, accumulate).mean(axis=1)
        _check_updates(state.opt_state, means)
        return means

    def _for_shape(self, chunk: Any) -> Any:
        step = self.step.for_chunk(self.session, chunk)
        try:
            return compile_form(self.session, step, "fused", "learning rate range test")
        finally:
            thaw(self.session.module)

    def _compile(self) -> tuple[Any, Any]:
        once = self.session.initializer.compile_options()
        return self.session.compile(
            "learning rate range test", lambda: (self._test.compile(), self._init.compile(once))
        )


def _loss_column(step: TracedStep, owner: str) -> int:
    names = [spec.name for spec in step.program.specs]
    for i, name in enumerate(names):
        if name == "train/loss" or (name.endswith("/loss") and "train/loss" not in names):
            return i
    raise ConfigError(
        f"{owner}.training_step logs no loss that the range test could follow (series: "
        f"{', '.join(names) or 'none'}); return it, or `self.log('loss', loss)`."
    )


def _check_updates(opt_state: Any, losses: np.ndarray) -> None:
    """Raise ConfigError if the optimisers did not follow the rates, one a step."""
    flat = jax.tree_util.tree_flatten_with_path(opt_state)[0]
    counts = [int(x) for path, x in flat if getattr(path[-1], "name", "") == "count" and not x.ndim]
    steps, updates = len(losses), max(counts, default=len(losses))
    # A transformation that leaves out updates which are not finite counts a few less.
    is_slow = 2 * updates <= steps and np.isfinite(losses).all()
    if updates > steps or is_slow:
        raise ConfigError(
            f"the range test made {updates} updates in {steps} steps, and has a learning rate for "
            "each step. Leave out `optax.MultiSteps` (`Trainer(accumulate_grad_batches=...)` does "
            "the same), or let a training step call `self.minimize` once for each optimizer."
        )


def _require_attribute(module: TrainModule, attr: str) -> None:
    if hasattr(module, attr):
        return
    numbers = [k for k, v in vars(module).items() if isinstance(v, float) and k[0] != "_"]
    known = [k for k in ("lr", "learning_rate") if hasattr(module, k)]
    hint = did_you_mean(attr, known, 0.0) or did_you_mean(attr, numbers)
    raise ConfigError(
        f"LearningRateFinder(attr={attr!r}): {type(module).__name__} has no such attribute; it "
        f"would hold the learning rate: `self.{attr} = 1e-3`.{hint}"
    )


@contextmanager
def _replaced(module: TrainModule, attr: str, value: Any) -> Iterator[None]:
    """Give an attribute another value, also for steps traced meanwhile."""
    had, before = attr in vars(module), getattr(module, attr)
    setattr(module, attr, value)
    try:
        yield
    finally:
        thaw(module)
        setattr(module, attr, before)
        if not had:
            delattr(module, attr)


def _zeros(specs: Any) -> Any:
    """Return arrays of zeros where the specs say, made there."""
    if specs is None:
        return None
    make = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), specs),
        out_shardings=shardings(specs),
    )
    return make()
