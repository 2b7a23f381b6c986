"""`build_step`: the compiled training step and the feed of a loader, for a loop of one's own.

What `Trainer.fit` drives, without its loop and all that hangs on it: hooks, callbacks, signals,
checkpoints. May import levels 0 to 6.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrainer.assemble import TracedStep, compile_step
from jaxtrainer.checks import require
from jaxtrainer.data import device_transform_of
from jaxtrainer.dispatch import Dispatch, chunk_capacity
from jaxtrainer.feed import Chunk, Feed
from jaxtrainer.loops.controls import Controls
from jaxtrainer.module import TrainModule, thaw
from jaxtrainer.session import Session
from jaxtrainer.sharding import place, replicated
from jaxtrainer.state import TrainState
from jaxtrainer.trainer import Trainer


def build_step(
    module: TrainModule,
    loader: Any,
    *,
    max_epochs: int | None = None,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: Literal["norm", "value"] = "norm",
    precision: str = "32-true",
    mesh: Mapping[str, int] | Mesh | None = None,
    sharding: Any = None,
    steps_per_dispatch: int | Literal["auto"] = "auto",
    compilation_cache: str | os.PathLike[str] | bool | None = None,
) -> tuple[TrainStep, TrainFeed]:
    """Return the compiled training step of a module, and the feed of its loader.

    For loops that `Trainer.fit` is not: several states in turn, data that depends on the last
    epoch. The same seed gives the same bits as `fit`. Hooks, of the module too, are not called,
    and Ctrl-C is Python's. The module's attributes that the step has read stay as they are until
    the feed is closed.

    Args:
        module: As in `fit`. If it has a trained `model`, states start from it.
        loader: As in `fit`.
        max_epochs: What `run.estimated_steps` goes by, in a schedule; nothing ends after it.
        accumulate_grad_batches: As in `Trainer`, as are the rest.
        gradient_clip_val: Clip gradients at this norm or value.
        gradient_clip_algorithm: `"norm"` or `"value"`.
        precision: `"32-true"`, `"bf16-mixed"` or `"bf16-true"`.
        mesh: Device mesh as axis sizes; all devices by default.
        sharding: How parameters are divided over it.
        steps_per_dispatch: Steps of one call of the compiled program at most.
        compilation_cache: Directory of compiled programs; False for none.

    Raises:
        JaxTrainerError: For input that cannot work, as `fit` raises it.

    Example:
        >>> from jaxtrainer.testing import TinyModule, tiny_loader
        >>> step, feed = build_step(TinyModule(), tiny_loader())
        >>> state = step.init(seed=0)
        >>> with feed:
        ...     for epoch in range(2):
        ...         for batches in feed:
        ...             state, logged = step(state, batches)
        >>> model = step.model(state)
    """
    require(module, ("configure_model", "configure_optimizers", "training_step"))
    trainer = Trainer(
        max_epochs=max_epochs,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
        gradient_clip_algorithm=gradient_clip_algorithm,
        precision=precision,
        mesh=mesh,
        sharding=sharding,
        steps_per_dispatch=steps_per_dispatch,
        compilation_cache=compilation_cache,
    )
    session = Session(trainer.options, (), module, "fit", None)
    thaw(module)
    module.run = session.run
    feed = session.train_feed(loader, endless=True)
    try:
        capacity = chunk_capacity(steps_per_dispatch, feed.spec.fed, session.run.num_batches)
        traced = TracedStep(session, feed.spec, device_transform_of(loader), capacity)
        dispatch, make_state = compile_step(session, traced, feed)
    except BaseException:
        session.close(feed)
        thaw(module)
        raise
    step = TrainStep(session, traced, dispatch, make_state, feed.resident)
    return step, TrainFeed(feed, capacity, module)


@final
@dataclass(frozen=True, kw_only=True)
class Batches:
    """Some consecutive batches of one epoch, on the device.

    Attributes:
        epoch: Index of the epoch.
        batch_idx: Index in the epoch of the first of them.
        size: How many they are.
        is_last: Whether the epoch ends with them.
        chunk: What the step reads; its layout may change.
        feed: Where they come from.
    """

    epoch: int
    batch_idx: int
    size: int
    is_last: bool
    chunk: Chunk
    feed: Feed


@final
class TrainFeed:
    """Reads the loader in a thread of its own, ahead of the loop, epoch after epoch.

    Iterated it yields the `Batches` of one epoch, and iterated again those of the next; a loop
    that was left within an epoch goes on there. To be closed at the end, or used in a `with`.

    Attributes:
        num_batches: Batches of an epoch, if known.
    """

    def __init__(self, feed: Feed, capacity: int, module: TrainModule) -> None:
        self.num_batches = feed.num_batches
        self._feed, self._capacity, self._module = feed, capacity, module
        self._chunks: Iterator[Chunk] | None = None
        self._epoch = self._batch_idx = 0

    def __iter__(self) -> Iterator[Batches]:
        if self._chunks is None:
            self._chunks = iter(self._feed.start(self._capacity))
        for chunk in self._chunks:
            batches = Batches(
                epoch=self._epoch,
                batch_idx=self._batch_idx,
                size=chunk.size,
                is_last=chunk.is_last,
                chunk=chunk,
                feed=self._feed,
            )
            self._batch_idx += chunk.size
            if chunk.is_last:
                self._epoch, self._batch_idx = self._epoch + 1, 0
            yield batches
            if chunk.is_last:
                return

    def close(self) -> None:
        """Stop reading, and let the module's attributes change again."""
        self._feed.close()
        thaw(self._module)

    def __enter__(self) -> TrainFeed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@final
class TrainStep:
    """The compiled training step: `state, logged = step(state, batches)`.

    It runs all the batches it is given, in as few dispatches as it can, and returns at once. The
    state is a pytree with `params`, `model_state`, `opt_state` and more; its arrays are donated,
    so that the one that was passed is gone afterwards. To keep it, copy it before:
    `jax.tree.map(jnp.copy, state)`.
    """

    def __init__(
        self,
        session: Session,
        traced: TracedStep,
        dispatch: Dispatch,
        make_state: Callable[..., TrainState],
        resident: Any,
    ) -> None:
        self._run, self._adapter = session.run, session.initializer.adapter
        self._totals = traced.program.totals
        self._dispatch, self._resident = dispatch, resident
        self._make_state, self._given = make_state, traced.init_arguments[1]
        self._place = lambda x: place(x, replicated(session.mesh))
        self._controls = Controls(
            dispatch.capacity, self._place, counts_epochs=traced.counts_epochs
        )

    def init(self, seed: int = 0) -> TrainState:
        """Return a state before the first step: that of `Trainer(seed=seed)`."""
        state = self._make_state(np.uint32(seed), self._given)
        return state._replace(totals=self._place(self._totals.initial()))

    def __call__(self, state: TrainState, batches: Batches) -> tuple[TrainState, Logged]:
        """Train on the batches; return the state after them, and what each step logged."""
        program, parts, start = self._dispatch, [], 0
        while start < batches.size:
            self._run.epoch, self._run.batch_idx = batches.epoch, batches.batch_idx + start
            if program.fused:
                count = min(batches.size - start, program.steps)
                control, _ = self._controls.several(self._run, batches.chunk, start, count)
            else:
                count = 1
                control, _ = self._controls.single(self._run, batches.chunk, start)
            state, rows = program.step(state, self._resident, batches.chunk.tree, control)
            batches.feed.dispatched(rows)
            parts.append(_Part(rows, start if program.fused else 0, count))
            start += count
        return state, Logged([s.name for s in self._totals.specs if not s.shape], parts)

    def means(self, state: TrainState) -> dict[str, float]:
        """Return the exact means, over the epoch so far, of what the steps logged."""
        return self._totals.compute(np.asarray(state.totals))

    def model(self, state: TrainState) -> Any:
        """Return the model in evaluation mode, with copies that later steps leave alone."""
        params, model_state = jax.tree.map(jnp.copy, (state.params, state.model_state))
        return self._adapter.merge(params, model_state, training=False)


class _Part(NamedTuple):
    """Rows of metrics on the device, of which `size` from `start` on are meant."""

    rows: jax.Array
    start: int
    size: int


@final
class Logged(Mapping[str, np.ndarray]):
    """What each of some steps logged, by series: `[steps]`, float32.

    Nothing is fetched from the device, nor waited for, before a value is read.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[_Part]) -> None:
        self._names, self._parts = names, parts

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(f"{name!r} was not logged; logged: {', '.join(self._names)}")
        column = self._names.index(name)
        return np.concatenate(
            [np.asarray(p.rows)[p.start : p.start + p.size, column] for p in self._parts]
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
