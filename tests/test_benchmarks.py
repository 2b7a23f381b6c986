"""The benchmarks still run, and time what they say. No timing decides here."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import jax
import pytest

from benchmarks import common, memory, overhead, startup, tradeoffs, transformer
from benchmarks.common import Block
from benchmarks.models import SIZES
from benchmarks.report import Report

FOLDER = Path(common.__file__).parent
SCRIPTS = [p.stem for p in FOLDER.glob("*.py") if "def main(" in p.read_text(encoding="utf-8")]


def blocks(*seconds: float, loss: float = 1.0) -> list[Block]:
    return [Block(epoch_s=s, first_s=0.0, loss=loss) for s in seconds]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_imports_and_explains_itself(name, capsys):
    script = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert f"benchmarks/{name}.py" in capsys.readouterr().out


@pytest.mark.slow
def test_overhead_times_trainer_and_references():
    report = Report(name="overhead")
    options = {"mesh": {"data": 1}, "compilation_cache": False}
    overhead.measure(report, steps=64, rounds=1, epochs=1, **options)
    runs, added = (table["rows"] for table in report.tables)
    assert {"trainer", "K = 1", "limit", "bare"} < {row["run"] for row in runs}
    assert all(row["us/step"] > 0 for row in runs)
    assert 1 <= int({row["run"]: row["K"] for row in runs}["trainer"]) <= 64
    assert all(math.isfinite(row["us/step"]) for row in added)


@pytest.mark.slow
def test_tradeoffs_time_every_setting():
    with jax.numpy_dtype_promotion("standard"):
        rows = tradeoffs.tradeoff_rows(SIZES["tiny"], 4, 2, 1, 1)
    assert [row["setting"] for row in rows] == [*tradeoffs.SETTINGS]
    by_name = {row["setting"]: row for row in rows}
    again, kept = (by_name[f"bf16-mixed{more}"]["XLA GFLOP"] for more in (", remat all", ""))
    assert again > kept
    assert all(row["ms/step"] > 0 for row in rows)


def test_report_is_one_json_object(capsys):
    report = Report(name="x", as_json=True)
    report.add("times", [{"run": "a", "ms": 1.5}])
    report.finish()
    printed = json.loads(capsys.readouterr().out)
    assert printed["tables"] == [{"title": "times", "rows": [{"run": "a", "ms": 1.5}], "note": ""}]
    assert printed["machine"]["jax"] == jax.__version__


def test_rounds_are_interleaved():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ABC"}
    common.interleave(runs, 2)
    assert "".join(order) == "ABCABC"


def test_ratio_is_the_median_over_rounds():
    # The machine was ten times slower in the last round, which touches no ratio of one round.
    results = {"a": blocks(2.0, 3.0, 20.0), "b": blocks(1.0, 1.0, 10.0)}
    assert common.ratio(results, "a", "b") == 2.0
    assert common.added_us(results, "a", "b", steps=1000) == pytest.approx(2000.0)


@pytest.mark.parametrize("loss", [1.3, math.nan])
def test_runs_that_learn_differently_are_refused(loss):
    results = {"a": blocks(1.0), "b": blocks(1.0, loss=loss)}
    with pytest.raises(RuntimeError, match="compute different things"):
        common.rows_of(results, 10, ("b",))


def test_growth_is_the_slope_after_the_first_quarter():
    # 7 bytes a step, after a start in which everything is loaded.
    late = [(10**6 + 7 * memory.EPOCH * i, 12 + i % 2, 3) for i in range(12)]
    found = memory.trend([(0, 1, 1)] * 4 + late)
    assert found.pop("bytes/step") == pytest.approx(7.0)
    assert found == {"live arrays": "12 to 13", "threads": "3 to 3"}


def test_start_is_compared_within_a_round():
    def start(seconds: float) -> dict[str, dict[str, float]]:
        return {cache: {"fit_s": seconds} for cache in ("no cache", "empty", "warm")}

    results = {"trainer": [start(1.0), start(30.0)], "by hand": [start(2.0), start(60.0)]}
    trainer, _ = startup.start_rows(results, "fit_s")
    assert trainer["/ by hand, no cache"] == 0.5
    assert trainer["warm / no cache"] == 1.0


def test_transformer_counts_its_matrices():
    size = transformer.Size()
    params = jax.eval_shape(transformer.transformer(size, 1, 1).init, jax.random.key(0))
    matrices = sum(p.size for p in params.values() if p.ndim == 2)
    assert size.num_params == matrices
    assert size.flops_per_token > 6 * (matrices - params["position"].size)
