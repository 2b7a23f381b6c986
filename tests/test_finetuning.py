"""`BackboneFinetuning`: frozen to the bit, then trained, in one program that can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, Optimizer, Run
from jaxtrainer.callbacks import BackboneFinetuning, Checkpoint, LearningRateMonitor
from jaxtrainer.errors import ConfigError, OptionError
from tests import tiny
from tests.bad_input import Compilations, module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCH = 4
"""Batches an epoch in every run here."""


class Pretrained(nnx.Module):
    """A backbone and a head; the bias is -0.0, of which an added zero would make 0.0."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        minus = nnx.initializers.constant(-0.0)
        self.backbone = nnx.Linear(tiny.FEATURES, 5, bias_init=minus, rngs=rngs)
        self.head = nnx.Linear(5, tiny.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.backbone(x)))


class Snapshots(Callback):
    """Host copies of the state at the end of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, np.ndarray]] = []

    def on_train_epoch_end(self, run: Run) -> None:
        self.states.append(tiny.host_state(run.state))


def trained(*callbacks: Callback, tx: Any = None, **options: Any) -> list[dict[str, np.ndarray]]:
    """The state at the end of each of three epochs, and at the end."""
    snapshots = Snapshots()
    options = {"module": tiny.Tiny(Pretrained, tx or optax.adam(1e-2)), "max_epochs": 3, **options}
    _, last = tiny.fit(tiny.make_batches(EPOCH), callbacks=[*callbacks, snapshots], **options)
    return [*snapshots.states, last]


def part(state: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    """What of a state has all of these in its name."""
    return {k: v for k, v in state.items() if all(name in k for name in names)}


def test_frozen_part_does_not_change_a_bit_and_trains_afterwards():
    first, second, third, _ = trained(BackboneFinetuning(unfreeze_at_epoch=2))
    start = trained(tx=optax.set_to_zero(), max_epochs=1)[0]
    frozen = part(start, ".params", "backbone")
    assert len(frozen) == 2
    tiny.assert_same_bits(part(second, ".params", "backbone"), frozen)
    assert all(np.any(v != frozen[k]) for k, v in part(third, ".params", "backbone").items())
    assert all(np.any(v != start[k]) for k, v in part(first, ".params", "head").items())


def test_optimiser_state_of_the_frozen_part_waits():
    _, second, third, _ = trained(BackboneFinetuning(unfreeze_at_epoch=2))
    mine = part(second, ".opt_state['default.backbone']")
    assert mine
    assert not any(np.any(v) for v in mine.values())
    counts = part(third, ".opt_state", ".count").values()
    assert sorted(int(c) for c in counts) == [EPOCH, 3 * EPOCH]


def test_head_trains_as_if_the_backbone_were_no_parameter():
    options: Any = {"gradient_clip_val": 0.05, "max_epochs": 2}
    late = trained(BackboneFinetuning(unfreeze_at_epoch=2), **options)[-1]
    alone = trained(tx=Optimizer(optax.adam(1e-2), wrt="head"), **options)[-1]
    got, want = part(late, ".params", "head"), part(alone, ".params", "head")
    # The norm is summed in two programs; 8 steps of float32 (6e-8 of numbers of order one).
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.25, optax.piecewise_constant_schedule(0.25, {1: 0.0})])
def test_ratio_scales_the_updates_of_the_part(ratio: Any):
    # One step after it is unfrozen; a schedule counts from there.
    runs = {
        r: trained(
            BackboneFinetuning(unfreeze_at_step=2, lr_ratio=r), tx=optax.sgd(0.5), max_steps=3
        )[-1]
        for r in (ratio, 1.0, 0.0)
    }
    name = ".params['backbone']['kernel']"
    moved = {r: state[name] - runs[0.0][name] for r, state in runs.items()}
    assert np.all(moved[1.0] != 0.0)
    # Differences of parameters of order one: a few units of 6e-8.
    np.testing.assert_allclose(moved[ratio], 0.25 * moved[1.0], rtol=1e-4, atol=3e-7)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "window"])
def test_steps_and_epochs_mean_the_same(options: Any):
    steps = EPOCH // options.get("accumulate_grad_batches", 1)
    by_epoch = trained(BackboneFinetuning(unfreeze_at_epoch=1), **options)
    by_step = trained(BackboneFinetuning(unfreeze_at_step=steps), **options)
    for one, other in zip(by_epoch, by_step, strict=True):
        tiny.assert_same_bits(part(one, ".params"), part(other, ".params"))


@pytest.mark.parametrize("when", ["unfreeze_at_epoch", "unfreeze_at_step"])
def test_fused_is_step_by_step(when: str):
    options: dict[str, Any] = {when: 1}
    callback = BackboneFinetuning(**options)
    fused = trained(callback, steps_per_dispatch=3)[-1]
    tiny.assert_same_bits(fused, trained(callback, steps_per_dispatch=1)[-1])


@pytest.mark.parametrize(("when", "at"), [("unfreeze_at_epoch", 1), ("unfreeze_at_step", 6)])
def test_resume_is_the_uninterrupted_run(when: str, at: int, tmp_path: Path):
    options: dict[str, Any] = {when: at}
    callback = BackboneFinetuning(**options)
    saver = Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole = trained(callback, saver)[-1]
    for step in (3, 6, 9):
        resumed = trained(callback, ckpt_path=tmp_path / f"step_{step}")[-1]
        tiny.assert_same_bits(resumed, whole)


def test_unfreezing_compiles_nothing():
    seen = Compilations()
    trained(BackboneFinetuning(unfreeze_at_epoch=1), seen)
    assert seen.names == ["train step"]


def test_parts_are_unfrozen_one_after_the_other():
    late = BackboneFinetuning(backbone="backbone", unfreeze_at_epoch=2)
    early = BackboneFinetuning(backbone="*/bias", unfreeze_at_epoch=1)
    first, second, third, _ = trained(late, early)
    start = trained(tx=optax.set_to_zero(), max_epochs=1)[0]
    moved = [
        [k for k, v in part(state, ".params").items() if v.tobytes() != start[k].tobytes()]
        for state in (first, second, third)
    ]
    assert [len(names) for names in moved] == [1, 2, 4]
    assert moved[0] == [".params['head']['kernel']"]
    assert ".params['head']['bias']" in moved[1]


def test_part_is_that_of_every_optimizer():
    optimizers = {n: Optimizer(optax.sgd(0.1), wrt=n) for n in ("backbone", "head")}
    states = trained(BackboneFinetuning(backbone="*/bias", unfreeze_at_epoch=1), tx=optimizers)
    start = trained(tx=optax.set_to_zero(), max_epochs=1)[0]
    tiny.assert_same_bits(part(states[0], ".params", "bias"), part(start, ".params", "bias"))
    assert all(np.any(states[1][k] != start[k]) for k in part(start, ".params", "bias"))


class ByHand(tiny.Tiny):
    """Two updates in a step, which count as one."""

    automatic_optimization = False

    def training_step(self, model: Any, batch: Any) -> None:
        for _ in range(2):
            self.minimize(lambda m: (m(batch["x"]) ** 2).mean(), model, "default")


@pytest.mark.parametrize("when", [{"unfreeze_at_epoch": 1}, {"unfreeze_at_step": EPOCH}])
def test_update_by_hand_waits_too(when: dict[str, Any]):
    options: Any = {"module": ByHand(Pretrained)}
    first, second, _, _ = trained(BackboneFinetuning(**when), **options)
    counts = [
        sorted(int(c) for n, c in part(state, ".opt_state", "[0].count").items() if "0][0]" in n)
        for state in (first, second)
    ]
    start = trained(tx=optax.set_to_zero(), max_epochs=1)[0]
    tiny.assert_same_bits(part(first, ".params", "backbone"), part(start, ".params", "backbone"))
    assert counts == [[0], [2 * EPOCH]]


class Unsized:
    """Batches, and no word about how many."""

    def __iter__(self) -> Any:
        return iter(tiny.make_batches(EPOCH))


def test_epochs_need_no_length():
    snapshots = Snapshots()
    callbacks = [BackboneFinetuning(unfreeze_at_epoch=1), snapshots]
    tiny.fit(Unsized(), module=tiny.Tiny(Pretrained), callbacks=callbacks, max_epochs=2)
    first, second = (part(s, ".params", "backbone") for s in snapshots.states)
    assert all(np.any(first[name] != second[name]) for name in first)
    assert np.signbit(first[".params['backbone']['bias']"]).all()


def test_rates_of_both_are_recorded():
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    module, callbacks = tiny.Tiny(Pretrained, tx), [BackboneFinetuning(), LearningRateMonitor()]
    result, _ = tiny.fit(module=module, callbacks=callbacks, max_epochs=1)
    assert {n for n in result.metrics if n.startswith("lr")} == {"lr", "lr/backbone"}


def test_optimizer_may_start_late_by_itself():
    optimizers = {
        "backbone": Optimizer(optax.sgd(0.1), wrt="backbone", start_epoch=1, start_step=6),
        "head": Optimizer(optax.sgd(0.1)),
    }
    first, second, third, _ = trained(tx=optimizers)
    tiny.assert_same_bits(
        part(first, ".params", "backbone"),
        part(trained(tx=optimizers, max_steps=6)[-1], ".params", "backbone"),
    )
    kernels = [state[".params['backbone']['kernel']"] for state in (first, second, third)]
    assert np.any(kernels[0] != kernels[1])
    assert np.any(kernels[1] != kernels[2])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"unfreeze_at_epoch": 1, "unfreeze_at_step": 2}, "not both"),
        ({"unfreeze_at_epoch": -1}, "unfreeze_at_epoch must be an integer of at least 0, got -1"),
        ({"unfreeze_at_step": 1.5}, "unfreeze_at_step must be an integer"),
        ({"lr_ratio": -0.1}, "lr_ratio must be a number of at least 0, or a schedule"),
        ({"lr_ratio": "0.1"}, "got '0.1'"),
        ({"backbone": []}, "pass the name of a module"),
        ({"backbone": [nnx.Param]}, "pass the name of a module"),
    ],
)
def test_option_that_cannot_work_is_refused(options: Any, part: str):
    with pytest.raises(ConfigError) as caught:
        BackboneFinetuning(**options)
    assert part in str(caught.value)


def test_option_of_lightning_says_its_name_here():
    with pytest.raises(OptionError, match=r"Write `unfreeze_at_epoch=`"):
        BackboneFinetuning(unfreeze_backbone_at_epoch=3)  # pyright: ignore[reportCallIssue]


def test_part_that_is_not_there_is_refused():
    callback = BackboneFinetuning(backbone="kernal")
    parts = ("'kernal' matches no parameter that is trained: bias, kernel.", "mean 'kernel'?")
    refused(ConfigError, *parts, callbacks=[callback])


def test_part_that_nobody_trains_is_refused():
    module = module_with(configure_optimizers=lambda self: Optimizer(optax.sgd(0.1), wrt="bias"))
    callback = BackboneFinetuning(backbone="kernel")
    refused(ConfigError, "'kernel' matches no parameter", module=module, callbacks=[callback])
