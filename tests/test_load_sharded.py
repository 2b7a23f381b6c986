"""`load_params` for a trainer that divides the model: each device reads its part, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrainer import Callback, Run, load_params, pretrained
from jaxtrainer.callbacks import EMA, Checkpoint
from jaxtrainer.errors import ConfigError
from tests import divided, tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

LARGE = divided.WIDTH * 2 * divided.WIDTH
"""Numbers of each of the two parameters that are divided."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint of one device, and its weights."""
    path, module = tmp_path_factory.mktemp("saved"), divided.Classify()
    divided.train("mlp", "one", module=module, callbacks=[Checkpoint(path)])
    return path, tiny.params_of(module)


def fsdp(**options: Any) -> Any:
    return tiny.make_trainer(mesh={"fsdp": 8}, sharding="fsdp", **options)


def whole_arrays() -> list[jax.Array]:
    """Arrays that are alive with a divided parameter whole on a device."""
    alive = [x for x in jax.live_arrays() if x.size >= LARGE and not x.is_deleted()]
    return [x for x in alive if any(s.data.size >= LARGE for s in x.addressable_shards)]


class Since:
    """Looks for arrays that are whole on a device and were not there before."""

    def __init__(self) -> None:
        # Kept alive, so that none of the new ones has the identity of an old one.
        self._before = whole_arrays()

    def count(self) -> int:
        known = {id(x) for x in self._before}
        return sum(id(x) not in known for x in whole_arrays())


class Spy:
    """The most new arrays that were whole on a device, wherever `load_params` makes some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._since, self.most = Since(), 0
        for module, name in ((pretrained, "read_some"), (jax.numpy, "asarray")):
            monkeypatch.setattr(module, name, self._looking(getattr(module, name)))

    def _looking(self, act: Any) -> Any:
        def looks(*args: Any, **kwargs: Any) -> Any:
            done = act(*args, **kwargs)
            self.most = max(self.most, self._since.count())
            return done

        return looks


@pytest.mark.parametrize("options", [{}, {"exclude": "last"}])
def test_weights_go_to_the_devices_in_parts(saved: Any, options: Any, monkeypatch: Any):
    module, trainer, spy = divided.Classify(), fsdp(), Spy(monkeypatch)
    report = load_params(module, saved[0], trainer=trainer, verbose=False, **options)
    assert spy.most == 0
    monkeypatch.undo()
    assert module.model.up.kernel[...].sharding.spec == P(None, "fsdp")
    assert module.model.down.kernel[...].addressable_shards[0].data.size == LARGE // 8
    names = [*report.loaded]
    assert ("last/kernel" in names) == (not options)
    got = tiny.params_of(module)
    tiny.assert_same_bits({n: got[n] for n in names}, {n: saved[1][n] for n in names})


def test_weights_are_whole_on_one_device_without_a_trainer(saved: Any, monkeypatch: Any):
    # What the test above would see.
    spy = Spy(monkeypatch)
    load_params(divided.Classify(), saved[0], verbose=False)
    assert spy.most >= 2


class WholeAtStart(Callback):
    """Counts what has become whole on a device when training starts."""

    def __init__(self) -> None:
        self.since, self.num_whole = Since(), 0

    def on_fit_start(self, run: Run) -> None:
        self.num_whole = self.since.count()


def test_training_from_parts_is_that_from_the_whole(saved: Any):
    states = []
    for trainer in (fsdp(), None):
        module, count = divided.Classify(), WholeAtStart()
        load_params(module, saved[0], trainer=trainer, verbose=False)
        _, state = divided.train("mlp", "fsdp", module=module, callbacks=[count])
        states.append((state, count.num_whole))
    (parts, num_whole), (whole, num_without) = states
    tiny.assert_same_bits(parts, whole)
    assert num_whole == 0 < num_without


def test_averages_of_a_run_go_to_the_devices_in_parts(tmp_path: Path):
    module, other = divided.Classify(), divided.Classify()
    divided.train("mlp", "one", module=module, callbacks=[EMA(0.9), Checkpoint(tmp_path)])
    load_params(other, tmp_path, trainer=fsdp(precision="bf16-true"), verbose=False)
    kernel = other.model.up.kernel[...]
    assert (str(kernel.dtype), kernel.sharding.spec) == ("bfloat16", P(None, "fsdp"))
    want = module.model.up.kernel[...].astype("bfloat16")
    assert np.array_equal(np.asarray(kernel), np.asarray(want))


def test_other_than_a_trainer_is_refused(saved: Any):
    wrong: Any = {"fsdp": 8}
    with pytest.raises(ConfigError, match="expected the `Trainer` that will train"):
        load_params(divided.Classify(), saved[0], trainer=wrong)
