"""`ModelSummary`: what `fit` prints about the model."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jaxtrainer.callbacks import ModelSummary
from jaxtrainer.errors import ConfigError
from tests.tiny import Tiny, make_batches, make_trainer


def console() -> Console:
    return Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)


def test_summary_is_printed_when_fit_starts():
    out = console()
    callback = ModelSummary(console=out)
    make_trainer([callback], max_epochs=1).fit(Tiny(), make_batches(1))
    text = out.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "kernel f32[4, 8]" in text
    assert callback.summary is not None
    assert str(callback.summary).split("\n", 1)[1] in "\n".join(
        line.rstrip() for line in text.splitlines()
    )
    # Two linear layers and a BatchNorm: 4*8+8, 8*3+3, 2*8.
    assert callback.summary.num_params == 40 + 27 + 16


def test_depth_is_passed_on():
    callback = ModelSummary(max_depth=0, console=console())
    make_trainer([callback], max_epochs=1).fit(Tiny(), make_batches(1))
    assert callback.summary is not None
    assert callback.summary.rows == ()


def test_depth_below_all_is_refused():
    with pytest.raises(ConfigError, match="max_depth"):
        ModelSummary(max_depth=-2)
