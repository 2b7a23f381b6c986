"""The options that recipes have in common: their types, their limits, their help."""

from functools import partial
from typing import Any

import pytest

from command_line import end_if_interrupted, make_parser
from jaxtrainer import FitResult, History


@pytest.fixture
def parser():
    return make_parser("Trains.\n\n    python x.py", batch_size=256, learning_rate=1e-3, seed=0)


def test_options_have_the_types_of_their_defaults(parser):
    assert vars(parser.parse_args([])) == {"batch_size": 256, "learning_rate": 1e-3, "seed": 0}
    args = parser.parse_args(["--batch-size", "8", "--learning-rate", "1", "--seed", "3"])
    assert [args.batch_size, args.learning_rate, args.seed] == [8, 1.0, 3]
    assert isinstance(args.learning_rate, float)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "argument --batch-size: expected at least 1, got 0"),
        (["--seed", "-1"], "argument --seed: expected at least 0, got -1"),
        (["--batch-size", "8.5"], "invalid integer value: '8.5'"),
    ],
)
def test_numbers_that_cannot_work_are_refused(parser, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_help_has_the_header_as_it_is_and_the_defaults(parser):
    assert "Trains.\n\n    python x.py\n" in parser.format_help()
    assert "default: 256" in parser.format_help()


def test_program_ends_where_the_training_was_interrupted(capsys):
    known: Any = {"history": History(), "metrics": {}, "num_epochs": 0, "num_samples": 8}
    make_result = partial(FitResult, num_steps=1, elapsed_s=1.0, **known)
    end_if_interrupted(make_result(stop_reason="max_epochs"))
    with pytest.raises(SystemExit, match="130"):
        end_if_interrupted(make_result(stop_reason="interrupted", last_checkpoint="x/step_1"))
    assert capsys.readouterr().out == "stopped after 1 steps; saved: x/step_1\n"
