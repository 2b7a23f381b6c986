"""By law: a divided model trains as one on one device, and its program sends what it must.

Reductions are in another order, see `divided.assert_close`. The reduce-scatter of FSDP is an
all-reduce of one gradient and a slice here: XLA joins the two on GPU and TPU only.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Checkpoint, NonFinite, WeightAveraging
from jaxtrainer.state import flat_items, size_of
from tests import divided, tiny

MANY = [name for name in divided.MESHES if name != "one"]
QUICK = [("mlp", "data"), ("mlp", "fsdp"), ("mlp", "mix"), ("cnn", "hybrid")]
PAIRS = [
    pytest.param(model, mesh, marks=[] if (model, mesh) in QUICK else pytest.mark.slow)
    for model in divided.MODELS
    for mesh in MANY
]


@pytest.fixture(scope="module")
def alone() -> Any:
    """States after four steps on one device, by model."""
    states: dict[str, Any] = {}

    def get(model: str) -> Any:
        if model not in states:
            states[model] = divided.train(model, "one")[1]
        return states[model]

    return get


@pytest.mark.parametrize(("model", "mesh"), PAIRS)
def test_divided_model_trains_as_one_and_sends_what_it_must(model: str, mesh: str, alone: Any):
    _, state = divided.train(model, mesh)
    divided.assert_close(state, alone(model))
    step = divided.traced(model, **divided.options_for(model, mesh))
    assert_sends_what_it_must(step, divided.exchanged(divided.compiled(step)))


def assert_sends_what_it_must(step: Any, exchanged: list[Any]) -> None:
    sizes, parts = step.layout.mesh.shape, parameter_bytes(step)
    data = {axis for axis in ("data", "fsdp") if sizes.get(axis, 1) > 1}
    reduced = [c for c in exchanged if c.op == "all-reduce"]
    gathered = [c for c in exchanged if c.op != "all-reduce"]
    # Gradients are added up over all parts of the batch, each byte of them at least once.
    summed = sum(c.size_bytes for c in reduced if set(c.axes(sizes)) == data)
    assert summed >= 0.9 * sum(small for _, small in parts.values())
    if step.layout.gathered:
        # Each divided parameter is made whole along its own axis twice: forward and backward.
        wanted = {small for name, (_, small) in parts.items() if name in step.layout.specs}
        assert wanted - {c.size_bytes for c in gathered if c.axes(sizes) == ("fsdp",)} == set()
        assert max(max(c.sizes) for c in reduced) <= max(small for _, small in parts.values())
    # Nothing brings the model together, and nothing what is divided along `model`.
    largest = max((c.size_bytes for c in gathered), default=0)
    assert largest <= max(small for _, small in parts.values())
    assert largest < sum(whole for whole, _ in parts.values()) / 2
    assert not [c for c in gathered if "model" in c.axes(sizes) and c.size_bytes > 1024]


def parameter_bytes(step: Any) -> dict[str, tuple[int, int]]:
    """Bytes of each parameter, whole and as a device computes with it, by name."""
    sizes = step.layout.mesh.shape
    found = {}
    for name, spec in flat_items(step.target.params):
        whole, axes = size_of(spec)[1], str(step.layout.specs.get(name, ""))
        found[name] = whole, whole // (sizes["model"] if "'model'" in axes else 1)
    return found


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_steps_of_a_divided_model_are_the_same_fused(steps: int, alone: Any):
    options = {"steps_per_dispatch": steps, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    _, state = divided.train("mlp", "hybrid", **options)
    _, expected = divided.train("mlp", "one", **options)
    divided.assert_close(state, expected)
    assert not np.allclose(
        state[".params['up']['kernel']"], alone("mlp")[".params['up']['kernel']"]
    )


class Look(Callback):
    """Keeps where the arrays of the last state live, by their paths."""

    def __init__(self) -> None:
        self.specs: dict[str, Any] = {}

    def on_train_end(self, run: Run) -> None:
        flat, _ = jax.tree_util.tree_flatten_with_path(run.state)
        self.specs = {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in flat}


def test_state_stays_divided_with_all_that_follows_the_parameters():
    look, module = Look(), divided.Classify(tx=optax.adam(1e-3))
    callbacks = [look, WeightAveraging(), NonFinite("skip", spike_z=6)]
    options = {"module": module, "accumulate_grad_batches": 2, "callbacks": callbacks}
    divided.train("mlp", "mix", **options)
    followers = [spec for name, spec in look.specs.items() if name.endswith("['up']['kernel']")]
    # The parameter, two moments, the window's sum, the average.
    assert followers == [("fsdp", "model")] * 5
    assert module.model.up.kernel[...].sharding.spec == ("fsdp", "model")
    assert {s for n, s in look.specs.items() if "guard" in n or "count" in n} == {jax.P()}


@pytest.mark.parametrize("mesh", ["one", "tensor", "data"])
def test_checkpoint_of_a_divided_model_restores_elsewhere_with_the_same_bits(
    mesh: str, tmp_path: Any, alone: Any
):
    divided.train("mlp", "hybrid", callbacks=[Checkpoint(tmp_path)], max_steps=2, max_epochs=None)
    module, saved = divided.Classify(), tiny.Probe()
    trainer = tiny.make_trainer(**divided.options_for("mlp", mesh))
    trainer.validate(module, divided.batches(1), ckpt_path=tmp_path, verbose=False)
    _, state = divided.train("mlp", mesh, callbacks=[saved], ckpt_path=tmp_path)
    divided.assert_close(state, alone("mlp"))
