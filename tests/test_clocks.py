"""The wall clock may jump: limits, intervals and rates go by a clock that never goes back."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import Any

import pytest

import jaxtrainer
from jaxtrainer import Callback, Every, Run
from jaxtrainer.callbacks import Checkpoint, Throughput, Timer
from jaxtrainer.rundir import saved_steps
from tests import tiny

HOUR = 3600.0
PACKAGE = Path(jaxtrainer.__file__).parent
MAY_ASK = "records.py"
"""Writes the wall clock down, beside the time of the run."""

WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}


class Jump(Callback):
    """Puts the wall clock forward or back after a few steps."""

    def __init__(self, jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jump_s, self.patch = jump_s, monkeypatch

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.global_step == 4:
            real = time.time
            self.patch.setattr(time, "time", lambda: real() + self.jump_s)


@pytest.mark.parametrize("jump_s", [HOUR, -HOUR], ids=["forward", "back"])
def test_jump_of_the_clock_ends_no_run_and_is_due_for_nothing(
    jump_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saver = Checkpoint(tmp_path, train_time_interval="00:00:50:00", save_top_k=-1)
    result, _ = tiny.fit(
        tiny.make_batches(8),
        tiny.make_batches(2),
        callbacks=[Jump(jump_s, monkeypatch), saver, Timer(duration="00:00:50:00"), Throughput()],
        max_epochs=2,
        max_time="00:00:50:00",
        val_check_interval=Every(minutes=50),
    )
    assert (result.stop_reason, result.num_steps) == ("max_epochs", 16)
    assert saved_steps(tmp_path) == [16]
    # That of the end.
    assert len(result.history["val/loss"]) == 1
    assert 0 < result.elapsed_s < HOUR
    assert all(0 <= seconds < HOUR for seconds in result.timings.values())


def names_called(source: str) -> set[str]:
    """Dotted names of what a module calls, by their last two parts."""
    calls = [n.func for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return {".".join(ast.unparse(f).split(".")[-2:]) for f in calls}


def test_package_does_not_ask_the_wall_clock():
    found = {p.name: names_called(p.read_text()) & WALL for p in PACKAGE.rglob("*.py")}
    assert found.pop(MAY_ASK) == {"time.time"}
    assert not {name: names for name, names in found.items() if names}


def test_look_at_the_source_finds_a_wall_clock():
    assert names_called("import time\nstart = time.time()") & WALL
