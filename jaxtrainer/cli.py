"""The command `jaxtrainer`: each subcommand adds its own parser and says what runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxtrainer import launch
from jaxtrainer.commands import add_parsers
from jaxtrainer.errors import JaxTrainerError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 for one that cannot work."""
    parser = argparse.ArgumentParser(prog="jaxtrainer", description="The training loop for JAX.")
    commands = parser.add_subparsers(metavar="command", required=True)
    launch.add_parser(commands)
    add_parsers(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except JaxTrainerError as error:
        print(f"jaxtrainer: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
