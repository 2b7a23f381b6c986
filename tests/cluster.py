"""Runs a program of the tests in several processes that train together, by the launcher.

A program is a module, such as `tests.process_program`, that says what came out with `say`:
one line of JSON, which the test gets by process.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtrainer.launch import Processes

ROOT = Path(__file__).parents[1]
_SAID = "SAID "


def say(**values: Any) -> None:
    """For the programs: tell the test something, as JSON."""
    print(_SAID + json.dumps(values), flush=True)


@dataclass
class Outcome:
    """How the processes ended.

    Attributes:
        code: Exit code of the launcher.
        codes: Exit code of each process; negative after a signal.
        said: What each process has said, in order.
        out: Lines of stdout, each with `[process] ` before it.
        err: The same of stderr.
    """

    code: int
    codes: list[int]
    out: str
    err: str
    said: list[list[dict[str, Any]]] = field(default_factory=list)

    def last(self, key: str) -> list[Any]:
        """The last value of that name that each process has said."""
        return [[said[key] for said in of_one if key in said][-1] for of_one in self.said]

    def same(self, key: str) -> Any:
        """The last value of that name, on which all processes must agree."""
        first, *others = self.last(key)
        assert all(other == first for other in others), f"{key}: {[first, *others]}"
        return first


class Cluster:
    """Processes that run, to be looked at, sent signals and waited for; use it in a `with`."""

    def __init__(
        self,
        program: str,
        *args: Any,
        processes: int = 2,
        devices: int = 4,
        grace_s: float = 45.0,
        env: dict[str, str] | None = None,
    ) -> None:
        self._streams = io.StringIO(), io.StringIO()
        cleared = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        path = os.pathsep.join(map(str, [ROOT, ROOT / "recipes"]))
        self.processes = Processes(
            ["-m", program, *map(str, args)],
            num=processes,
            devices=devices,
            output="all",
            grace_s=grace_s,
            env={**cleared, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})},
            streams=self._streams,
        )

    def __enter__(self) -> Cluster:
        self.processes.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.processes.kill()

    @property
    def out(self) -> str:
        return self._streams[0].getvalue()

    @property
    def err(self) -> str:
        return self._streams[1].getvalue()

    def wait_until(self, happened: Callable[[Cluster], bool], timeout_s: float = 60.0) -> None:
        """Wait until something is the case, e.g. `lambda c: "[1] PHASE train" in c.out`."""
        ends = time.monotonic() + timeout_s
        while not happened(self):
            assert self.processes.poll() is None, f"ended early:\n{self.out}\n{self.err}"
            assert time.monotonic() < ends, f"nothing within {timeout_s} s:\n{self.out}\n{self.err}"
            time.sleep(0.02)

    def wait(self, timeout_s: float = 120.0) -> Outcome:
        """Wait for the end of all processes."""
        try:
            code = self.processes.wait(timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}:\n{self.out}\n{self.err}") from None
        codes = [process.returncode for process in self.processes.started]
        said: list[list[dict[str, Any]]] = [[] for _ in codes]
        for line in self.out.splitlines():
            head, _, text = line.partition(_SAID)
            if text and head.strip("[] ").isdecimal():
                said[int(head.strip("[] "))].append(json.loads(text))
        return Outcome(code, codes, self.out, self.err, said)


def run_cluster(
    program: str, *args: Any, timeout_s: float = 120.0, expect: int | None = 0, **options: Any
) -> Outcome:
    """Run a program to its end; `expect` is the exit code it must have, None for any.

    Options as in `Cluster`: `processes` (2), `devices` (4, virtual CPU devices of each).
    """
    with Cluster(program, *args, **options) as cluster:
        outcome = cluster.wait(timeout_s)
    assert expect is None or outcome.code == expect, f"{outcome.out}\n{outcome.err}"
    return outcome
