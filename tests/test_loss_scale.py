"""float16 with a dynamic scale of the loss: what an overflow changes, and what it does not.

Laws hold to the bit: an overflow leaves out its batch, and nothing else of the state changes but
counters and scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrainer import LossScale, Optimizer, Precision, Trainer
from jaxtrainer.callbacks import EMA, Checkpoint, NonFinite
from jaxtrainer.errors import CheckpointMismatchError, ConfigError, NonFiniteError, StepError
from tests import tiny
from tests.bad_input import refused
from tests.test_manual_optimization import GAN
from tests.test_non_finite import Manual, batches_with, failing_fit, trained
from tests.test_resume import StopAt, assert_same_future

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def mixed_dtypes() -> Iterator[None]:
    """BatchNorm mixes its float32 statistics with float16, as in a user's program."""
    with jax.numpy_dtype_promotion("standard"):
        yield


SCALE, SKIPPED = "train/loss_scale", "train/skipped_batches"


def half(**options: Any) -> Precision:
    return Precision("16-mixed", loss_scale=LossScale(**options))


def fit(loader: Any = None, **options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    defaults = {"precision": "16-mixed", "max_epochs": 1, "log_every_n_steps": 1}
    return tiny.fit(loader, **{**defaults, **options})


def test_training_in_float16_learns_and_keeps_float32():
    result, state = fit(max_epochs=3)
    losses = result.history.epoch["train/loss"].values
    assert losses[-1] < 0.9 * losses[0]
    parts = (".params", ".opt_state[", ".model_state")
    kept = {k: x.dtype for k, x in state.items() if k.startswith(parts)}
    assert {d for d in kept.values() if d.kind == "f"} == {np.dtype("float32")}


def test_scale_falls_until_gradients_fit_and_rises_again():
    precision = half(init_scale=2.0**18, growth_interval=3)
    result, _ = fit(module=tiny.Tiny(tiny.line), precision=precision)
    # 2**16 is no float16: three overflows, then a rise, which overflows once more.
    scales = np.log2(result.history.step[SCALE].values).tolist()
    assert scales == [17, 16, 15, 15, 15, 16, 15, 15]
    assert result.history.step[SKIPPED].values == [1, 2, 3, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_overflow_leaves_everything_else_untouched(accumulate: int):
    batches: Any = batches_with((4, 5), num=6, value=np.inf)
    options: Any = {"accumulate_grad_batches": accumulate, "callbacks": [EMA(0.9)]}
    _, state = fit(batches, **options)
    _, want = fit(batches[:4], **options)
    tiny.assert_same_bits(trained(state), trained(want))
    assert (want[".guard['scale']"], state[".guard['scale']"]) == (2**15, 2**13)


def test_batch_that_overflows_is_left_out_of_its_window():
    batches = batches_with((1,), num=2, value=np.inf)
    modules = [tiny.Tiny(tiny.line, optax.sgd(0.1)) for _ in range(2)]
    _, state = fit(batches, module=modules[0], accumulate_grad_batches=2)
    _, want = fit([batches[0]] * 2, module=modules[1], accumulate_grad_batches=2)
    # The mean of a batch and itself is that batch, to the bit: both halves are powers of two.
    tiny.assert_same_bits(trained(state), trained(want))


class Faint(tiny.Tiny):
    """Has gradients that are too small for float16."""

    def training_step(self, model: Any, batch: Any) -> Any:
        return model(batch["x"]).astype(jnp.float32).mean() * 1e-7


def test_scale_keeps_gradients_that_float16_would_lose():
    changes = {}
    for scale in (1.0, 2.0**15):
        module = Faint(tiny.line, optax.sgd(1e6))
        _, after = fit(module=module, precision=half(init_scale=scale), max_steps=1)
        _, later = fit(module=Faint(tiny.line, optax.sgd(1e6)), precision=half(), max_steps=0)
        changes[scale] = np.abs(after[".params['kernel']"] - later[".params['kernel']"]).max()
    assert changes[1.0] == 0 < changes[2.0**15]


def test_clipping_sees_gradients_without_the_scale():
    results = [
        fit(precision=precision, max_steps=1, gradient_clip_val=0.1)[0]
        for precision in ("16-mixed", "32-true")
    ]
    norms = [result.history.step["train/grad_norm"].values[0] for result in results]
    # float16 has 11 bits: about a thousandth for each of the few operations.
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_fused_steps_are_those_one_by_one():
    options: Any = {"precision": half(init_scale=2.0**17, growth_interval=3), "max_epochs": 2}
    _, fused = fit(**options)
    # Control between any two steps: each dispatch is one step of the same program.
    _, single = fit(callbacks=[StopAt(100)], **options)
    tiny.assert_same_bits(fused, single)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_resume_is_the_uninterrupted_run_while_the_scale_grows(accumulate: int, tmp_path: Path):
    options: Any = {
        "precision": half(init_scale=2.0**16, growth_interval=5),
        "accumulate_grad_batches": accumulate,
        "max_epochs": 3,
    }
    saver = Checkpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    whole = fit(callbacks=[saver], **options)
    at = 4
    resumed = fit(ckpt_path=tmp_path / f"step_{at}", **options)
    assert_same_future(resumed, whole, after=at)
    assert len(set(whole[0].history.step[SCALE].values)) > 1


def test_checkpoint_of_another_precision_is_refused(tmp_path: Path):
    fit(callbacks=[Checkpoint(tmp_path)], max_steps=2)
    with pytest.raises(CheckpointMismatchError, match=r"guard: saved with .* '16-mixed'"):
        fit(precision="bf16-mixed", ckpt_path=tmp_path)


def test_batches_that_no_scale_helps_end_the_run():
    precision = half(min_scale=2.0**13)
    error, _ = failing_fit(batches_with(tuple(range(2, 8))), precision=precision)
    assert "batch 4 in epoch 0 (optimiser step 5)" in str(error)


def test_guard_is_there_where_it_is_needed():
    options: Any = {"enable_progress_bar": False}
    assert Trainer(**options).callbacks == []
    assert [type(c) for c in Trainer(precision="16-mixed", **options).callbacks] == [NonFinite]
    own = NonFinite("skip")
    assert Trainer(precision="16-mixed", callbacks=own, **options).callbacks == [own]


@pytest.mark.slow
def test_batch_that_no_scale_helps_is_run_once_more(tmp_path: Path):
    options: Any = {"precision": half(init_scale=1.0), "max_epochs": 1}
    trainer = tiny.make_trainer(default_root_dir=tmp_path, **options)
    with pytest.raises(NonFiniteError, match="batch 3 in epoch 0") as caught:
        trainer.fit(tiny.Tiny(), batches_with((3,)))
    assert any("to run it once more" in note for note in caught.value.__notes__)


def test_own_guard_counts_what_the_scale_does_not():
    guard = NonFinite("skip", max_skips=2, forensics=False)
    options: Any = {"precision": half(min_scale=2.0**14), "callbacks": [guard]}
    result, state = fit(batches_with((1, 3, 5)), **options)
    assert result.metrics[SKIPPED] == 3
    assert state[".guard['non_finite']"] == 2


class ZeroNans(Manual):
    """Whose updates are finite where the gradients are not."""

    def configure_optimizers(self) -> Any:
        return Optimizer(optax.chain(optax.zero_nans(), optax.adam(1e-2)))


@pytest.mark.parametrize("kind", [pytest.param(ZeroNans, marks=pytest.mark.slow), GAN])
def test_updates_of_the_step_itself_are_scaled_and_left_out(kind: Any):
    batches = batches_with((4, 5), num=6, value=np.inf)
    _, state = fit(batches, module=kind())
    _, want = fit(batches[:4], module=kind())
    _, start = fit(batches[:1], module=kind())
    tiny.assert_same_bits(trained(state), trained(want))
    assert any(want[k].tobytes() != start[k].tobytes() for k in want if k.startswith(".params"))


def test_gradients_of_the_users_own_are_refused():
    class Own(Manual):
        def training_step(self, model: Any, batch: Any) -> Any:
            self.apply_gradients(model, model)

    refused(StepError, "self.minimize(loss_fn, model)", module=Own(), precision="16-mixed")


@pytest.mark.parametrize(
    "options",
    [
        {"init_scale": 0.5},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"growth_interval": 0},
        {"min_scale": 0.0},
    ],
    ids=str,
)
def test_rules_that_cannot_work_are_refused(options: Any):
    with pytest.raises(ConfigError, match=rf"LossScale\({next(iter(options))}="):
        LossScale(**options)


def test_scale_without_float16_is_refused():
    with pytest.raises(ConfigError, match="needs no loss scale"):
        Precision("bf16-mixed", loss_scale=LossScale())
