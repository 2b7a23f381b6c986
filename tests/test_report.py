"""`on_report` says which step its values belong to, which is not the newest one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.errors import ConfigError
from tests import tiny
from tests.bad_input import refused

pytestmark = pytest.mark.usefixtures("compiled_once")


class Reports(Callback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.newest: list[int] = []

    def on_report(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        self.losses[step] = metrics["train/loss"]
        self.newest.append(run.global_step)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_report_has_the_step_of_its_values(steps: int):
    reports = Reports()
    result, _ = tiny.fit(
        callbacks=[reports], max_epochs=2, steps_per_dispatch=steps, log_every_n_steps=3
    )
    series = result.history.step["train/loss"]
    assert list(reports.losses) == series.steps == [3, 6, 9, 12, 15, 16]
    assert list(reports.losses.values()) == series.values
    assert reports.newest[0] > 3


def test_report_step_counts_updates_under_accumulation():
    reports = Reports()
    tiny.fit(callbacks=[reports], max_epochs=1, accumulate_grad_batches=4, log_every_n_steps=4)
    assert list(reports.losses) == [1, 2]


def test_report_hook_without_a_step_is_told_the_parameters():
    class Old(Callback):
        def on_report(self, run: Run, metrics: Mapping[str, float]) -> None: ...  # pyright: ignore

    refused(ConfigError, "def on_report(self, run, metrics, step)", callbacks=[Old()])
