"""The subcommands `report`, `inspect`, `doctor` and `devices` of `jaxtrainer`.

What a command needs is imported when it runs: the doctor must start where a library is broken.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parsers(commands: Any) -> None:
    """Add them to the commands of `jaxtrainer`: each sets `run`, which gets the arguments.

    Args:
        commands: What `ArgumentParser.add_subparsers` returns.
    """
    report = commands.add_parser(
        "report",
        help="write an HTML page about a run, and plot its curves",
        description="Write an HTML page about a run: curves, configuration, timings, checkpoints.",
    )
    report.add_argument("run_dir", type=Path, metavar="RUN", help="its directory")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/report.html")
    report.add_argument(
        "--plot", type=Path, metavar="FILE", help="the curves alone too, as .png, .svg or .pdf"
    )
    report.set_defaults(run=_report)
    inspect = commands.add_parser(
        "inspect",
        help="say what is in a checkpoint",
        description="Say what is in a checkpoint: counters, metrics, versions, arrays. Nothing of "
        "it is imported or executed.",
    )
    inspect.add_argument("ckpt", metavar="CKPT", help="a step directory, or a run directory")
    inspect.add_argument("--verify", action="store_true", help="compare every array's digest")
    inspect.set_defaults(run=_inspect)
    doctor = commands.add_parser(
        "doctor",
        help="check versions, devices, cache and disk, and say what to do",
        description="Check whether this machine can train. The exit code is 1 if it cannot.",
    )
    doctor.set_defaults(run=_doctor)
    devices = commands.add_parser(
        "devices",
        help="list the devices, their memory, and the mesh that suits them",
        description="List the devices that JAX finds, their memory, and the mesh that suits them.",
    )
    devices.set_defaults(run=_devices)


def _report(args: argparse.Namespace) -> int:
    from jaxtrainer.figure import plot
    from jaxtrainer.page import report

    print(report(args.run_dir, args.output))
    if args.plot is not None:
        plot(args.run_dir, args.plot)
        print(args.plot)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from jaxtrainer.inspection import show_checkpoint

    return show_checkpoint(args.ckpt, verifies=args.verify)


def _doctor(args: argparse.Namespace) -> int:
    from jaxtrainer.doctor import examine, show

    return show(examine())


def _devices(args: argparse.Namespace) -> int:
    from jaxtrainer.doctor import show_devices

    return show_devices()
