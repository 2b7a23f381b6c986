"""`Trainer(offload_optimizer=True)`: the optimiser's state in the host's memory.

The numbers are those of the same program without it, to the bit: only copies are added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtrainer import Callback, Run, Trainer
from jaxtrainer.callbacks import Checkpoint, NonFinite
from jaxtrainer.errors import ConfigError
from jaxtrainer.offload import refuse_offload
from tests import tiny
from tests.test_resume import assert_same_future

pytestmark = pytest.mark.usefixtures("compiled_once")


class Kinds(Callback):
    """Notes in which memory the parts of the state are."""

    def on_train_end(self, run: Run) -> None:
        parts = ("params", "opt_state", "model_state")
        arrays = {part: jax.tree.leaves(getattr(run.state, part)) for part in parts}
        self.kinds = {k: {x.sharding.memory_kind for x in a if x.ndim} for k, a in arrays.items()}


def fit(*callbacks: Callback, offload: bool = True, **options: Any) -> Any:
    where = {"offload_optimizer": True} if offload else {"steps_per_dispatch": 1}
    options = {"max_epochs": 2, "steps_per_dispatch": "auto", **where, **options}
    return tiny.fit(callbacks=callbacks, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"accumulate_grad_batches": 2}, marks=pytest.mark.slow),
        {"mesh": {"data": 2}},
    ],
    ids=["plain", "window", "mesh"],
)
def test_training_is_the_same_with_the_state_on_the_host(options: Any):
    kinds = Kinds()
    _, state = fit(kinds, NonFinite(forensics=False), **options)
    _, want = fit(NonFinite(forensics=False), offload=False, **options)
    tiny.assert_same_bits(state, want)
    device = {jax.devices()[0].default_memory().kind}
    assert kinds.kinds == {"params": device, "opt_state": {"pinned_host"}, "model_state": device}


def test_resume_is_the_uninterrupted_run(tmp_path: Path):
    kinds = Kinds()
    whole = fit(Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1))
    resumed = fit(kinds, ckpt_path=tmp_path / "step_6")
    assert_same_future(resumed, whole, after=6)
    assert kinds.kinds["opt_state"] == {"pinned_host"}


def test_plan_counts_it_on_no_device():
    batch = tiny.make_batches(1)[0]
    here, there = (
        tiny.make_trainer(steps_per_dispatch=1, offload_optimizer=offload).plan(tiny.Tiny(), batch)
        for offload in (False, True)
    )
    assert here.state_bytes == there.state_bytes
    # Adam's moments are as large as the parameters, each.
    assert here.device_bytes - there.device_bytes == 2 * here.param_bytes


class Device:
    """A device that knows its own memory only."""

    device_kind = "Some accelerator"

    def addressable_memories(self) -> list[Any]:
        return [type("Memory", (), {"kind": "device"})]


def test_device_that_cannot_is_refused():
    mesh: Any = type("Mesh", (), {"devices": np.array([Device()])})
    with pytest.raises(ConfigError, match="Some accelerator has no memory of the kind"):
        refuse_offload(mesh)
    refuse_offload(Mesh(np.array(jax.devices()[:1]), ("data",)))


@pytest.mark.parametrize("options", [{"offload_optimizer": 1}, {"steps_per_dispatch": 4}], ids=str)
def test_options_that_cannot_work_are_refused(options: Any):
    with pytest.raises(ConfigError, match="offload_optimizer"):
        Trainer(**{"offload_optimizer": True, **options})
