"""Batches of several shapes: `max_recompiles` says how many, and each is one program.

Compared are equal bytes but where a tolerance is named: a program for each shape runs the same
operations wherever dispatches are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, Run, data
from jaxtrainer.callbacks import Checkpoint, LearningRateFinder, NonFinite
from jaxtrainer.checkpoint import find_checkpoint, read_record
from jaxtrainer.dispatch import chunk_capacity
from jaxtrainer.errors import BatchSpecError, ConfigError, LogError, NonFiniteError
from tests import tiny
from tests.bad_input import assert_says, refused
from tests.test_resume import StopAt

pytestmark = pytest.mark.usefixtures("compiled_once")

ROWS, VOCABULARY = 8, 11
LENGTHS = (6, 6, 9, 6, 9, 9, 9, 6)
"""In runs and alone, so that chunks are cut in every way."""


class Reader(nnx.Module):
    """Classifies the mean of embedded tokens; BatchNorm and Dropout make a resume hard."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, tiny.FEATURES, rngs=rngs)
        self.rest = tiny.Net(rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.rest(self.embed(tokens).mean(axis=1))


class Linear(nnx.Module):
    """The same without state or randomness."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, tiny.CLASSES, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed(tokens).mean(axis=1)


class Reads(tiny.Tiny):
    """Trains on sequences; its loss weighs samples alike."""

    def __init__(self, make: Any = Reader, tx: Any = None) -> None:
        super().__init__(make, tx)

    def training_step(self, model: Any, batch: Any) -> Any:
        return super().training_step(model, {**batch, "x": batch["tokens"]})

    def predict_step(self, model: Any, batch: Any) -> Any:
        return model(batch["tokens"])


def sequence(length: int, rows: int = ROWS, seed: int = 0, dtype: Any = np.int32) -> dict[str, Any]:
    rng = np.random.default_rng((seed, length, rows))
    tokens = rng.integers(0, VOCABULARY, (rows, length)).astype(dtype)
    return {"tokens": tokens, "label": (tokens.sum(axis=1) % tiny.CLASSES).astype(np.int32)}


def sequences(lengths: Sequence[int] = LENGTHS, rows: Sequence[int] = ()) -> list[Any]:
    rows = rows or [ROWS] * len(lengths)
    return [sequence(n, r, i) for i, (n, r) in enumerate(zip(lengths, rows, strict=True))]


def fit(loader: Any = None, *args: Any, **options: Any) -> Any:
    defaults = {"module": Reads(), "max_epochs": 2, "max_recompiles": 1, "log_every_n_steps": 1}
    return tiny.fit(sequences() if loader is None else loader, *args, **{**defaults, **options})


def refuses(kind: type[Exception], *parts: str, **options: Any) -> Exception:
    return refused(kind, *parts, **{"module": Reads(), "log_every_n_steps": 1, **options})


def test_other_shape_is_refused_by_default_and_the_option_named():
    option = "or pass `Trainer(max_recompiles=3)`: up to 3 other shapes are then compiled for"
    refuses(BatchSpecError, option, loader=sequences((6, 9)), compiled=["train step"])


def test_smaller_batch_in_the_middle_names_the_option():
    loader = sequences((6, 6, 6), rows=(8, 5, 8))
    parts = ("has 5 rows, expected 8", "Use one batch size, or pass `Trainer(max_recompiles=3)`")
    refuses(BatchSpecError, *parts, loader=loader, compiled=["train step"])


def test_option_is_not_named_where_it_does_not_help():
    wrong = sequence(9, dtype=np.int16)
    options: Any = {"loader": [sequence(6), wrong], "compiled": ["train step"]}
    error = refuses(BatchSpecError, "got int16[8, 9]; cast it", **options)
    assert "max_recompiles" not in str(error)


class Log(Callback):
    """What was compiled, and what the user was told of shapes."""

    order = 2

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.told: list[str] = []

    def on_compile_start(self, run: Run, name: str) -> None:
        self.compiled.append(name)

    def teardown(self, run: Run) -> None:
        self.told = [line for line in run.notices if "max_recompiles" in line]


LONG = "label: int32[8], tokens: int32[8, 9]"


@pytest.mark.parametrize("steps", [1, 4, "auto"])
def test_new_shape_is_compiled_once_and_told_once(steps: Any):
    log = Log()
    result, _ = fit(callbacks=[log], steps_per_dispatch=steps)
    assert log.compiled == ["train step", f"train step for {LONG}"]
    assert log.told == [
        "train batch 2 of epoch 0 has another shape, for which the step is compiled once "
        "(1 of max_recompiles=1): tokens: int32[8, 6] -> int32[8, 9]"
    ]
    assert (result.num_steps, result.num_samples) == (16, 16 * ROWS)


def test_compilation_of_another_shape_is_counted_as_such():
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    class Compiles(Callback):
        def on_compile_end(self, run: Run, name: str, seconds: float) -> None:
            clock.now += 10.0 * ("tokens" in name)

    clock = Clock()
    result, _ = fit(callbacks=[Compiles()], clock=clock)
    assert result.timings["dispatch"] == 0.0


def test_one_shape_too_many_names_leaf_batch_and_shapes():
    refuses(
        BatchSpecError,
        "train batch 3 of epoch 0 has a new shape, and there are 2 already, which is what "
        "`max_recompiles=1` allows:",
        "  leaf tokens: int32[8, 7], in the first batch int32[8, 6]",
        "shapes so far:\n  label: int32[8], tokens: int32[8, 6]\n"
        f"  {LONG} (train batch 1 of epoch 0)",
        "`Trainer(max_recompiles=2)`",
        loader=sequences((6, 9, 6, 7)),
        max_recompiles=1,
        compiled=["train step", f"train step for {LONG}"],
    )


def test_batches_before_one_shape_too_many_are_trained_on_and_saved(tmp_path: Path):
    with pytest.raises(BatchSpecError):
        fit(sequences((6, 9, 6, 6, 7)), callbacks=[Checkpoint(tmp_path, every_n_train_steps=1)])
    loop = read_record(find_checkpoint(tmp_path))["loop"]
    assert loop["batch_idx"] == 4


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (sequence(9, dtype=np.int16), "leaf tokens: expected int32[8, 9], got int16[8, 9]; cast"),
        ({**sequence(9), "more": np.zeros(ROWS)}, "more (float32[8]) is new"),
        ({**sequence(9), "label": np.zeros((ROWS, 1), np.int32)}, "got int32[8, 1]; reshape it"),
    ],
    ids=["dtype", "structure", "axes"],
)
def test_batch_of_another_kind_is_refused_still(bad: Any, part: str):
    where = "train batch 1 of epoch 0"
    loader = [sequence(6), bad]
    refuses(BatchSpecError, where, part, loader=loader, max_recompiles=3, compiled=["train step"])


@pytest.mark.parametrize("value", [-1, True, 1.0, None])
def test_option_that_is_no_count_is_refused(value: Any):
    with pytest.raises(ConfigError, match="max_recompiles must be an integer of at least 0"):
        tiny.make_trainer(max_recompiles=value)


RATE = 0.5


@jax.jit
def by_hand(table: jax.Array, tokens: jax.Array, label: jax.Array) -> Any:
    """Loss and gradient of `Linear`."""

    def loss(table: jax.Array) -> jax.Array:
        logits = table[tokens].mean(axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    return jax.value_and_grad(loss)(table)


class Start(Callback):
    """Keeps the embedding that training starts from."""

    def on_train_start(self, run: Run) -> None:
        self.table = np.array(jax.tree.leaves(run.state.params)[0])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_what_a_loop_by_hand_computes(accumulate: int):
    loader, start = sequences(rows=(8, 8, 4, 8, 4, 4, 8, 8)), Start()
    options: Any = {"max_recompiles": 2, "max_epochs": 1, "accumulate_grad_batches": accumulate}
    module = Reads(Linear, optax.sgd(RATE))
    result, state = fit(loader, module=module, callbacks=[start], **options)
    table, losses, window = start.table, [], []
    for i, batch in enumerate(loader, 1):
        loss, grad = by_hand(table, **batch)
        losses.append(float(loss))
        window.append((len(batch["label"]), grad))
        if i % accumulate == 0 or i == len(loader):
            weights = np.array([n for n, _ in window], np.float32)
            mean = sum(w * np.asarray(g) for w, (_, g) in zip(weights, window, strict=True))
            table, window = table - np.float32(RATE) * mean / weights.sum(), []
    # Two compilers of the same float32 sums: some units in the last place.
    np.testing.assert_allclose(result.history.step["train/loss"].values, losses, rtol=1e-5)
    (trained,) = (x for k, x in state.items() if "params" in k)
    np.testing.assert_allclose(trained, table, atol=1e-6)
    rows = [len(batch["label"]) for batch in loader]
    mean = np.average(losses, weights=rows)
    np.testing.assert_allclose(result.history.epoch["train/loss"].values, mean, rtol=1e-6)
    assert result.num_samples == sum(rows)


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_fused_is_step_by_step(steps: int, accumulate: int):
    options: Any = {"accumulate_grad_batches": accumulate}
    loader = sequences(rows=(8, 8, 8, 8, 8, 8, 8, 5))
    want, state = fit(loader, max_recompiles=2, **options)
    got, other = fit(loader, max_recompiles=2, steps_per_dispatch=steps, **options)
    tiny.assert_same_bits(other, state)
    assert got.history.step["train/loss"] == want.history.step["train/loss"]
    assert got.history.epoch["train/loss"] == want.history.epoch["train/loss"]


class Sequences:
    """Single sequences in one order, with a length for each batch."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Any:
        return sequences()[index]

    def __repr__(self) -> str:
        return "Sequences()"


def grain_sequences() -> Any:
    return grain.MapDataset.source(Sequences()).seed(1).shuffle()


@pytest.mark.parametrize(
    "batches",
    [3, pytest.param(8, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "make",
    [sequences, pytest.param(grain_sequences, marks=pytest.mark.slow)],
    ids=["list", "grain"],
)
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, make: Any, batches: int):
    whole, state = fit(make(), accumulate_grad_batches=2)
    fit(make(), accumulate_grad_batches=2, callbacks=[StopAt(batches), Checkpoint(tmp_path)])
    log, path = Log(), find_checkpoint(tmp_path)
    result, other = fit(make(), accumulate_grad_batches=2, callbacks=[log], ckpt_path=path)
    tiny.assert_same_bits(other, state)
    assert result.num_samples == whole.num_samples
    assert len(log.compiled) == 2


def test_resumed_run_goes_on_counting_its_shapes(tmp_path: Path):
    fit(sequences((6, 9, 6)), callbacks=[Checkpoint(tmp_path)], max_epochs=1)
    saved = read_record(find_checkpoint(tmp_path))["data"]
    assert saved["shapes"] == [[[8], [8, 6]], [[8], [8, 9]]]
    assert saved["batch_size"] == ROWS
    with pytest.raises(BatchSpecError) as caught:
        fit(sequences((7, 9, 6)), ckpt_path=find_checkpoint(tmp_path))
    assert_says(caught.value, "train batch 0 of epoch 1 has a new shape")


def test_last_batch_of_training_is_a_shape_of_its_own():
    result, _ = fit(sequences((6, 6, 6), rows=(8, 8, 3)))
    assert result.num_samples == 2 * 19
    assert result.num_steps == 6
    left_out, _ = fit(sequences((6, 6, 6), rows=(8, 8, 3)), max_recompiles=0)
    assert left_out.num_samples == 2 * 16


def test_rows_of_every_shape_divide_over_the_devices():
    refuses(
        ConfigError,
        "a batch of 6 rows does not divide over 4 devices",
        "while reading train batch 1 of epoch 0",
        loader=sequences((6, 9), rows=(8, 6)),
        mesh={"data": 4},
        max_recompiles=1,
        compiled=["train step"],
    )


def test_shapes_train_on_several_devices():
    loader = sequences(rows=(8, 8, 4, 8, 4, 4, 4, 8))
    one, _ = fit(loader, module=Reads(Linear), max_recompiles=2)
    four, _ = fit(loader, module=Reads(Linear), max_recompiles=2, mesh={"data": 4})
    # Sums over four devices are made in another order.
    want, got = (r.history.step["train/loss"].values for r in (one, four))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_evaluation_is_exact_over_shapes(steps: int):
    module, log = Reads(Linear), Log()
    fit(module=module, max_epochs=1)
    loader = sequences((6, 6, 9, 9, 6, 9), rows=(8, 8, 8, 8, 8, 3))
    trainer = tiny.make_trainer([log], max_recompiles=1, steps_per_dispatch=steps)
    metrics = trainer.validate(module, loader, verbose=False)
    table = np.asarray(jax.tree.leaves(nnx.state(module.model, nnx.Param))[0])
    losses = [float(by_hand(table, **batch)[0]) for batch in loader]
    want = np.average(losses, weights=[8, 8, 8, 8, 8, 3])
    np.testing.assert_allclose(metrics["val/loss"], want, rtol=1e-6)
    # The last batch, which has fewer rows, is not counted.
    names = ["validate step", f"validate step for {LONG}", "validate step for the last 3 rows"]
    assert log.compiled == names
    assert len(log.told) == 1


@pytest.mark.slow
def test_validation_in_training_compiles_each_shape_once():
    log = Log()
    val = sequences((9, 6, 9, 6))
    fit(sequences((6, 6)), val, callbacks=[log], max_epochs=3, num_sanity_val_steps=2)
    of_val = "validate step for label: int32[8], tokens: int32[8, 6]"
    assert log.compiled == ["train step", "validate step", of_val]
    (line,) = log.told
    assert line.startswith("validate batch 1 of epoch 0 has another shape")


def test_one_shape_too_many_in_evaluation_is_refused():
    with pytest.raises(BatchSpecError) as caught:
        fit(val_loader=sequences((6, 9, 7, 6)), max_epochs=1)
    assert_says(caught.value, "validate batch 2 of epoch 0 has a new shape")


def test_predictions_come_in_the_order_of_batches():
    module, loader = Reads(Linear), sequences((6, 9, 9, 6), rows=(8, 8, 5, 5))
    fit(module=module, max_epochs=1)
    got = tiny.make_trainer(max_recompiles=2).predict(module, loader)
    want = [np.asarray(module.model(jnp.asarray(batch["tokens"]))) for batch in loader]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_chunks_of_mixed_shapes_are_small():
    fed = jax.ShapeDtypeStruct((ROWS, 1000), jnp.float32)
    assert chunk_capacity("auto", fed, None, is_mixed=False) == 32
    # A chunk that is seldom full travels whole: 1 MiB at most.
    wide = jax.ShapeDtypeStruct((ROWS, 8192), jnp.float32)
    assert chunk_capacity("auto", wide, None, is_mixed=True) == 4
    assert chunk_capacity(16, wide, None, is_mixed=True) == 16


def test_arrays_in_memory_have_one_shape():
    result, _ = fit(data.from_arrays(sequence(6, rows=20), batch_size=8), max_epochs=1)
    assert result.num_samples == 16


def test_step_that_logs_by_shape_is_refused():
    class Logs(Reads):
        def training_step(self, model: Any, batch: Any) -> Any:
            if batch["tokens"].shape[1] > 6:
                self.log("long", 1.0)
            return super().training_step(model, batch)

    with pytest.raises(LogError, match="logs train/loss, for those of another shape train/long"):
        fit(module=Logs())


class Breaks(Reads):
    """Its loss is no number for long sequences."""

    def training_step(self, model: Any, batch: Any) -> Any:
        out = super().training_step(model, batch)
        is_long = batch["tokens"].shape[1] > 6
        return {**out, "loss": jnp.log(out["loss"] * (-1.0 if is_long else 1.0))}


@pytest.mark.slow
def test_batch_that_is_not_finite_is_run_again_in_its_shape(tmp_path: Path):
    with pytest.raises(NonFiniteError) as caught:
        fit(module=Breaks(), callbacks=[NonFinite(dirpath=tmp_path)])
    assert_says(caught.value, "batch 2 of the epoch, as the loader gave it", "log")


@pytest.mark.slow
def test_skipped_batches_of_another_shape_change_nothing():
    loader, modules = sequences((6, 9, 6, 9, 6)), [Breaks(), Breaks()]
    for module, batches in zip(modules, (loader, loader[::2]), strict=True):
        fit(batches, module=module, callbacks=[NonFinite("skip", max_skips=2)], max_epochs=1)
    tiny.assert_same_bits(*map(tiny.params_of, modules))


@pytest.mark.slow
def test_learning_rate_finder_follows_shapes():
    class Rated(Reads):
        learning_rate = 1e-3

        def configure_optimizers(self) -> Any:
            return optax.adam(self.learning_rate)

    finder = LearningRateFinder(num_training_steps=20)
    trainer = tiny.make_trainer([finder], max_recompiles=1, max_epochs=1)
    trainer.tune(Rated(), sequences())
    assert finder.suggestion is not None


@pytest.mark.slow
def test_run_of_several_shapes_verifies():
    trainer = tiny.make_trainer(max_recompiles=1, max_epochs=5)
    assert trainer.verify_resume(Reads(), sequences(), steps=9, at=[2, 5]).is_equal
