"""By law: the same seed gives the same bits, in another process too.

The programs run as a user's would: no test environment, every device, the trainer's own choice
of steps a dispatch, another hash seed each.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrainer.errors import ConfigError
from tests import tiny

ROOT = Path(__file__).parents[1]

PROGRAM = """
import hashlib, json
import grain
from jaxtrainer import Trainer
from tests import tiny

def digest(arrays):
    content = b"".join(name.encode() + array.tobytes() for name, array in arrays.items())
    return hashlib.sha256(content).hexdigest()

def run(loader, **options):
    probe = tiny.Probe()
    options = {"seed": 7, "compilation_cache": False, "enable_progress_bar": False, **options}
    trainer = Trainer(max_epochs=2, callbacks=[probe], **options)
    result = trainer.fit(tiny.Tiny(), loader)
    return {
        "state": digest(probe.state),
        "params": digest({k: v for k, v in probe.state.items() if k.startswith(".params")}),
        "metrics": {name: value.hex() for name, value in result.metrics.items()},
    }

records = tiny.make_batches(64, 1)
source = grain.MapDataset.source([{k: v[0] for k, v in r.items()} for r in records])
dataset = source.seed(5).shuffle().batch(8)
one_device = {"mesh": {"data": 1}, "steps_per_dispatch": 1}
print(json.dumps({
    "default": run(tiny.make_loader()),
    "one_device": run(dataset, **one_device),
    "another_seed": run(dataset, seed=8, **one_device),
}))
"""


def start(hash_seed: int) -> subprocess.Popen[str]:
    scrubbed = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTEST_"))}
    environment = {**scrubbed, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, dict[str, str]]]:
    """What two processes gave."""
    processes = [start(1), start(2)]
    outputs = [(*process.communicate(timeout=200), process.returncode) for process in processes]
    assert [code for _, _, code in outputs] == [0, 0], outputs[0][1]
    return [json.loads(out.splitlines()[-1]) for out, _, _ in outputs]


@pytest.mark.parametrize("how", ["default", "one_device"])
def test_same_seed_gives_the_same_bits_in_two_processes(outcomes: list, how: str):
    first, second = outcomes
    assert first[how] == second[how]


def test_another_seed_gives_other_parameters(outcomes: list):
    first, _ = outcomes
    assert first["one_device"]["params"] != first["another_seed"]["params"]


def test_second_run_in_a_process_gives_the_same_bits():
    _, first = tiny.fit(max_epochs=1, seed=7)
    _, second = tiny.fit(max_epochs=1, seed=7)
    tiny.assert_same_bits(second, first)


def test_global_random_state_is_left_alone():
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), repr(np.random.get_state())
    tiny.fit(max_steps=1)
    assert (random.getstate(), repr(np.random.get_state())) == before


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_run_measures_nothing(deterministic: bool):
    module = tiny.Tiny()
    tiny.fit(module=module, max_epochs=1, steps_per_dispatch="auto", deterministic=deterministic)
    assert module.run is not None
    measured = any("a dispatch" in line for line in module.run.notices)
    assert measured is not deterministic


@pytest.mark.parametrize("deterministic", [False, True])
def test_steps_are_compiled_with_deterministic_operations(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
):
    given: list[Any] = []
    jit = jax.jit

    def noting(fn: Any, *args: Any, **options: Any) -> Any:
        given.append(options.get("compiler_options"))
        return jit(fn, *args, **options)

    monkeypatch.setattr(jax, "jit", noting)
    tiny.fit(val_loader=tiny.make_loader(), max_epochs=1, deterministic=deterministic)
    # The training step and the validation step.
    assert given.count({"xla_gpu_deterministic_ops": True}) == 2 * deterministic


def test_deterministic_takes_a_truth_value_only():
    with pytest.raises(ConfigError, match="deterministic must be True or False, got 'warn'"):
        tiny.make_trainer(max_epochs=1, deterministic="warn")
