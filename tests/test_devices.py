"""By law: eight devices are one device.

Tolerance: each device adds up its rows, and the sums of the devices are added up then: float32
rounding in another order, grown over 16 Adam steps. Evaluation starts from equal parameters, so
that there only the rounding of one mean is left.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Accuracy, Checkpoint
from jaxtrainer.errors import ConfigError
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

EIGHT, ONE = {"data": 8}, {"data": 1}
ROUNDING = 1e-6


def train(mesh: dict[str, int], loader: Any = None, **options: Any) -> Any:
    loader = loader or tiny.make_loader(256, 32)
    module = tiny.Tiny(tiny.line)
    return tiny.fit(loader, module=module, mesh=mesh, **{"max_epochs": 2, **options})


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    # The totals hold what their sums lost to rounding, which is rounding and nothing else.
    for name in want.keys() - {".totals"}:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_eight_devices_train_as_one(steps: int):
    (many, state), (one, expected) = (train(m, steps_per_dispatch=steps) for m in (EIGHT, ONE))
    assert_close(state, expected)
    losses, same = many.history["train/loss"].values, one.history["train/loss"].values
    np.testing.assert_allclose(losses, same, rtol=1e-5)


def test_eight_devices_train_as_one_with_state_and_accumulation():
    # BatchNorm's statistics are those of the whole batch, and so is each Dropout mask. A bias
    # before BatchNorm has no gradient but rounding, which Adam would blow up to full steps.
    states = []
    for mesh in (EIGHT, ONE):
        module, batches = tiny.Tiny(tx=optax.sgd(0.1)), tiny.make_batches(8, 16)
        options: Any = {"max_epochs": 1, "accumulate_grad_batches": 3}
        states.append(tiny.fit(batches, module=module, mesh=mesh, **options)[1])
    assert_close(*states)


def test_batches_are_divided_and_parameters_are_whole():
    class Look(Callback):
        def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            rows.append({s.data.shape for s in batch["x"].addressable_shards})
            whole.append(run.state.params["kernel"].sharding.is_fully_replicated)

    rows: list[Any] = []
    whole: list[bool] = []
    train(EIGHT, tiny.make_batches(4, 32), callbacks=[Look()], max_epochs=1)
    assert rows == [{(4, tiny.FEATURES)}] * 4
    assert whole == [True] * 4


@pytest.mark.parametrize("ragged", [1, 5, 8, 21])
@pytest.mark.parametrize("kind", ["list", "arrays"])
def test_evaluation_of_a_ragged_batch_is_exact_on_eight_devices(ragged: int, kind: str):
    module = tiny.Tiny(tiny.line)
    tiny.fit(tiny.make_batches(2), module=module, max_epochs=1)
    batches = tiny.make_batches(3, 32, ragged=ragged)
    arrays = tiny.make_loader(96 + ragged, 32, shuffle=False)
    trainer = tiny.make_trainer(Accuracy(), mesh=EIGHT)
    got = trainer.validate(module, batches if kind == "list" else arrays, verbose=False)
    x, label = (np.concatenate([b[k] for b in batches]) for k in ("x", "label"))
    params = tiny.params_of(module)
    logits = (x @ params["kernel"] + params["bias"]).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -log_probs[np.arange(len(x)), label].mean()
    accuracy = (logits.argmax(1) == label).mean()
    assert got == pytest.approx({"val/loss": loss, "val/accuracy": accuracy}, rel=ROUNDING)


def test_prediction_on_eight_devices_keeps_the_order():
    module, batches = tiny.Tiny(tiny.line), tiny.make_batches(2, 16, ragged=3)
    tiny.fit(tiny.make_batches(2), module=module, max_steps=1)
    many, one = (tiny.make_trainer(mesh=m).predict(module, batches) for m in (EIGHT, ONE))
    assert [len(part) for part in many] == [16, 16, 3]
    np.testing.assert_allclose(np.concatenate(many), np.concatenate(one), rtol=1e-5, atol=1e-6)


def test_trained_model_of_eight_devices_works_on_its_own():
    module = tiny.Tiny()
    tiny.fit(tiny.make_loader(64, 16), module=module, mesh=EIGHT, max_epochs=1)
    out = module.model(jax.numpy.ones((3, tiny.FEATURES)))
    assert out.shape == (3, tiny.CLASSES)


def test_checkpoint_of_eight_devices_goes_on_with_the_same_bits(tmp_path: Any):
    whole = train(EIGHT, callbacks=[Checkpoint(tmp_path, save_top_k=-1)])
    again = train(EIGHT, ckpt_path=tmp_path / "step_8")
    tiny.assert_same_bits(again[1], whole[1])


def test_checkpoint_of_eight_devices_is_read_by_one(tmp_path: Any):
    whole = train(EIGHT, callbacks=[Checkpoint(tmp_path, save_top_k=-1)])
    one = train(ONE, ckpt_path=tmp_path / "step_8")
    assert_close(one[1], whole[1])


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="batch of 12 rows does not divide over 8 devices"):
        train(EIGHT, tiny.make_batches(2, 12))
