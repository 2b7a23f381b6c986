"""`jaxtrainer.testing`: each helper passes what is right and finds what is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer import Callback, Run, Trainer, testing
from jaxtrainer.callbacks import EMA, Checkpoint, EarlyStopping, Throughput
from jaxtrainer.errors import ConfigError
from jaxtrainer.testing import FaultAt, FaultyLoader, FromEpoch, TinyModule, tiny_loader
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")


def make_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return tiny.make_trainer(callbacks, **{"max_epochs": 3, **options})


def test_check_resume_passes_with_callbacks_and_validation(tmp_path: Path):
    report = testing.check_resume(
        lambda: make_trainer(EMA(0.9), EarlyStopping("val/loss"), Checkpoint(tmp_path)),
        TinyModule,
        tiny_loader,
        make_val_loader=lambda: tiny_loader(20, seed=1),
        at_steps=[3, 9],
        steps=14,
    )
    assert (report.at, report.steps, report.is_equal) == ((3, 9), 14, True)
    assert [*tmp_path.iterdir()] == []


def test_check_resume_fails_with_the_arrays_that_differ():
    scales = iter([1.0, 1.0, 2.0])

    def make_loader() -> Any:
        scale = np.float32(next(scales))
        return [{**batch, "x": batch["x"] * scale} for batch in tiny.make_batches(8)]

    with pytest.raises(AssertionError, match=r"arrays differ\n  .*: \d+ of \d+ values, by at most"):
        testing.check_resume(make_trainer, TinyModule, make_loader, at_steps=3, steps=6)


def test_digest_is_of_names_and_bits():
    arrays = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.int32)}
    digest = testing.digest_of(arrays)
    assert digest == testing.digest_of({name: jnp.array(x) for name, x in arrays.items()})
    others = [
        {"a": -arrays["a"], "b": arrays["b"]},
        {"c": arrays["a"], "b": arrays["b"]},
        {"a": arrays["a"].astype(np.float16), "b": arrays["b"]},
        {"a": arrays["a"][None], "b": arrays["b"]},
    ]
    assert len({digest, *map(testing.digest_of, others)}) == 5


def test_digest_of_a_module_is_that_of_its_model():
    module = TinyModule()
    with pytest.raises(ConfigError, match=r"a TinyModule without arrays; pass `run.state`"):
        testing.digest_of(module)
    make_trainer(max_epochs=1).fit(module, tiny_loader())
    assert testing.digest_of(module) == testing.digest_of(module.model)


@jax.jit
def double(x: jax.Array) -> jax.Array:
    return x * 2


def test_no_retrace_passes_what_is_compiled():
    x = double(jnp.ones(3, jnp.float32))
    with testing.assert_no_retrace():
        double(x)


@pytest.mark.parametrize(
    "other",
    [jnp.ones(4, jnp.float32), jnp.ones(3, jnp.int32), 2.0, [1.0]],
    ids=["shape", "dtype", "weak", "structure"],
)
def test_no_retrace_finds_what_changed(other: Any):
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x))
    step(jnp.ones(3, jnp.float32))
    match = r"expected no compilation, got: <lambda>"
    with pytest.raises(AssertionError, match=match), testing.assert_no_retrace():
        step(other)


def test_no_retrace_leaves_errors_and_settings_alone():
    before = jax.config.values["jax_explain_cache_misses"]

    def fail() -> None:
        double(jnp.ones(17, jnp.float32))
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), testing.assert_no_retrace():
        fail()
    assert jax.config.values["jax_explain_cache_misses"] == before


def test_fit_retraces_nothing_and_waits_for_nothing_after_its_first_epoch(tmp_path: Path):
    guard = FromEpoch(1, testing.assert_no_retrace, testing.assert_no_sync)
    callbacks = [guard, EMA(0.9), EarlyStopping("val/loss"), Checkpoint(tmp_path), Throughput()]
    result = make_trainer(*callbacks).fit(TinyModule(), tiny_loader(), tiny_loader(20))
    assert result.num_epochs == 3


class Costly(Callback):
    """Does in every epoch what the argument says."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_train_epoch_end(self, run: Run) -> None:
        self.act(run)


@pytest.mark.parametrize("guard", [testing.assert_no_retrace, testing.assert_no_sync])
def test_guards_find_a_costly_hook(guard: Any):
    acts = {
        testing.assert_no_retrace: lambda run: jnp.sin(np.zeros(100 + run.epoch, np.float32)),
        testing.assert_no_sync: lambda run: float(run.state.totals[0, 0]),
    }
    with pytest.raises(AssertionError, match=r"got: sin|test_testing.py:\d+\. Log the value"):
        make_trainer(FromEpoch(1, guard), Costly(acts[guard])).fit(TinyModule(), tiny_loader())


READS: dict[str, Any] = {
    "numpy": lambda x: np.asarray(x),
    "float": float,
    "bool": bool,
    "item": lambda x: x.item(),
    "print": str,
    "device_get": lambda x: jax.device_get({"x": x}),
    "block": lambda x: x.block_until_ready(),
    "log": lambda x: Run().log("x", x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_no_sync_finds_each_way_to_read(read: Any):
    x = jnp.ones((), jnp.float32)
    with testing.assert_no_sync():
        double(x)
        np.asarray([1.0, 2.0])
        with pytest.raises(
            AssertionError, match=r"of a float32\[\] on the device.*test_testing.py"
        ):
            read(x)
    read(x)


@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_train_batch_end", 3), ("on_save_point", 5), ("on_validation_start", 8), ("setup", 0)],
)
def test_fault_strikes_once_at_its_step(hook: str, step: int):
    at: list[int] = []
    fault = FaultAt(hook, step=step, calls=lambda run: at.append(run.global_step))
    make_trainer(fault).fit(TinyModule(), tiny_loader(), tiny_loader(16))
    assert fault.has_struck
    assert at == [step]


def test_fault_raises():
    fault = FaultAt("on_train_batch_end", step=3, raises=RuntimeError("on purpose"))
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(fault).fit(TinyModule(), tiny_loader())


def test_fault_sends_a_signal():
    fault = FaultAt("on_save_point", step=3, sends=signal.SIGINT)
    result = make_trainer(fault).fit(TinyModule(), tiny_loader())
    assert (result.stop_reason, result.num_steps) == ("interrupted", 3)


def test_fault_kills_the_process():
    program = (
        "import signal; from jaxtrainer import Trainer; from jaxtrainer.testing import *\n"
        "fault = FaultAt('on_train_batch_end', step=3, sends=signal.SIGKILL)\n"
        "trainer = Trainer(max_epochs=1, callbacks=[fault], enable_progress_bar=False)\n"
        "trainer.fit(TinyModule(), tiny_loader()); print('survived')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: FaultAt("on_train_batch", raises=OSError()), "Did you mean 'on_train_batch_"),
        (lambda: FaultAt("on_fit_end"), "FaultAt needs a fault: pass raises="),
        (lambda: FaultyLoader([], at=0), "FaultyLoader needs a fault: pass raises="),
    ],
)
def test_fault_that_is_none_is_refused(make: Any, part: str):
    with pytest.raises(ConfigError, match=part):
        make()


def test_faulty_loader_raises_in_one_pass():
    loader = FaultyLoader([1, 2, 3], at=1, raises=OSError("disk"), in_pass=1)
    assert list(loader) == [1, 2, 3]
    with pytest.raises(OSError, match="disk"):
        list(loader)
    assert (list(loader), len(loader), loader.num_passes) == ([1, 2, 3], 3, 3)


def test_faulty_loader_sleeps(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert list(FaultyLoader([1, 2], at=1, sleep_s=7.0)) == [1, 2]
    assert slept == [7.0]


def test_faulty_loader_poisons_floats_only():
    clean, poisoned = FaultyLoader(tiny.make_batches(2), at=1, change=testing.with_nan)
    assert not np.isnan(clean["x"]).any()
    assert np.isnan(poisoned["x"]).any(axis=1).tolist() == [True] + 7 * [False]
    assert poisoned["label"].dtype == np.int32


def test_manual_clock_moves_when_told():
    clock = testing.ManualClock()
    step = FaultAt("on_train_batch_end", step=3, calls=lambda run: clock.advance(60.0))
    result = make_trainer(step, clock=clock, max_time=30).fit(TinyModule(), tiny_loader())
    assert (result.stop_reason, result.num_steps, result.elapsed_s) == ("max_time", 3, 60.0)
