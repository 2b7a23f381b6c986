"""Which dtypes are kept and which are computed in, and that training in them works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtrainer import Precision, Trainer
from jaxtrainer.errors import ConfigError
from jaxtrainer.optim import clip
from jaxtrainer.session import Session
from jaxtrainer.traced import TracedStep
from tests import tiny
from tests.bad_input import module_with, refused

KEPT = {
    "32-true": "float32",
    "bf16-mixed": "float32",
    "16-mixed": "float32",
    "bf16-true": "bfloat16",
}


@pytest.fixture(autouse=True)
def mixed_dtypes() -> Iterator[None]:
    """BatchNorm mixes its float32 statistics with others, as in a user's program."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def traced(module: Any, **options: Any) -> TracedStep:
    """The training step, of which nothing is compiled."""
    trainer = tiny.make_trainer(max_epochs=1, **options)
    session = Session(trainer.options, [], module, "fit", None)
    module.run = session.run
    feed = session.train_feed(tiny.make_batches(2))
    return TracedStep(session, feed.spec, None, 1)


def dtypes(state: dict[str, np.ndarray], part: str) -> set[str]:
    kept = [x.dtype for k, x in state.items() if k.startswith(part)]
    return {str(dtype) for dtype in kept if jnp.issubdtype(dtype, jnp.floating)}


@pytest.mark.parametrize("precision", KEPT)
def test_what_is_stored_stays_in_the_dtype_of_the_precision(precision: str):
    result, state = tiny.fit(precision=precision, max_epochs=3, accumulate_grad_batches=2)
    losses = result.history["train/loss"].values
    assert losses[-1] < losses[0]
    assert dtypes(state, ".params") == dtypes(state, ".opt_state[") == {KEPT[precision]}
    # Statistics and sums are what a narrow dtype would round away.
    assert dtypes(state, ".model_state") == dtypes(state, ".accumulated") == {"float32"}


SEEN: dict[str, str] = {}


class Seen(nnx.Module):
    """Notes while traced what its layers are computed in."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(4, 8, rngs=rngs)
        self.first = nnx.Linear(tiny.FEATURES, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, tiny.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x) + self.embed(jnp.zeros(len(x), int))
        SEEN["first"] = str(x.dtype)
        x = self.norm(x)
        SEEN["norm"] = str(x.dtype)
        x = self.last(x)
        SEEN["last"] = str(x.dtype)
        return x


def seen_in(precision: Any) -> dict[str, str]:
    traced(tiny.Tiny(Seen), precision=precision)
    return dict(SEEN)


def test_overrides_are_computed_in_their_own_dtype():
    overrides = {"embed": "bfloat16", "norm": "float32", "last": "float32"}
    seen = seen_in(Precision("bf16-mixed", overrides=overrides))
    assert seen == {"first": "bfloat16", "norm": "float32", "last": "float32"}


def test_module_after_an_override_is_computed_in_the_precisions_dtype():
    seen = seen_in(Precision("bf16-mixed", overrides={"norm": "float32"}))
    assert (seen["norm"], seen["last"]) == ("float32", "bfloat16")


def test_first_pattern_that_matches_counts():
    precision = Precision("16-mixed", overrides={"last/bias": "bfloat16", "*": "float32"})
    paths = ("last/bias", "last/kernel", "norm")
    assert [str(precision.dtype_of(path)) for path in paths] == ["bfloat16", "float32", "float32"]


def test_overridden_model_is_float32_throughout():
    states = [
        tiny.fit(module=tiny.Tiny(tiny.line), precision=precision, max_epochs=1)[1]
        for precision in ("32-true", Precision("32-true", overrides={"*": "float32"}))
    ]
    tiny.assert_same_bits(*states)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_batch_statistics_are_added_up_in_float32(dtype: str):
    x = 1e3 + np.random.default_rng(0).normal(size=(4096, 1)).astype(np.float32)
    norm = nnx.BatchNorm(1, momentum=0.0, use_running_average=False, rngs=nnx.Rngs(0))
    given = jnp.asarray(x, dtype)
    norm(given)
    # Of the rounded values themselves: a sum in 8 or 11 bits would be off by far more.
    want = np.asarray(given, np.float64)
    np.testing.assert_allclose(norm.mean[...], want.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], want.var(0), rtol=2e-1, atol=0.2)


def test_norm_of_gradients_is_added_up_in_float32():
    grads = {"w": jnp.full((1 << 14,), 0.5, jnp.bfloat16)}
    _, norm = clip(grads, 1.0, "norm")
    assert norm is not None
    assert norm.dtype == jnp.float32
    assert float(norm) == 64.0  # In bfloat16 the sum of 2**14 quarters would stop growing.


@pytest.mark.parametrize("precision", KEPT)
def test_whole_state_is_donated(precision: str):
    step = traced(tiny.Tiny(), precision=precision)
    memory = step.lower(step.program.single).compile().memory_analysis()
    leaves = jax.tree.leaves(step.target)
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in leaves)


def precisions_of(step: TracedStep) -> set[str]:
    text = step.lower(step.program.single).as_text()
    return {part.split("]")[0].split(",")[0].strip() for part in text.split("precision = [")[1:]}


@pytest.mark.parametrize(
    ("word", "said"), [(None, "DEFAULT"), ("highest", "HIGHEST"), ("tensorfloat32", "HIGH")]
)
def test_matrix_products_have_the_precision_asked_for(word: Any, said: str):
    def muon(rngs: nnx.Rngs) -> Any:
        return nnx.Linear(tiny.FEATURES, tiny.CLASSES, rngs=rngs)

    # Muon's update has matrix products too.
    step = traced(tiny.Tiny(muon, optax.contrib.muon(1e-3)), matmul_precision=word)
    assert precisions_of(step) == {said}


def test_matrix_products_of_evaluation_and_prediction_have_it_too():
    precisions: list[Any] = []

    class Looks(tiny.Tiny):
        def validation_step(self, model: Any, batch: Any) -> Any:
            precisions.append(jax.config.values["jax_default_matmul_precision"])
            return super().training_step(model, batch)

        def predict_step(self, model: Any, batch: Any) -> Any:
            precisions.append(jax.config.values["jax_default_matmul_precision"])
            return model(batch["x"])

    module, trainer = Looks(tiny.line), tiny.make_trainer(max_epochs=1, matmul_precision="high")
    trainer.fit(module, tiny.make_batches(2), tiny.make_batches(1))
    trainer.predict(module, tiny.make_batches(1))
    assert set(precisions) == {"high"}
    assert jax.config.values["jax_default_matmul_precision"] is None


def test_model_trained_in_another_dtype_is_cast():
    module = tiny.Tiny(tiny.line)
    tiny.fit(module=module, max_epochs=1)
    trainer = tiny.make_trainer(precision="bf16-true")
    metrics = trainer.validate(module, tiny.make_loader(), verbose=False)
    assert np.isfinite(metrics["val/loss"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Trainer(precision="bf16_mixed"), "Did you mean 'bf16-mixed'"),
        (lambda: Precision("fp8-mixed"), "use one of '32-true'"),
        (lambda: Precision("bf16-mixed", overrides={"a": "flot32"}), "Did you mean 'float32'"),
        (lambda: Precision("bf16-mixed", overrides={"a": "int32"}), "a floating-point dtype"),
        (lambda: Precision("bf16-mixed", overrides="head"), "pass dtypes by path"),  # type: ignore
        (lambda: Trainer(matmul_precision="medium"), "Write 'bfloat16'"),
        (lambda: Trainer(matmul_precision="hihgest"), "Did you mean 'highest'"),
    ],
)
def test_words_that_are_none_are_refused(make: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        make()


def test_override_that_matches_nothing_is_refused():
    precision = Precision("bf16-mixed", overrides={"lst": "float32"})
    said = "'lst' matches nothing", "Did you mean 'last'"
    refused(ConfigError, *said, module=tiny.Tiny(), precision=precision)


def test_overrides_of_a_model_without_modules_are_refused():
    module = module_with(configure_model=lambda self, rngs: {"w": jnp.ones((4, 3))})
    precision = Precision("bf16-mixed", overrides={"w": "float32"})
    refused(ConfigError, "the model is none", module=module, precision=precision)
