"""Averaged weights: what they are, who uses them, and what a checkpoint does with them.

Tolerance of the recursions: the device adds up in float32 what NumPy does in float64, each of at
most 16 samples rounding once more (6e-8 each), with weights of order one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, Optimizer, Run
from jaxtrainer.averaging import evaluated
from jaxtrainer.callbacks import EMA, Checkpoint, StochasticWeightAveraging
from jaxtrainer.errors import CheckpointMismatchError, ConfigError, OptionError
from jaxtrainer.state import flat_items
from tests import tiny
from tests.bad_input import module_with, refused
from tests.test_manual_optimization import GAN

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCH = 8
ROUNDING: Any = {"rtol": 2e-6, "atol": 2e-7}
DECAY = 0.75


class Snapshots(Callback):
    """Host copies of the kernel and its average: at the start, and after each batch."""

    def __init__(self) -> None:
        self.kernels: list[np.ndarray] = []
        self.averages: list[np.ndarray] = []
        self.ends: list[int] = []

    def on_fit_start(self, run: Run) -> None:
        self._take(run)

    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._take(run)

    def on_train_epoch_end(self, run: Run) -> None:
        self.ends.append(run.total_batches)

    def _take(self, run: Run) -> None:
        self.kernels.append(np.array(run.state.params["kernel"]))
        if run.state.averaged:
            self.averages.append(np.array(run.state.averaged["params"]["kernel"]))


def watch(*callbacks: Callback, **options: Any) -> Snapshots:
    """Train two epochs of a linear model, one step a dispatch."""
    seen = Snapshots()
    settings = {"max_epochs": 2, "steps_per_dispatch": 1, **options}
    tiny.fit(module=tiny.Tiny(tiny.line), callbacks=[seen, *callbacks], **settings)
    return seen


def moving_average(samples: list[np.ndarray], weights: list[float]) -> np.ndarray:
    average = np.array(samples[0], np.float64)
    for sample, weight in zip(samples[1:], weights, strict=False):
        average += weight * (sample - average)
    return average


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, range(2 * EPOCH + 1)),
        ({"every_n_steps": 3}, range(0, 2 * EPOCH + 1, 3)),
        ({"start_step": 5}, range(5, 2 * EPOCH + 1)),
        ({"start_step": 5, "every_n_steps": 4}, [5, 9, 13]),
    ],
    ids=["each", "third", "late", "late_fourth"],
)
def test_ema_is_the_recursion_over_its_samples(options: Any, steps: Any):
    seen = watch(EMA(DECAY, **options))
    samples = [seen.kernels[step] for step in steps]
    expected = moving_average(samples, [1 - DECAY] * len(samples))
    np.testing.assert_allclose(seen.averages[-1], expected, **ROUNDING)


def test_ema_warms_up():
    seen = watch(EMA(0.6, warmup=True))
    # (1 + n) / (10 + n) passes 0.6 at n = 12.5.
    weights = [1 - min(0.6, (1 + n) / (10 + n)) for n in range(1, 2 * EPOCH + 1)]
    np.testing.assert_allclose(seen.averages[-1], moving_average(seen.kernels, weights), **ROUNDING)


def test_ema_without_memory_is_the_last_sample():
    seen = watch(EMA(0.0))
    # With weight one the recursion is average + (sample - average), which rounds twice.
    np.testing.assert_allclose(seen.averages[-1], seen.kernels[-1], **ROUNDING)


def test_ema_counts_updates_under_accumulation():
    seen = watch(EMA(DECAY, start_step=1), accumulate_grad_batches=3)
    updated = [3, 6, 8, 11, 14, 16]
    samples = [seen.kernels[batch] for batch in updated]
    expected = moving_average(samples, [1 - DECAY] * len(samples))
    np.testing.assert_allclose(seen.averages[-1], expected, **ROUNDING)


@pytest.mark.parametrize(
    ("start", "epochs", "first"),
    [(1, 3, 1), (0.7, 4, 2), (0.99, 1, 0), (0, 2, 0)],
)
def test_swa_is_the_mean_of_the_epoch_ends(start: Any, epochs: int, first: int):
    seen = watch(StochasticWeightAveraging(start), max_epochs=epochs)
    expected = np.mean([seen.kernels[end] for end in seen.ends[first:]], axis=0, dtype=np.float64)
    np.testing.assert_allclose(seen.averages[-1], expected, **ROUNDING)


def test_swa_is_the_mean_of_every_nth_step():
    seen = watch(StochasticWeightAveraging(1, every_n_steps=3))
    expected = np.mean([seen.kernels[i] for i in (9, 12, 15)], axis=0, dtype=np.float64)
    np.testing.assert_allclose(seen.averages[-1], expected, **ROUNDING)


@pytest.mark.parametrize(
    "average",
    [
        lambda: EMA(start_step=2 * EPOCH + 1),
        lambda: EMA(start_step=2 * EPOCH + 1, every_n_steps=2),
        lambda: StochasticWeightAveraging(2),
    ],
    ids=["ema", "sparse_ema", "swa"],
)
@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_average_is_the_trained_weights_until_it_starts(average: Any, steps: int):
    # Three epochs would be needed for the first sample; the run ends before.
    state = tiny.fit(
        callbacks=[average()], max_epochs=3, max_steps=2 * EPOCH, steps_per_dispatch=steps
    )[1]
    tiny.assert_same_bits(arrays_of(state, ".averaged['params']"), arrays_of(state, ".params"))
    statistics, latest = (
        arrays_of(state, ".averaged['model_state']"),
        arrays_of(state, ".model_state"),
    )
    tiny.assert_same_bits(statistics, {name: latest[name] for name in statistics})
    assert state[".averaged['count']"] == 0


def test_average_leaves_training_alone():
    plain = watch()
    averaged = watch(EMA(DECAY))
    # Another program, which XLA may order otherwise: float32 rounding, grown over Adam's steps.
    np.testing.assert_allclose(averaged.kernels, plain.kernels, rtol=1e-4, atol=1e-6)


def test_state_without_averaging_has_no_further_arrays():
    _, state = tiny.fit(max_steps=1)
    assert not [name for name in state if name.startswith(".averaged")]


def evaluating(*callbacks: Callback, **options: Any) -> tuple[Any, Any, list[float]]:
    """Train and validate; return module, state and the validation losses."""
    module = tiny.Tiny()
    result, state = tiny.fit(
        val_loader=tiny.make_batches(2),
        module=module,
        callbacks=callbacks,
        **{"max_epochs": 2, **options},
    )
    return module, state, result.history.epoch["val/loss"].values


def model_arrays(module: Any) -> dict[str, np.ndarray]:
    state = nnx.state(module.model, (nnx.Param, nnx.BatchStat))
    return {name: np.array(leaf) for name, leaf in flat_items(nnx.to_pure_dict(state))}


def arrays_of(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, by the names that the model has for them."""
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {k.strip("[']").replace("']['", "/"): v for k, v in found.items()}


def test_model_after_fit_is_the_average():
    module, state, _ = evaluating(EMA(DECAY))
    average = arrays_of(state, ".averaged['params']")
    statistics = arrays_of(state, ".averaged['model_state']")
    tiny.assert_same_bits(model_arrays(module), average | statistics)
    assert sorted(statistics) == ["norm/mean", "norm/var"]
    trained = arrays_of(state, ".params")
    assert not [name for name in average if np.array_equal(average[name], trained[name])]


def test_evaluation_in_fit_uses_the_average():
    module, _, losses = evaluating(EMA(DECAY))
    _, _, raw = evaluating()
    trainer = tiny.make_trainer()
    after = trainer.validate(module, tiny.make_batches(2), verbose=False)["val/loss"]
    # The same batches through a program of one batch a dispatch: the rounding of a mean.
    assert losses[-1] == pytest.approx(after, rel=1e-6)
    assert abs(losses[-1] - raw[-1]) > 1e-3


@pytest.mark.parametrize("average", [EMA(start_step=99), StochasticWeightAveraging(2)])
def test_evaluation_before_the_start_uses_the_trained_weights(average: Callback):
    options: Any = {"max_epochs": 3, "max_steps": 2 * EPOCH, "num_sanity_val_steps": 2}
    _, _, losses = evaluating(average, **options)
    _, _, raw = evaluating(**options)
    # The programs of the steps differ by the copy: rounding, grown over Adam's steps.
    np.testing.assert_allclose(losses, raw, rtol=1e-4)


def test_evaluation_copies_no_array():
    seen: list[bool] = []

    class Look(Callback):
        def on_validation_start(self, run: Run) -> None:
            params, model_state = evaluated(run.state)
            averaged = run.state.averaged
            assert model_state["norm"]["mean"] is averaged["model_state"]["norm"]["mean"]
            assert model_state["dropout"] == run.state.model_state["dropout"]
            seen.append(params is averaged["params"])

    evaluating(EMA(DECAY), Look(), num_sanity_val_steps=1)
    assert seen == [True, True, True]


def test_average_of_buffers_can_be_left_out():
    module, state, _ = evaluating(EMA(DECAY, use_buffers=False))
    arrays, latest = model_arrays(module), arrays_of(state, ".model_state")
    names = "norm/mean", "norm/var"
    tiny.assert_same_bits({k: arrays[k] for k in names}, {k: latest[k] for k in names})


def test_model_after_an_exception_is_the_average():
    class Fails(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            if run.total_batches == 5:
                self.average = np.array(run.state.averaged["params"]["kernel"])
                raise RuntimeError("stop")

    module, fails = tiny.Tiny(tiny.line), Fails()
    trainer = tiny.make_trainer([EMA(DECAY), fails], max_epochs=1, steps_per_dispatch=1)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, tiny.make_loader())
    np.testing.assert_array_equal(tiny.params_of(module)["kernel"], fails.average)


def test_second_fit_starts_from_the_average():
    module = tiny.Tiny(tiny.line)
    tiny.fit(module=module, callbacks=[EMA(DECAY)], max_epochs=1)
    average = tiny.params_of(module)["kernel"]
    seen = Snapshots()
    tiny.fit(module=module, callbacks=[EMA(DECAY), seen], max_epochs=1)
    np.testing.assert_array_equal(seen.kernels[0], average)
    np.testing.assert_array_equal(seen.averages[0], average)


def test_average_of_bfloat16_weights_is_kept_in_float32():
    module = tiny.Tiny(tiny.line, optax.sgd(0.1))
    _, state = tiny.fit(
        val_loader=tiny.make_batches(1),
        module=module,
        callbacks=[EMA(0.99)],
        precision="bf16-true",
        max_epochs=1,
    )
    average = state[".averaged['params']['kernel']"]
    kernel = tiny.params_of(module)["kernel"]
    assert (average.dtype, kernel.dtype) == (np.float32, jax.numpy.bfloat16)
    np.testing.assert_array_equal(kernel, average.astype(jax.numpy.bfloat16))
    # A step of 1 % of the change, which bfloat16 would round away, has moved it.
    assert not np.array_equal(average, average.astype(jax.numpy.bfloat16).astype(np.float32))


def test_average_of_a_frozen_parameter_is_the_parameter():
    module = tiny.Tiny(tx=Optimizer(optax.adam(0.1), wrt=["last", "norm"]))
    _, state = tiny.fit(module=module, callbacks=[EMA(DECAY)], max_epochs=1)
    trained, average = arrays_of(state, ".params"), arrays_of(state, ".averaged['params']")
    same = [name for name in trained if np.array_equal(trained[name], average[name])]
    assert same == ["first/bias", "first/kernel"]


def test_updates_of_the_step_itself_are_averaged():
    class Critics(Callback):
        def __init__(self) -> None:
            self.kernels: list[np.ndarray] = []

        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.kernels.append(np.array(run.state.params["critic"]["kernel"]))

    seen, module = Critics(), GAN()
    options: Any = {"max_epochs": 1, "steps_per_dispatch": 1}
    _, state = tiny.fit(module=module, callbacks=[seen, EMA(DECAY, start_step=1)], **options)
    expected = moving_average(seen.kernels, [1 - DECAY] * EPOCH)
    average = state[".averaged['params']['critic']['kernel']"]
    np.testing.assert_allclose(average, expected, **ROUNDING)


def test_plan_counts_the_average():
    batch = tiny.make_batches(1)[0]
    plain = tiny.make_trainer().plan(tiny.Tiny(), batch)
    averaged = tiny.make_trainer([EMA()]).plan(tiny.Tiny(), batch)
    # The parameters, two vectors of BatchNorm's statistics, two counters.
    assert averaged.state_bytes - plain.state_bytes == plain.param_bytes + 2 * 8 * 4 + 2 * 4


class Every(Callback):
    def __init__(self, period: int) -> None:
        self.every_n_train_steps = period


AVERAGES = {
    "ema": lambda: EMA(DECAY),
    "sparse_ema": lambda: EMA(DECAY, start_step=3, every_n_steps=4, warmup=True),
    "swa": lambda: StochasticWeightAveraging(1),
    "swa_steps": lambda: StochasticWeightAveraging(0, every_n_steps=5),
}


@functools.cache
def whole_run(name: str) -> dict[str, np.ndarray]:
    """The state after three epochs, of dispatches as long as can be."""
    return tiny.fit(callbacks=[AVERAGES[name]()], max_epochs=3)[1]


@pytest.mark.parametrize("name", AVERAGES)
def test_average_does_not_depend_on_where_dispatches_are_cut(name: str):
    _, cut = tiny.fit(callbacks=[AVERAGES[name](), Every(3)], max_epochs=3)
    tiny.assert_same_bits(cut, whole_run(name))


@pytest.mark.parametrize("name", AVERAGES)
def test_average_fused_agrees_with_one_step_a_dispatch(name: str):
    _, single = tiny.fit(callbacks=[AVERAGES[name]()], max_epochs=3, steps_per_dispatch=1)
    # Another program, which XLA may order otherwise: float32 rounding, grown over 24 Adam steps.
    for key, array in whole_run(name).items():
        np.testing.assert_allclose(single[key], array, rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("steps", [6, EPOCH, 13], ids=["early", "epoch_end", "late"])
@pytest.mark.parametrize("name", AVERAGES)
def test_resume_goes_on_with_trained_and_averaged_weights(name: str, steps: int, tmp_path: Path):
    saver = Checkpoint(tmp_path)
    tiny.fit(callbacks=[AVERAGES[name](), saver], max_epochs=3, max_steps=steps)
    _, resumed = tiny.fit(callbacks=[AVERAGES[name]()], ckpt_path=tmp_path, max_epochs=3)
    tiny.assert_same_bits(resumed, whole_run(name))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_checkpoint_is_evaluated_with_its_average(use_buffers: bool, tmp_path: Path):
    module, _, _ = evaluating(EMA(DECAY, use_buffers=use_buffers), Checkpoint(tmp_path))
    trainer, loader = tiny.make_trainer(), tiny.make_batches(2)
    # A trainer that knows nothing of averages.
    restored = trainer.predict(tiny.Tiny(), loader, ckpt_path=tmp_path)
    np.testing.assert_array_equal(restored, trainer.predict(module, loader))
    scores = trainer.validate(tiny.Tiny(), loader, ckpt_path=tmp_path, verbose=False)
    assert scores == trainer.validate(module, loader, verbose=False)


@pytest.mark.parametrize(
    ("first", "second", "part"),
    [
        ([EMA()], [], "averaged: saved with averaged weights"),
        ([], [EMA()], "averaged: saved without averaged weights"),
    ],
    ids=["without", "with"],
)
def test_resume_needs_the_same_averaging(first: Any, second: Any, part: str, tmp_path: Path):
    module, loader = module_with(), tiny.make_batches(3)
    tiny.fit(loader, module=module, callbacks=[*first, Checkpoint(tmp_path)], max_epochs=1)
    advice = "pass the same EMA or StochasticWeightAveraging, or none"
    refused(CheckpointMismatchError, part, advice, callbacks=second, ckpt_path=tmp_path)


def test_eight_devices_average_as_one():
    def trained(size: int) -> Any:
        module, batches = tiny.Tiny(tx=optax.sgd(0.1)), tiny.make_batches(8, 16)
        options: Any = {"max_epochs": 1, "mesh": {"data": size}}
        return tiny.fit(batches, module=module, callbacks=[EMA(DECAY)], **options)[1]

    many, one = trained(8), trained(1)
    # Sums over devices are added up in another order: float32 rounding.
    for name in one.keys() - {".totals"}:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_average_is_placed_like_the_weights():
    class Look(Callback):
        def on_train_end(self, run: Run) -> None:
            average, weights = run.state.averaged["params"], run.state.params
            pairs = zip(jax.tree.leaves(average), jax.tree.leaves(weights), strict=True)
            self.same = [a.sharding == w.sharding for a, w in pairs]

    look = Look()
    batches = tiny.make_batches(2, 16)
    tiny.fit(batches, callbacks=[EMA(), look], max_epochs=1, mesh={"data": 8})
    assert look.same == [True] * 6


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: EMA(1.0), "decay must be a number from 0 to below 1, got 1.0"),
        (lambda: EMA("0.9"), "decay must be a number"),  # pyright: ignore[reportArgumentType]
        (lambda: EMA(every_n_steps=0), "every_n_steps must be an integer of at least 1, got 0"),
        (lambda: EMA(start_step=-1), "start_step must be an integer of at least 0, got -1"),
        (lambda: StochasticWeightAveraging(-1), "start_epoch must be an integer"),
        (lambda: StochasticWeightAveraging(1.0), "pass an integer: `start_epoch=1`"),
        (lambda: StochasticWeightAveraging(every_n_steps=0), "every_n_steps must be an integer"),
    ],
)
def test_averaging_refuses_a_value(make: Any, part: str):
    with pytest.raises(ConfigError, match=part.replace("(", r"\(")):
        make()


def test_averaging_knows_what_lightning_calls_its_options():
    with pytest.raises(OptionError, match="Pass `start_epoch=`"):
        StochasticWeightAveraging(swa_epoch_start=0.8)  # pyright: ignore[reportCallIssue]
    with pytest.raises(OptionError, match="lives where the weights live"):
        EMA(device="cpu")  # pyright: ignore[reportCallIssue]


def test_two_averages_are_refused():
    parts = ("EMA and StochasticWeightAveraging both average the weights", "keep one")
    refused(ConfigError, *parts, callbacks=[EMA(), StochasticWeightAveraging()])


def test_swa_that_never_starts_is_refused():
    parts = ("start_epoch=2) never starts", "max_epochs=2 has the index 1")
    refused(ConfigError, *parts, callbacks=[StochasticWeightAveraging(2)])


def test_swa_from_a_fraction_needs_max_epochs():
    parts = ("start_epoch=0.5) is a fraction of max_epochs", "pass an integer")
    average = StochasticWeightAveraging(0.5)
    refused(ConfigError, *parts, callbacks=[average], max_epochs=None, max_steps=3)
