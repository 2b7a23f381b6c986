"""`NonFinite`: batches that are NaN, or whose gradients are, and what is left of a run with them.

Laws hold to the bit, no tolerance: skipping a batch is training without it. The program is the
same in both runs, and a batch that is left out takes no random key; what differs is the count of
batches and the totals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, FitResult, Run
from jaxtrainer.callbacks import EMA, Checkpoint, NonFinite, OnExceptionCheckpoint
from jaxtrainer.checkpoint import saved_steps
from jaxtrainer.errors import ConfigError, NonFiniteError
from tests import tiny
from tests.bad_input import assert_says, refused
from tests.test_resume import StopAt, assert_same_future

pytestmark = pytest.mark.usefixtures("compiled_once")

SGD: Any = {"make": tiny.line, "tx": optax.sgd(0.1)}
"""A model without randomness or statistics, whose updates are its gradients."""


def batches_with(bad: tuple[int, ...], num: int = 8, value: float = np.nan) -> list[Any]:
    batches = tiny.make_batches(num)
    for i in bad:
        batches[i]["x"] = np.full_like(batches[i]["x"], value)
    return batches


def without(batches: list[Any], *indices: int) -> list[Any]:
    return [batch for i, batch in enumerate(batches) if i not in indices]


class Notices(Callback):
    """Keeps what a run has noticed."""

    text = ""

    def teardown(self, run: Run) -> None:
        self.text = "\n".join(run.notices)


def skipping(**options: Any) -> NonFinite:
    return NonFinite("skip", forensics=False, **options)


def trained(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What training changes: not the counters, nor the totals of the epoch."""
    parts = (".params", ".model_state", ".opt_state", ".rng", ".accumulated", ".averaged")
    return {k: v for k, v in state.items() if k.startswith(parts)}


def failing_fit(loader: Any, *callbacks: Any, **options: Any) -> tuple[NonFiniteError, Any]:
    """Train until it raises; return the error and the module."""
    module = options.pop("module", None) or tiny.Tiny()
    callbacks = callbacks or (NonFinite(forensics=False),)
    trainer = tiny.make_trainer(callbacks, **{"max_epochs": 2, **options})
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(module, loader)
    return caught.value, module


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_raise_names_step_epoch_and_batch(steps: int):
    error, _ = failing_fit(batches_with((2,)), steps_per_dispatch=steps)
    assert_says(error, "batch 2 in epoch 0 (optimiser step 3)", "in NonFinite.on_report")


def test_raise_names_the_samples_of_arrays_in_memory(tmp_path: Path):
    arrays = tiny.make_arrays(64)
    arrays["x"][37] = np.inf
    loader = tiny.data.from_arrays(arrays, batch_size=8, shuffle=True)
    error, _ = failing_fit(loader, NonFinite(dirpath=None))
    found = next(n for n in error.__notes__ if n.startswith("samples "))
    assert 37 in map(int, found.removeprefix("samples ").split(" of ")[0].split(", "))


def test_raise_sees_what_comes_after_the_last_report():
    error, _ = failing_fit(batches_with((6,)), log_every_n_steps=100)
    assert_says(error, "batch 6 in epoch 0", "in NonFinite.on_train_epoch_end")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_raise_leaves_the_weights_of_before_the_batch(accumulate: int):
    options: Any = {"accumulate_grad_batches": accumulate}
    _, module = failing_fit(batches_with((4,)), **options)
    before = tiny.Tiny()
    tiny.fit(
        tiny.make_batches(),
        module=before,
        callbacks=[NonFinite()],
        max_steps=4 // accumulate,
        **options,
    )
    tiny.assert_same_bits(tiny.params_of(module), tiny.params_of(before))


def test_infinite_gradients_of_a_finite_loss_are_seen():
    class Root(tiny.Tiny):
        def training_step(self, model: Any, batch: Any) -> Any:
            # At zero the root is finite, and its slope is not.
            return (model(batch["x"]) ** 2).sum() ** 0.5

    batches = tiny.make_batches()
    batches[3]["x"] = np.zeros_like(batches[3]["x"])
    line = {"make": lambda rngs: nnx.Linear(tiny.FEATURES, 1, use_bias=False, rngs=rngs)}
    error, _ = failing_fit(batches, module=Root(**line))
    assert_says(error, "batch 3 in epoch 0")


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_skipping_a_batch_is_training_without_it(steps: int):
    batches = batches_with((2,))
    options: Any = {"max_epochs": 2, "steps_per_dispatch": steps}
    _, state = tiny.fit(batches, callbacks=[skipping()], **options)
    _, want = tiny.fit(without(batches, 2), callbacks=[skipping()], **options)
    tiny.assert_same_bits(trained(state), trained(want))


def test_skipping_fused_is_skipping_step_by_step():
    runs = [tiny.fit(batches_with((1, 6)), callbacks=[skipping()], max_epochs=1), None]
    # Control between any two steps: each dispatch is one step of the same program.
    runs[1] = tiny.fit(batches_with((1, 6)), callbacks=[skipping(), StopAt(100)], max_epochs=1)
    tiny.assert_same_bits(runs[0][1], runs[1][1])


def test_skipped_batches_are_counted_and_have_no_part_in_the_mean():
    seen = Notices()
    result, _ = tiny.fit(batches_with((2, 5)), callbacks=[skipping(), seen], max_epochs=2)
    assert result.history.epoch["train/skipped_batches"].values == [2.0, 4.0]
    assert np.isfinite(result.history.epoch["train/loss"].values).all()
    assert "NonFinite left out 4 batches" in seen.text


def test_skipping_more_than_allowed_raises():
    error, _ = failing_fit(batches_with((1, 3, 6)), skipping(max_skips=2))
    assert_says(error, "batch 6 in epoch 0", "after 2 that were skipped")


def test_window_is_the_mean_of_the_batches_that_are_not_skipped():
    batches = batches_with((1,), num=4)
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 2}
    _, state = tiny.fit(batches, module=tiny.Tiny(**SGD), callbacks=[skipping()], **options)
    # The mean of a batch and itself is that batch, to the bit: both halves are powers of two.
    twice = [batches[i] for i in (0, 0, 2, 3)]
    _, want = tiny.fit(twice, module=tiny.Tiny(**SGD), callbacks=[skipping()], **options)
    tiny.assert_same_bits(trained(state), trained(want))


def test_window_of_skipped_batches_only_makes_no_update():
    batches = batches_with((2, 3), num=6)
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 2}
    _, state = tiny.fit(batches, callbacks=[skipping()], **options)
    _, want = tiny.fit(without(batches, 2, 3), callbacks=[skipping()], **options)
    tiny.assert_same_bits(trained(state), trained(want))


class Manual(tiny.Tiny):
    automatic_optimization = False

    def training_step(self, model: Any, batch: Any) -> Any:
        return self.minimize(lambda model: optax.l2_loss(model(batch["x"])).mean(), model)[0]


def test_updates_of_the_step_itself_are_skipped_too():
    batches = batches_with((2,))
    runs = [
        tiny.fit(loader, module=Manual(), callbacks=[skipping()], max_epochs=1)
        for loader in (batches, without(batches, 2))
    ]
    tiny.assert_same_bits(trained(runs[0][1]), trained(runs[1][1]))


@pytest.mark.slow
def test_average_goes_on_as_without_the_batch():
    batches = batches_with((2,))
    runs = [
        tiny.fit(loader, callbacks=[skipping(), EMA(0.9)], max_epochs=1)
        for loader in (batches, without(batches, 2))
    ]
    tiny.assert_same_bits(trained(runs[0][1]), trained(runs[1][1]))


def spiking() -> NonFinite:
    return skipping(spike_z=6, warm_up=8)


def test_spike_is_left_out_as_if_it_had_not_been_there():
    batches = tiny.make_batches(16)
    batches[12]["x"] = batches[12]["x"] * 1e3
    runs = [
        tiny.fit(loader, module=tiny.Tiny(**SGD), callbacks=[spiking()], max_epochs=1)
        for loader in (batches, without(batches, 12))
    ]
    tiny.assert_same_bits(trained(runs[0][1]), trained(runs[1][1]))
    assert runs[0][0].metrics["train/skipped_batches"] == 1


def test_resume_is_the_uninterrupted_run_with_counts_and_moments(tmp_path: Path):
    batches = batches_with((1, 6), num=16)
    saver = Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole = tiny.fit(batches, callbacks=[spiking(), saver], max_epochs=2)
    path = tmp_path / "step_12"
    resumed = tiny.fit(batches, callbacks=[spiking()], ckpt_path=path, max_epochs=2)
    assert_same_future(resumed, whole, after=12)


def restore(
    tmp_path: Path, batches: list[Any], *more: Any, **options: Any
) -> tuple[FitResult, Any]:
    saver = Checkpoint(tmp_path, every_n_train_steps=3)
    callbacks = [NonFinite("restore", dirpath=None, **options), saver, *more]
    return tiny.fit(batches, callbacks=callbacks, max_epochs=2, log_every_n_steps=1)


@pytest.mark.slow
def test_restoring_is_training_without_the_batch(tmp_path: Path):
    batches = batches_with((5,))
    seen = Notices()
    result, state = restore(tmp_path, batches, seen, max_skips=2)
    _, want = tiny.fit(without(batches, 5), callbacks=[NonFinite()], max_epochs=2)
    tiny.assert_same_bits(trained(state), trained(want))
    assert result.stop_reason == "max_epochs"
    assert result.num_steps == 16
    assert result.history.step["train/loss"].steps == list(range(1, 17))
    assert "batch 5 in epoch 0" in seen.text


def test_restoring_more_often_than_allowed_raises(tmp_path: Path):
    with pytest.raises(NonFiniteError, match="batch 5 in epoch 1") as caught:
        restore(tmp_path, batches_with((5,)), max_skips=1)
    assert_says(caught.value, "not restored: that was done 1 times")


def test_restoring_before_the_first_checkpoint_raises(tmp_path: Path):
    with pytest.raises(NonFiniteError, match="batch 0 in epoch 0") as caught:
        restore(tmp_path, batches_with((0,)))
    assert_says(caught.value, "there is no checkpoint yet")


def test_restoring_without_a_checkpoint_callback_is_refused():
    refused(ConfigError, "add `Checkpoint(", callbacks=[NonFinite("restore")])


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "stop"},
        {"max_skips": 3},
        {"policy": "skip", "max_skips": 0},
        {"policy": "skip", "spike_z": -1},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options: Any):
    with pytest.raises(ConfigError):
        NonFinite(**options)


def test_two_guards_are_refused():
    with pytest.raises(ConfigError, match="NonFinite and NonFinite"):
        tiny.fit(callbacks=[NonFinite(), NonFinite("skip")], max_epochs=1)


@pytest.mark.parametrize("on_host", [True, False])
def test_state_that_is_not_finite_is_never_saved(
    on_host: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not on_host:
        monkeypatch.setattr("jaxtrainer.guard._ON_HOST_BYTES", 0)
    saver = Checkpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    seen = Notices()
    result, _ = tiny.fit(batches_with((5,)), callbacks=[saver, seen], max_epochs=2)
    assert saved_steps(tmp_path) == [2, 4]
    assert result.last_checkpoint == str(tmp_path / "step_4")
    assert seen.text.count("Checkpoint: nothing is saved") == 1
    assert "from step 6 on: params/first/bias" in seen.text
    assert "good one is that of step 4" in seen.text


def test_state_that_is_not_finite_is_saved_if_asked_for(tmp_path: Path):
    saver = Checkpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, allow_non_finite=True)
    tiny.fit(batches_with((5,)), callbacks=[saver], max_epochs=1)
    assert saved_steps(tmp_path) == [4, 8]


def test_frozen_state_is_not_saved_though_it_is_finite(tmp_path: Path):
    saver = Checkpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    guard = NonFinite(forensics=False)
    failing_fit(batches_with((3,)), guard, saver, log_every_n_steps=100)
    assert saved_steps(tmp_path) == [2]


def test_crash_checkpoint_of_a_frozen_state_is_not_written(tmp_path: Path):
    crash = OnExceptionCheckpoint(tmp_path / "crash")
    error, _ = failing_fit(batches_with((3,)), NonFinite(forensics=False), crash)
    assert_says(error, "no checkpoint: batch 3 of the run is not finite")
    assert crash.path is None


@pytest.mark.parametrize(("mode", "value"), [("max", np.inf), ("min", -np.inf), ("max", np.nan)])
def test_score_that_is_not_finite_is_never_best(mode: Any, value: float, tmp_path: Path):
    saver = Checkpoint(tmp_path, monitor="val/x", mode=mode)
    saver.scores = {1: value, 2: 0.5}
    assert saver.best_step == 2
