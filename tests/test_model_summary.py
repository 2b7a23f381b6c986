"""`ModelSummary`: what `fit` prints about the model and its step."""

from __future__ import annotations

import io
from typing import Any

import optax
import pytest
from rich.console import Console

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import ModelSummary
from jaxtrainer.errors import ConfigError
from jaxtrainer.optim import Optimizer
from tests.bad_input import Compilations
from tests.tiny import Tiny, make_batches, make_trainer


def console(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)


def printed(out: Console) -> str:
    text = out.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    return "\n".join(line.rstrip() for line in text.splitlines())


def summary_of(module: Any = None, **options: Any) -> ModelSummary:
    callback = ModelSummary(console=console())
    trainer = make_trainer([callback], max_epochs=1, **options)
    trainer.fit(module or Tiny(), make_batches(2))
    return callback


def test_summary_is_printed_when_fit_starts():
    out = console()
    callback = ModelSummary(console=out)
    make_trainer([callback], max_epochs=1).fit(Tiny(), make_batches(1))
    assert "kernel f32[4,8]" in printed(out)
    assert str(callback.summary) == printed(out).strip("\n")
    # Two linear layers and a BatchNorm: 4*8+8, 8*3+3, 2*8.
    assert callback.summary is not None
    assert callback.summary.num_params == 40 + 27 + 16


def test_summary_has_the_classes_of_the_modules():
    summary = summary_of().summary
    assert summary is not None
    kinds = [(row.path, row.kind) for row in summary.rows]
    assert kinds == [
        ("first", "Linear"),
        ("norm", "BatchNorm"),
        ("dropout", "Dropout"),
        ("last", "Linear"),
    ]


def test_summary_tells_what_is_frozen():
    module = Tiny(tx=Optimizer(optax.adam(1e-3), wrt="last"))
    summary = summary_of(module).summary
    assert summary is not None
    trains = {row.path: row.trains for row in summary.rows}
    assert trains == {"first": "frozen", "norm": "frozen", "dropout": "no", "last": "yes"}


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_summary_has_the_figures_of_the_step(steps: int):
    class Plans(Callback):
        def on_fit_start(self, run: Run) -> None:
            self.plan = run.plan

    plans, callback, compiled = Plans(), ModelSummary(console=console()), Compilations()
    trainer = make_trainer([plans, callback, compiled], max_epochs=1, steps_per_dispatch=steps)
    trainer.fit(Tiny(), make_batches(4))
    # Forward and backward: 2 FLOP for each weight and sample, three times but for the first layer.
    assert plans.plan.flops > 8 * (2 * 2 * 4 * 8 + 3 * 2 * 8 * 3)
    assert plans.plan.peak_bytes > plans.plan.device_bytes
    assert callback.summary is not None
    assert callback.summary.figures == plans.plan.figures()
    assert compiled.names == ["train step"]


def test_plan_of_a_run_is_that_of_the_trainer():
    class Plans(Callback):
        def on_fit_start(self, run: Run) -> None:
            self.plan = run.plan

    plans = Plans()
    trainer = make_trainer([plans], max_epochs=1)
    planned = trainer.plan(Tiny(), make_batches(2))
    trainer.fit(Tiny(), make_batches(2))
    same = ("num_params", "state_bytes", "device_bytes", "batch_size", "modules", "shards")
    assert [getattr(plans.plan, n) for n in same] == [getattr(planned, n) for n in same]
    # The batch is taken out of a chunk of several, which counts some operations.
    assert plans.plan.flops == pytest.approx(planned.flops, abs=50)


def test_plan_of_a_loader_is_that_of_its_batch():
    batches, trainer = make_batches(2), make_trainer(max_epochs=1)
    assert trainer.plan(Tiny(), batches) == trainer.plan(Tiny(), batches[0])


def test_there_is_no_plan_outside_fit():
    class Plans(Callback):
        def on_validation_end(self, run: Run) -> None:
            self.plan = run.plan

    plans = Plans()
    make_trainer([plans]).validate(Tiny(), make_batches(1), verbose=False)
    assert plans.plan is None


def test_depth_is_passed_on():
    callback = ModelSummary(max_depth=0, console=console())
    make_trainer([callback], max_epochs=1).fit(Tiny(), make_batches(1))
    assert callback.summary is not None
    assert callback.summary.rows == ()


def test_depth_below_all_is_refused():
    with pytest.raises(ConfigError, match="max_depth"):
        ModelSummary(max_depth=-2)
