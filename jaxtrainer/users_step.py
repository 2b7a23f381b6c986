"""The user's step as the programs call it: the model put together, the step run and read back.

Everything here is traced, by the builders of `step.py`. May import levels 0 to 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrainer.flax_metrics import refuse_kept
from jaxtrainer.layout import Layout
from jaxtrainer.manual import Updates, refuse_changed_params
from jaxtrainer.metrics import Recorder
from jaxtrainer.module import TrainModule, step_name, tracing
from jaxtrainer.outputs import batch_weight, noting, step_outputs
from jaxtrainer.precision import Precision
from jaxtrainer.scopes import scopes_of
from jaxtrainer.state import Adapter, Nested
from jaxtrainer.types import Array, PyTree, Stage
from jaxtrainer.update import like


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What the programs of one call of the trainer have in common.

    Attributes:
        layout: Where the state lives.
        capacity: Batches a chunk holds.
        traced: Traced parts of the callbacks.
        arguments: What the user's step gets beside model and batch: the loader's name.
        matmul_precision: Of matrix products: see `Trainer`; None leaves it to JAX.
        offloads: Whether the optimiser's state comes from the host, and goes back there. Then
            steps run one by one.
    """

    module: TrainModule
    adapter: Adapter
    precision: Precision
    layout: Layout
    traced: Sequence[Callable[..., None]] = ()
    transform: Callable[[PyTree], PyTree] | None = None
    resident: bool = False
    capacity: int = 1
    arguments: Mapping[str, str] = field(default_factory=dict)
    matmul_precision: str | None = None
    offloads: bool = False


class UsersStep:
    """Runs the user's step while tracing, and keeps what it logged and returned (as shapes)."""

    def __init__(self, options: StepOptions, stage: Stage) -> None:
        self.options = options
        self.stage: Stage = stage
        name = step_name(options.module, stage)
        self.step = getattr(options.module, name)
        self.where = f"{type(options.module).__name__}.{name}"
        self.outputs: Mapping[str, Any] = {}

    def run(
        self,
        params: Nested,
        model_state: Nested,
        batch: PyTree,
        key: Array | None,
        updates: Updates | None = None,
    ) -> Any:
        """Return `(loss, (model_state, row, weights, batch weight))`.

        With `updates` the step makes them itself, and they have the parameters after it.
        """
        options, training = self.options, self.stage == "train"
        batch = prepared(options, batch)
        given = options.precision.cast_params(params) if updates is None else updates.given
        given = given if updates is not None else options.layout.whole_params(given)
        rows = num_rows(batch)
        self.recorder = recorder = Recorder(self.stage, default_weight=float(rows))

        def run(given: Nested, recorder: Recorder) -> tuple[Any, Nested, Nested, Any]:
            model = options.adapter.merge(given, model_state, training=training)
            if updates is not None:
                updates.model = model
            with noting(self.where, batch), tracing(options.module, recorder, key, updates):
                returned = self.step(model, batch, **options.arguments)
                needs_loss = training and updates is None
                outputs = step_outputs(returned, self.where, training=needs_loss)
            # A model that cannot be changed in place is the one that the step returns.
            last = outputs.pop("model", model if updates is None else updates.model)
            last = last if training else model
            return outputs, *options.adapter.read_back(last, where=self.where), model

        with scopes_of(options.adapter):
            outputs, after, new_state, model = run(given, recorder)
            if updates is not None:
                updates.finish(after)
            elif training:
                # A recorder takes what is logged in the trace that it was made in.
                refuse_changed_params(
                    given, after, self.where, lambda given: run(given, Recorder(self.stage))[1]
                )
        refuse_kept(recorder.metrics, model, self.where)
        loss = outputs.get("loss", jnp.zeros(()))
        for traced in options.traced:
            traced(self.stage, outputs, batch, recorder.log)
        if "loss" in outputs and not any(n.split("/")[-1] == "loss" for n in recorder.specs):
            recorder.log("loss", loss)
        self.outputs = {k: _shapes(v) for k, v in outputs.items()}
        weight = batch_weight(outputs, self.where, float(rows))
        state = like(model_state, new_state) if training else model_state
        return loss, (state, recorder.row(), recorder.weight_row(), weight)


def prepared(options: StepOptions, batch: PyTree) -> PyTree:
    """Return the batch as the step gets it: divided, transformed, in the dtype of computation."""
    batch = options.layout.divided_batch(batch)
    batch = options.transform(batch) if options.transform else batch
    return options.precision.cast_to_compute(batch)


def num_rows(batch: PyTree) -> int:
    """Return the samples in a batch, by its first array that is no scalar; 1 without one."""
    leaves = [x for x in jax.tree.leaves(batch) if np.ndim(x)]
    return leaves[0].shape[0] if leaves else 1


def _shapes(value: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, value
    )
