"""Validation, test and prediction: exact over ragged batches, compared with NumPy.

Tolerance: inputs are small integers and halves, so that float32 means and sums of a batch are
exact, and the reductions over batches too; what remains is one rounding of a batch mean.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrainer import Callback, Run, Trainer, TrainModule
from jaxtrainer.errors import ConfigError
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

ROUNDING = 1e-6


class Scale(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.factor = nnx.Param(jnp.array(2.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.factor[...] * x


class Measure(TrainModule):
    """Logs every kind of reduction of `2 * x`."""

    def configure_model(self, rngs: nnx.Rngs) -> Scale:
        return Scale(rngs)

    def validation_step(self, model: Any, batch: Any) -> None:
        y = model(batch["x"])
        self.log("mean", y.mean())
        self.log("weighted", (y * batch["w"]).sum() / batch["w"].sum(), weight=batch["w"].sum())
        self.log("sum", y.sum(), reduce="sum")
        self.log("min", y.min(), reduce="min")
        self.log("max", y.max(), reduce="max")
        self.log("count", y.size, reduce="sum")

    def predict_step(self, model: Any, batch: Any) -> dict[str, Any]:
        return {"y": model(batch["x"]), "index": batch["index"]}


def make_data(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.integers(-20, 20, rows).astype(np.float32) / 2,
        "w": rng.integers(1, 4, rows).astype(np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def cut(arrays: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """A plain list of batches, the last one smaller."""
    rows = len(arrays["x"])
    return [{k: a[i : i + size] for k, a in arrays.items()} for i in range(0, rows, size)]


def expected(arrays: dict[str, np.ndarray], stage: str) -> dict[str, float]:
    y, w = 2.0 * arrays["x"].astype(np.float64), arrays["w"]
    values = {
        "mean": y.mean(),
        "weighted": np.average(y, weights=w),
        "sum": y.sum(),
        "min": y.min(),
        "max": y.max(),
        "count": len(y),
    }
    return {f"{stage}/{name}": float(value) for name, value in values.items()}


@pytest.mark.parametrize("rows", [5, 24, 27, 41], ids=lambda n: f"{n}_rows")
def test_validate_is_exact_over_ragged_batches(rows: int):
    arrays = make_data(rows)
    got = tiny.make_trainer().validate(Measure(), cut(arrays, 8), verbose=False)
    assert got == pytest.approx(expected(arrays, "val"), rel=ROUNDING)


def test_test_uses_the_validation_step_under_its_own_names():
    arrays = make_data(20)
    got = tiny.make_trainer().test(Measure(), cut(arrays, 8), verbose=False)
    assert got == pytest.approx(expected(arrays, "test"), rel=ROUNDING)


def test_validate_of_arrays_in_memory_is_that_of_their_batches():
    arrays = make_data(27)
    loader = tiny.data.from_arrays(arrays, batch_size=8)
    got = tiny.make_trainer().validate(Measure(), loader, verbose=False)
    assert got == pytest.approx(expected(arrays, "val"), rel=ROUNDING)


@pytest.mark.parametrize(("limit", "rows"), [(2, 16), (0.5, 16), (1.0, 27), (99, 27)])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_limit_leaves_the_other_batches_out(stage: str, limit: Any, rows: int):
    arrays = make_data(27)
    trainer = tiny.make_trainer(**{f"limit_{stage}_batches": limit})
    call = trainer.validate if stage == "val" else trainer.test
    got = call(Measure(), cut(arrays, 8), verbose=False)
    first = {name: array[:rows] for name, array in arrays.items()}
    assert got == pytest.approx(expected(first, stage), rel=ROUNDING)


@pytest.mark.parametrize("limit", [0, 0.0])
def test_limit_of_zero_turns_validation_off_in_fit_only(limit: Any):
    batches = tiny.make_batches(2)
    result, _ = tiny.fit(batches, batches, max_steps=1, limit_val_batches=limit)
    assert set(result.metrics) == {"train/loss"}
    trainer = tiny.make_trainer(limit_val_batches=limit)
    with pytest.raises(ConfigError, match="leaves no batch"):
        trainer.validate(tiny.Tiny(), batches)


def test_validation_in_fit_is_that_of_validate():
    module, val_loader = tiny.Tiny(), tiny.make_batches(2, ragged=3)
    result, _ = tiny.fit(val_loader=val_loader, module=module, max_epochs=1)
    alone = tiny.make_trainer().validate(module, val_loader, verbose=False)
    # Fused and single dispatch are other programs: their float32 sums may differ by an ulp or so.
    assert alone == pytest.approx({"val/loss": result.metrics["val/loss"]}, rel=ROUNDING)


def test_validate_leaves_the_model_as_it_was():
    module = tiny.Tiny()
    tiny.fit(module=module, max_epochs=1)
    before = tiny.params_of(module)
    model = module.model
    tiny.make_trainer().validate(module, tiny.make_batches(2), verbose=False)
    assert module.model is model
    tiny.assert_same_bits(tiny.params_of(module), before)


def test_validate_prints_a_table(capsys: pytest.CaptureFixture[str]):
    tiny.make_trainer().validate(Measure(), cut(make_data(8), 8))
    lines = capsys.readouterr().out
    assert "val/mean" in lines
    tiny.make_trainer().validate(Measure(), cut(make_data(8), 8), verbose=False)
    assert capsys.readouterr().out == ""


class Order(Callback):
    """Keeps the first index of each batch and what the step logged for it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_validation_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch_idx, int(batch["index"][0]), float(outputs["max"])))


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_validation_batch_end_sees_each_batch_in_order(steps: int):
    arrays, order = make_data(27), Order()
    trainer = tiny.make_trainer(order, steps_per_dispatch=steps)
    trainer.validate(Measure(), cut(arrays, 8), verbose=False)
    maxima = [float(2 * batch["x"].max()) for batch in cut(arrays, 8)]
    assert order.seen == [(i, 8 * i, m) for i, m in enumerate(maxima)]


@pytest.mark.parametrize("stream", [False, True], ids=["list", "stream"])
def test_predict_keeps_the_order_of_the_loader(stream: bool):
    arrays = make_data(43)
    got = list(tiny.make_trainer().predict(Measure(), cut(arrays, 8), stream=stream))
    assert [len(batch["y"]) for batch in got] == [8, 8, 8, 8, 8, 3]
    assert all(isinstance(batch["y"], np.ndarray) for batch in got)
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in got]), arrays["index"])
    np.testing.assert_array_equal(np.concatenate([b["y"] for b in got]), 2 * arrays["x"])


def test_predict_of_a_limit_stops_there():
    trainer = tiny.make_trainer(limit_predict_batches=2)
    assert len(trainer.predict(Measure(), cut(make_data(43), 8))) == 2


def test_predict_stream_reads_and_keeps_no_more_than_it_must():
    read: list[int] = []

    class Loader:
        def __iter__(self):
            for i, batch in enumerate(cut(make_data(8 * 200), 8)):
                read.append(i)
                yield batch

    stream = tiny.make_trainer(steps_per_dispatch=1).predict(Measure(), Loader(), stream=True)
    first = next(stream)
    kept = weakref.ref(first["y"])
    next(stream)
    del first
    assert kept() is None
    # A chunk of 32 batches at the device, two in the queue, one being filled.
    assert len(read) < 200
    stream.close()


def test_predict_stream_that_is_left_early_frees_the_signals_and_threads():
    import signal

    before = signal.getsignal(signal.SIGINT)
    stream = tiny.make_trainer().predict(Measure(), cut(make_data(80), 8), stream=True)
    next(stream)
    stream.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_predict_hooks_run_once_a_batch_in_order():
    seen: list[Any] = []

    class Watch(Callback):
        def on_predict_batch_start(self, run: Run, batch: Any, batch_idx: int) -> None:
            seen.append(("start", batch_idx))

        def on_predict_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(("end", batch_idx, int(outputs["index"][0]), int(batch["index"][0])))

    tiny.make_trainer(Watch()).predict(Measure(), cut(make_data(27), 8))
    assert [s for s in seen if s[0] == "start"] == [("start", i) for i in range(4)]
    assert [s for s in seen if s[0] == "end"] == [("end", i, 8 * i, 8 * i) for i in range(4)]


def test_evaluation_of_an_untrained_module_says_so():
    notices: list[str] = []

    class Watch(Callback):
        def teardown(self, run: Run) -> None:
            notices.extend(run.notices)

    trainer: Trainer = tiny.make_trainer(Watch())
    trainer.validate(Measure(), cut(make_data(8), 8), verbose=False)
    assert "fresh weights" in notices[0]


class Pictures(Measure):
    """Logs what the model makes of a batch, and keeps what it finds after the evaluation."""

    def validation_step(self, model: Any, batch: Any) -> None:
        self.log("_pictures", model(batch["x"]))

    def on_validation_epoch_end(self, run: Run) -> None:
        self.found = run.arrays["val/_pictures"]


def test_array_under_a_private_name_is_in_run_arrays():
    module = Pictures()
    module.model = Scale(nnx.Rngs(0))
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    metrics = tiny.make_trainer().validate(module, [{"x": x}, {"x": 3 * x}], verbose=False)
    assert metrics == {}
    # The mean of two batches of the same size.
    np.testing.assert_allclose(module.found, 2 * 2 * x, rtol=ROUNDING)
