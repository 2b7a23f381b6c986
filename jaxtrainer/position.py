"""Where a run is, as a checkpoint records it: taken from the run, and put back into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxtrainer.dispatch import Dispatch
from jaxtrainer.errors import CheckpointMismatchError
from jaxtrainer.feed import Feed
from jaxtrainer.hooks import CallbackList
from jaxtrainer.record import base_record
from jaxtrainer.run import Run

_COUNTERS = ("epoch", "batch_idx", "global_step", "total_batches", "samples")
_VALIDATION = ("validated_batches", "validated_at_s", "owes_validation")


def record_of(run: Run, hooks: CallbackList, feed: Feed, dispatch: Dispatch) -> dict[str, Any]:
    """Return the record of a run where it is: counters, place in the data, states of callbacks."""
    loop = {name: getattr(run, name) for name in _COUNTERS}
    loader_state = run.loader_state
    if run.is_epoch_end:
        loop.update(epoch=run.epoch + 1, batch_idx=0)
        loader_state = None
    user: dict[str, Any] = {}
    hooks.on_save_checkpoint(run, user)
    return {
        **base_record(),
        "loop": {**loop, "elapsed_s": run.elapsed_s},
        "validation": {name: getattr(run, name) for name in _VALIDATION},
        "data": {
            **_data_record(feed),
            **_shapes_record(feed),
            "loader_state": loader_state,
        },
        "program": {
            "fused": dispatch.fused,
            "capacity": dispatch.capacity,
            "steps": dispatch.steps,
        },
        "metrics": run.metrics,
        "callbacks": hooks.state_dict(),
        "user": user,
    }


def resume(run: Run, record: dict[str, Any]) -> None:
    """Put a run where its record was taken."""
    loop = record["loop"]
    for name in _COUNTERS:
        setattr(run, name, loop[name])
    for name, value in record.get("validation", {}).items():
        setattr(run, name, value)
    run.loader_state = record["data"]["loader_state"]
    run.elapsed_before_s = loop["elapsed_s"]
    run.metrics.update(record["metrics"])
    run.resumed_step = run.global_step


def check_data(record: dict[str, Any], feed: Feed, path: Path | None) -> None:
    """Compare the training loader with that of the record at `path`.

    Raises:
        CheckpointMismatchError: If the position in the data would mean other samples.
    """
    saved = record.get("data", {})
    for name, here in _data_record(feed).items():
        if name in saved and saved[name] != here:
            raise CheckpointMismatchError(
                f"{path} was saved with a training loader of {name}={saved[name]!r}, "
                f"now it is {here!r}: the position in the data would mean other samples. "
                "Use the same loader, or start a new run from the checkpoint's weights."
            )


def _data_record(feed: Feed) -> dict[str, Any]:
    loader = getattr(feed.source, "loader", None)
    names = {"seed": "order_seed", "num_samples": "num_samples"}
    known = {name: getattr(loader, attribute, None) for name, attribute in names.items()}
    # Of a user's loader these may be anything: only numbers say which samples there are.
    numbers = {k: int(v) if isinstance(v, int | np.integer) else None for k, v in known.items()}
    rows = feed.rows if feed.shapes is None else feed.shapes.rows
    return {"batch_size": rows, **numbers}


def _shapes_record(feed: Feed) -> dict[str, Any]:
    return {} if feed.shapes is None else {"shapes": feed.shapes.used}
