"""What programs have in common: options that are numbers, and an end by Ctrl-C."""

import argparse
from collections.abc import Callable

from jaxtrainer import FitResult


def make_parser(description: str | None, **defaults: float) -> argparse.ArgumentParser:
    """A parser with an option for each number.

    Args:
        description: What `--help` says first: the header of the recipe.
        **defaults: By name, `batch_size=256` for `--batch-size`. What is an integer there must be
            one, of at least 1; `seed` may be 0.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        kind = float if isinstance(default, float) else _integer(0 if name == "seed" else 1)
        about = "of all that is random; " if name == "seed" else ""
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=default, help=f"{about}default: {default}")
    return parser


def end_if_interrupted(result: FitResult) -> None:
    """Ends the program where Ctrl-C has ended the training: what comes next needs all of it."""
    if result.stop_reason == "interrupted":
        saved = result.last_checkpoint or "nothing"
        print(f"stopped after {result.num_steps} steps; saved: {saved}")
        raise SystemExit(130)


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return integer
