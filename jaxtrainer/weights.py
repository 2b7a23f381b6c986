"""The weights that a checkpoint is evaluated with. May import levels 0 to 3."""

from __future__ import annotations

from pathlib import Path

from jaxtrainer.averaging import average_spec, narrowed, overlaid
from jaxtrainer.checkpoint import restore_items, saved_names
from jaxtrainer.layout import Layout
from jaxtrainer.types import PyTree


def restore_variables(
    path: Path, layout: Layout, trained: tuple[PyTree, PyTree]
) -> tuple[PyTree, PyTree]:
    """Return what a checkpoint is evaluated with: the averaged weights, if it has them.

    Args:
        path: A step directory.
        layout: Where they are to live.
        trained: Specs of `(params, model_state)`, with shardings.
    """
    names = saved_names(path, "averaged")
    if not names:
        items = restore_items(path, dict(zip(("params", "model_state"), trained, strict=True)))
        return items["params"], items.get("model_state", {})
    has_buffers = any(name.startswith("model_state/") for name in names)
    averaged = layout.of_averaged(average_spec(*trained, use_buffers=has_buffers))
    items = restore_items(path, {"model_state": trained[1], "averaged": averaged})
    items["averaged"].setdefault("model_state", {})
    latest = {}, items.get("model_state", {})
    return narrowed(overlaid(items["averaged"], *latest), trained)
