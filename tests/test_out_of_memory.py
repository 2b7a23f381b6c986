"""Out of memory: the error says what would fit, by the compiler's account of memory.

No test runs out of memory: programs are made to say so, and the memory of a device is given.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Run, shortage
from jaxtrainer import trainer as trainer_module
from tests import tiny
from tests.bad_input import assert_says

MESSAGE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."
ROWS = 64


class Wide(tiny.Tiny):
    """Activations of 4 KiB a sample, so that the batch is what takes memory."""

    def __init__(self) -> None:
        super().__init__(make=self.layers, tx=optax.sgd(0.1))

    @staticmethod
    def layers(rngs: nnx.Rngs) -> Any:
        sizes = (tiny.FEATURES, 1024, tiny.CLASSES)
        return nnx.Sequential(
            nnx.Linear(*sizes[:2], rngs=rngs), jax.nn.relu, nnx.Linear(*sizes[1:], rngs=rngs)
        )


def exhausted(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError(MESSAGE)


def run_out(monkeypatch: pytest.MonkeyPatch, limit: int, **options: Any) -> list[str]:
    """Train with a step that runs out of memory; return the notes of the error."""
    real_fit = trainer_module.fit

    def fit(run: Run, plan: Any) -> None:
        plan.step = exhausted
        real_fit(run, plan)

    monkeypatch.setattr(trainer_module, "fit", fit)
    monkeypatch.setattr(shortage, "total_bytes", lambda devices: limit)
    trainer = tiny.make_trainer(max_epochs=1, steps_per_dispatch=1, **options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        trainer.fit(Wide(), tiny.make_loader(2 * ROWS, ROWS, device_resident=False))
    return caught.value.__notes__


def peak_at(rows: int, **options: Any) -> int:
    """What the plan of a step says that it needs."""
    batch = {k: a[:rows] for k, a in tiny.make_arrays(ROWS).items()}
    return tiny.make_trainer(**options).plan(Wide(), batch).peak_bytes


def advised(notes: list[str], about: str) -> str:
    (note,) = [note for note in notes if note.startswith(about)]
    return note


def test_batch_size_that_is_advised_fits_and_a_larger_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
):
    limit = peak_at(ROWS) * 2 // 3
    notes = run_out(monkeypatch, limit)
    fits = int(re.findall(r"`batch_size=(\d+)`", advised(notes, "batch size"))[0])
    assert peak_at(fits) <= limit
    assert peak_at(fits + ROWS // 8) > limit * (1 - shortage.MARGIN)


@pytest.mark.slow
def test_accumulation_that_is_advised_makes_up_for_the_smaller_batch(
    monkeypatch: pytest.MonkeyPatch,
):
    notes = run_out(monkeypatch, peak_at(ROWS) * 2 // 3, accumulate_grad_batches=2)
    numbers = re.findall(r"=(\d+)` with batches of (\d+)", advised(notes, "accumulation"))
    times, fits = map(int, numbers[0])
    assert times * fits >= 2 * ROWS


@pytest.mark.slow
def test_precision_and_rematerialisation_have_figures(monkeypatch: pytest.MonkeyPatch):
    notes = run_out(monkeypatch, peak_at(ROWS) * 2 // 3)
    half = shortage.format_bytes(peak_at(ROWS, precision="bf16-mixed"))
    assert half in advised(notes, "precision")
    assert re.search(r"up to [\d.]+ KiB less", advised(notes, "rematerialisation"))


@pytest.mark.slow
def test_more_devices_are_advised_where_there_are_some(monkeypatch: pytest.MonkeyPatch):
    notes = run_out(monkeypatch, peak_at(ROWS) * 2 // 3)
    assert "over 8 devices, `mesh={'data': 8}`, each needs" in advised(notes, "sharding")


def test_batch_that_fits_by_the_account_is_said_to_fit(monkeypatch: pytest.MonkeyPatch):
    notes = run_out(monkeypatch, 1 << 40)
    assert any("that fits: other programs" in note for note in notes)
    assert "`batch_size=32`" in advised(notes, "batch size")


def test_state_that_alone_is_too_large_is_told_of(monkeypatch: pytest.MonkeyPatch):
    notes = run_out(monkeypatch, 100)
    assert "not even 1 samples fit" in advised(notes, "batch size")


@pytest.mark.parametrize("failures", [1, 100], ids=["once", "always"])
def test_compilation_that_runs_out_is_advised_on(failures: int, monkeypatch: pytest.MonkeyPatch):
    left, real = [failures], jax.stages.Lowered.compile

    def compile(lowered: Any, *args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            exhausted()
        return real(lowered, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        tiny.make_trainer(max_epochs=1).fit(Wide(), tiny.make_batches(2, ROWS))
    wanted = "by the compiler's account" if failures == 1 else "no room for a step"
    assert_says(caught.value, wanted)


def test_advice_that_fails_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shortage.Shortage, "_advice", lambda self: 1 / 0)
    notes = run_out(monkeypatch, 1 << 40)
    assert "no advice on memory: ZeroDivisionError: division by zero" in notes


def test_other_errors_get_no_advice(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(trainer_module, "fit", fails)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        tiny.fit(tiny.make_batches(2), max_epochs=1)
    assert not [note for note in caught.value.__notes__ if "batch size" in note]


def test_spec_of_fewer_rows_keeps_what_lives_on_the_device():
    x = jax.ShapeDtypeStruct((8, 3), np.float32)
    whole = shortage.FeedSpec(batch={"x": x}, fed=x, rows=8, resident={"x": x})
    session: Any = None
    spec = shortage.Shortage(session, whole, 1, exhausted)._spec_for(2)
    assert (spec.batch["x"].shape, spec.fed.shape, spec.rows) == ((2, 3), (2, 3), 2)
    assert spec.resident is whole.resident
