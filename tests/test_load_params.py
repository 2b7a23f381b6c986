"""`load_params`: weights of another run, which of them, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import load_params
from jaxtrainer.callbacks import EMA, Checkpoint
from jaxtrainer.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
)
from tests import saved, tiny

pytestmark = pytest.mark.usefixtures("compiled_once")


class Wider(tiny.Net):
    """`Net` for more classes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.last = nnx.Linear(8, 5, rngs=rngs)


class Inside(nnx.Module):
    """`Net` as a part of another model."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.backbone = tiny.Net(rngs)
        self.head = nnx.Linear(tiny.CLASSES, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.backbone(x))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Tiny]:
    """A run directory, and the module that was trained in it."""
    folder, module = tmp_path_factory.mktemp("runs"), tiny.Tiny()
    tiny.fit(module=module, callbacks=[Checkpoint(folder)], max_epochs=2)
    return folder, module


def arrays_of(module: Any) -> dict[str, np.ndarray]:
    """Parameters and statistics of a module's model by name."""
    state = nnx.to_pure_dict(nnx.state(module.model, (nnx.Param, nnx.BatchStat)))
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf)
        for path, leaf in flat
    }


def load(make: Any, path: Path, **options: Any) -> tuple[Any, Any]:
    module = tiny.Tiny(make)
    return module, load_params(module, path, verbose=False, **options)


def test_all_weights_and_statistics_are_loaded(run: Any):
    module, report = load(tiny.Net, run[0])
    tiny.assert_same_bits(arrays_of(module), arrays_of(run[1]))
    assert report.loaded.keys() == arrays_of(module).keys()
    assert report.path == run[0] / "step_16"
    assert report.unused == tuple(n for n in report.unused if n.startswith("dropout"))


def test_what_is_excluded_stays_fresh(run: Any):
    module, report = load(Wider, run[0], exclude="last")
    got, want = arrays_of(module), arrays_of(run[1])
    fresh, _ = load(Wider, run[0], include="first", seed=0)
    assert np.array_equal(got["last/kernel"], arrays_of(fresh)["last/kernel"])
    assert np.array_equal(got["norm/mean"], want["norm/mean"])
    assert {n for n in report.fresh if "dropout" not in n} == {"last/bias", "last/kernel"}
    assert {"last/bias", "last/kernel"} <= {*report.unused}


def test_other_shape_is_refused_with_what_to_do(run: Any):
    with pytest.raises(CheckpointMismatchError) as caught:
        load(Wider, run[0])
    text = str(caught.value)
    assert "last/kernel: saved as float32[8, 3], here float32[8, 5]" in text
    assert "exclude=['last/bias', 'last/kernel']" in text


def test_names_that_differ_are_renamed(run: Any):
    names = ("first", "norm", "last")
    rename = {name: f"backbone/{name}" for name in names}
    module, report = load(Inside, run[0], rename=rename, exclude="head")
    assert report.loaded["backbone/first/kernel"] == "first/kernel"
    got = arrays_of(module)
    assert np.array_equal(got["backbone/norm/var"], arrays_of(run[1])["norm/var"])


def test_missing_names_are_refused(run: Any):
    with pytest.raises(CheckpointMismatchError, match=r"head/kernel: float32\[3, 2\] here, not s"):
        load(Inside, run[0], include=["head", "backbone/last"])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"include": "frist"}, "'frist' matches no array of the model. Did you mean 'first'?"),
        ({"exclude": ["head"]}, "'head' matches no array of the model."),
        ({"rename": {"frist": "x"}}, "no array below 'frist'. Did you mean 'first'?"),
    ],
)
def test_name_that_nothing_has_is_refused(run: Any, options: Any, part: str):
    with pytest.raises(ConfigError) as caught:
        load(tiny.Net, run[0], **options)
    assert part in str(caught.value)


def test_report_says_what_is_what(run: Any, capsys: pytest.CaptureFixture[str]):
    module = tiny.Tiny(Inside)
    report = load_params(module, run[0], rename={"first": "backbone/first"}, include="*/first/bias")
    lines = [" ".join(line.split()).strip("│ ") for line in str(report).splitlines()]
    assert "backbone/first/bias │ loaded from first/bias" in lines
    assert "head/kernel │ fresh" in lines
    assert "last/kernel │ not used" in lines
    assert "1 arrays loaded from" in capsys.readouterr().out


def test_training_starts_from_what_was_loaded(run: Any):
    module = tiny.Tiny(Wider, optax.set_to_zero())
    load_params(module, run[0], exclude="last", verbose=False)
    before = arrays_of(module)
    result, _ = tiny.fit(module=module, max_epochs=1)
    after = tiny.params_of(module)
    assert result.num_steps == 8
    tiny.assert_same_bits(after, {name: before[name] for name in after})


def test_model_that_is_there_is_kept_where_nothing_is_loaded(run: Any):
    module, _ = load(tiny.Net, run[0])
    other = tiny.Tiny()
    tiny.fit(module=other, max_epochs=1)
    kernel = arrays_of(other)["last/kernel"]
    load_params(other, run[0], include="first", verbose=False)
    assert np.array_equal(arrays_of(other)["last/kernel"], kernel)
    assert np.array_equal(arrays_of(other)["first/kernel"], arrays_of(module)["first/kernel"])


def test_averages_are_taken_where_the_run_has_them(tmp_path: Path):
    module = tiny.Tiny()
    tiny.fit(module=module, callbacks=[EMA(0.9), Checkpoint(tmp_path)], max_epochs=1)
    loaded, _ = load(tiny.Net, tmp_path)
    tiny.assert_same_bits(arrays_of(loaded), arrays_of(module))


def test_other_float_is_cast_and_said(tmp_path: Path):
    options: Any = {"callbacks": [Checkpoint(tmp_path)], "precision": "bf16-true"}
    tiny.fit(module=tiny.Tiny(tiny.line), max_epochs=1, **options)
    module, report = load(tiny.line, tmp_path)
    assert report.cast["kernel"] == "bfloat16"
    assert arrays_of(module)["kernel"].dtype == np.float32


def test_damaged_checkpoint_is_refused(run: Any, tmp_path: Path):
    copy = saved.copy_of(run[0] / "step_16", tmp_path)
    saved.damage(copy)
    with pytest.raises(CheckpointCorruptError, match="step_16"):
        load(tiny.Net, tmp_path)


def test_path_without_a_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at"):
        load(tiny.Net, tmp_path)
