"""Forensics: the operation, module and line from which numbers stopped being finite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxtrainer.callbacks import NonFinite
from jaxtrainer.errors import NonFiniteError
from jaxtrainer.forensics import Finding, first_non_finite, names_of
from tests import tiny
from tests.bad_input import assert_says

HERE = Path(__file__)


def line_of(mark: str) -> int:
    """Number of the one line of this file that ends with a comment."""
    lines = HERE.read_text(encoding="utf-8").splitlines()
    (found,) = [i for i, text in enumerate(lines, 1) if text.endswith(f"# {mark}")]
    return found


def examine(fn: Any, *arguments: Any) -> Finding | None:
    closed = jax.make_jaxpr(fn)(*arguments)
    leaves = jax.tree.leaves(arguments)
    names = [f"x{i}" for i in range(len(leaves))]
    return first_non_finite(closed, leaves, names, [f"y{i}" for i in range(len(closed.out_avals))])


def origin_of(fn: Any, *arguments: Any) -> Any:
    finding = examine(fn, *arguments)
    assert finding is not None
    assert finding.origin is not None
    return finding.origin


def log_of(x: Any) -> Any:
    y = x * 2.0
    return jnp.sum(jnp.log(y) * y)  # the log


def test_log_of_zero_is_found_behind_the_nan_that_it_makes():
    origin = origin_of(log_of, jnp.array([1.0, 0.0]))
    assert (origin.primitive, origin.kind) == ("log", "inf")
    assert (origin.file, origin.line) == (str(HERE), line_of("the log"))
    assert origin.function == "log_of"
    assert not origin.is_gradient


def root_of(x: Any) -> Any:
    return jnp.sum(jnp.sqrt(x * 2.0))  # the root


def test_gradient_is_found_at_the_line_of_the_forward_pass():
    assert examine(root_of, jnp.array([1.0, 0.0])) is None
    origin = origin_of(jax.grad(root_of), jnp.array([1.0, 0.0]))
    assert (origin.file, origin.line) == (str(HERE), line_of("the root"))
    assert origin.kind == "inf"


def hidden(x: Any) -> Any:
    return jnp.sum(jnp.where(x > 0, jnp.log(x), 0.0))  # the hidden log


def test_gradient_of_a_value_that_is_masked_away_is_found():
    assert examine(hidden, jnp.array([1.0, 0.0])) is None
    origin = origin_of(jax.grad(hidden), jnp.array([1.0, 0.0]))
    assert (origin.primitive, origin.line) == ("div", line_of("the hidden log"))


def test_infinities_that_lead_nowhere_are_no_finding():
    def masked(x: Any) -> Any:
        return jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf))

    assert examine(masked, jnp.array([1.0, -1.0])) is None


def test_infinite_constant_is_not_blamed_for_the_nan_made_of_it():
    def masked(x: Any) -> Any:
        y = jnp.where(x > 0, x, -jnp.inf)
        return y - jnp.max(y)  # all are masked

    origin = origin_of(masked, jnp.array([-1.0, -1.0]))
    assert (origin.primitive, origin.kind) == ("sub", "nan")
    assert origin.line == line_of("all are masked")


def looped(x: Any) -> Any:
    def body(carry: Any, row: Any) -> Any:
        return carry - 1.0, row / carry  # the division

    return lax.scan(body, jnp.float32(2.0), x)[1]


def branched(x: Any) -> Any:
    def divide(x: Any) -> Any:
        return x / 0.0  # the branch

    return lax.cond(x[0, 0] > 0, divide, lambda x: x, x)


def counted(x: Any) -> Any:
    def body(state: Any) -> Any:
        i, y = state
        return i + 1, y / (2.0 - i)  # the loop

    return lax.while_loop(lambda state: state[0] < 4, body, (jnp.float32(0), x))[1]


def called(x: Any) -> Any:
    return jax.jit(jax.checkpoint(lambda x: x / (x - x)))(x)  # the call


@pytest.mark.parametrize(
    ("fn", "mark"),
    [
        (looped, "the division"),
        (branched, "the branch"),
        (counted, "the loop"),
        (called, "the call"),
    ],
)
def test_operation_is_found_inside_loops_branches_and_calls(fn: Any, mark: str):
    origin = origin_of(fn, jnp.ones((4, 2), jnp.float32))
    assert (origin.primitive, origin.line) == ("div", line_of(mark))


def test_input_that_is_not_finite_is_named():
    finding = examine(lambda x, y: (x * 2.0) + y, jnp.ones(2), jnp.array([1.0, jnp.nan]))
    assert finding is not None
    assert finding.source == "x1"
    assert "fed by x1" in str(finding)


def test_bfloat16_is_looked_at_too():
    origin = origin_of(lambda x: x / (x - x), jnp.ones(2, jnp.bfloat16))
    assert origin.shapes == "bfloat16[2]"


def test_names_of_leaves_are_their_paths():
    assert names_of({"x": [1.0, 2.0]}, "batch") == ["batch/x/0", "batch/x/1"]
    assert names_of(1.0, "loss") == ["loss"]


class Logs(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.log(jnp.abs(x))  # in the module


class Divides(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        size = jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True))  # in the gradient
        return x * size


class Deep(nnx.Module):
    def __init__(self, inner: nnx.Module, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([nnx.Linear(tiny.FEATURES, tiny.CLASSES, use_bias=False, rngs=rngs)])
        self.head = nnx.Dict(inner=inner)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head["inner"](self.blocks[0](x))


def zeros_at(index: int, num: int = 6) -> list[Any]:
    batches = tiny.make_batches(num)
    batches[index]["x"] = np.zeros_like(batches[index]["x"])
    return batches


def failing_fit(inner: Any, loader: Any, guard: NonFinite, **options: Any) -> NonFiniteError:
    module = tiny.Tiny(make=lambda rngs: Deep(inner(), rngs))
    trainer = tiny.make_trainer(guard, **{"max_epochs": 1, **options})
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(module, loader)
    return caught.value


@pytest.mark.parametrize(
    ("inner", "mark", "is_gradient"),
    [(Logs, "in the module", False), (Divides, "in the gradient", True)],
)
@pytest.mark.parametrize(
    "steps", [pytest.param(1, marks=pytest.mark.slow), 4], ids=["single", "fused"]
)
def test_error_names_module_and_line(inner: Any, mark: str, is_gradient: bool, steps: int):
    guard = NonFinite(dirpath=None)
    error: Any = failing_fit(inner, zeros_at(2), guard, steps_per_dispatch=steps)
    origin = error.evidence.finding.origin
    assert (origin.file, origin.line) == (str(HERE), line_of(mark))
    assert origin.module == "head.inner"
    assert error.evidence.finding.output.startswith("gradients" if is_gradient else "loss")
    assert_says(error, "batch 2 in epoch 0", f"{HERE}:{line_of(mark)}", "module `head.inner`")


def test_classes_of_the_modules_are_as_they_were():
    before = dict(vars(Logs)), dict(vars(nnx.Linear))
    failing_fit(Logs, zeros_at(2), NonFinite(dirpath=None))
    assert (dict(vars(Logs)), dict(vars(nnx.Linear))) == before


def test_batch_with_a_nan_is_named_as_the_source():
    batches = tiny.make_batches()
    batches[1]["x"][3, 2] = np.nan
    error: Any = failing_fit(Logs, batches, NonFinite(dirpath=None))
    assert error.evidence.finding.source == "batch/x"


def test_loader_that_gives_other_batches_each_time_is_told_of():
    class Once:
        def __init__(self) -> None:
            self.batches = zeros_at(2)

        def __iter__(self) -> Any:
            batches, self.batches = self.batches, tiny.make_batches(6)
            return iter(batches)

    error = failing_fit(Logs, Once(), NonFinite(dirpath=None))
    assert_says(error, "run once more, the batch was finite")


def test_iterator_that_is_spent_does_not_hide_the_error():
    error = failing_fit(Logs, iter(zeros_at(2)), NonFinite(dirpath=None))
    assert_says(error, "batch 2 in epoch 0", "could not be run once more")


def test_bundle_runs_on_its_own(tmp_path: Path):
    error: Any = failing_fit(Logs, zeros_at(2), NonFinite(dirpath=tmp_path / "bundles"))
    directory = tmp_path / "bundles" / "epoch_0_batch_2"
    assert error.evidence.directory == directory
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=directory, capture_output=True, text=True, check=True
    )
    assert "loss []: 1 not finite" in done.stdout
    assert f"{HERE}:{line_of('in the module')}" in (directory / "README.md").read_text()


def test_bundle_holds_the_state_before_the_batch_without_pickle(tmp_path: Path):
    batches = zeros_at(2)
    failing_fit(Logs, batches, NonFinite(dirpath=tmp_path), precision="bf16-true")
    found = tmp_path / "epoch_0_batch_2"
    with np.load(found / "batch.npz", allow_pickle=False) as batch:
        np.testing.assert_array_equal(batch["batch/label"], batches[2]["label"])
    with np.load(found / "state.npz", allow_pickle=False) as state:
        assert state["params/blocks/0/kernel"].dtype == np.uint16
        assert state["batch_count"] == 2


def test_second_bundle_takes_a_directory_of_its_own(tmp_path: Path):
    for _ in range(2):
        failing_fit(Logs, zeros_at(2), NonFinite(dirpath=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_0_batch_2", "epoch_0_batch_2-2"]
