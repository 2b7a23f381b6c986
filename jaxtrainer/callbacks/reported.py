"""Which step a report is about. Knows the run only."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtrainer.run import Run


def reported_step(run: Run, metrics: Mapping[str, float]) -> int:
    """Return the optimiser step that the values of `on_report` belong to.

    Reports come late, so that `run.global_step` is a later one.

    Args:
        run: The run.
        metrics: What `on_report` got.
    """
    series = (run.history.step.get(name) for name in metrics)
    return next((s.steps[-1] for s in series if s is not None), run.global_step)
