"""Which dtype parameters are kept in, and that training in it works."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny


def param_dtypes(module):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(module.model, nnx.Param))}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", "float32"), ("bf16-mixed", "float32"), ("bf16-true", "bfloat16")],
)
def test_parameters_are_kept_in_the_dtype_of_the_precision(precision, dtype):
    module = tiny.Tiny(tiny.line)
    result, _ = tiny.fit(module=module, precision=precision, max_epochs=3)
    losses = result.history["train/loss"].values
    assert losses[-1] < losses[0]
    assert param_dtypes(module) == {dtype}


def test_model_trained_in_another_dtype_is_cast():
    module = tiny.Tiny(tiny.line)
    tiny.fit(module=module, max_epochs=1)
    trainer = tiny.make_trainer(precision="bf16-true")
    metrics = trainer.validate(module, tiny.make_loader(), verbose=False)
    assert np.isfinite(metrics["val/loss"])
