"""`jaxtrainer launch`: runs a program in several processes of this host, and ends them together.

Each is `python -m jaxtrainer.launched program ...`, which joins the others before the program
begins. Imports `distributed` and `ending`; the launcher itself touches no device.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.machinery import BuiltinImporter, PathFinder
from pathlib import Path
from typing import IO, Any

from jaxtrainer.distributed import ADDRESS, COUNT, INDEX
from jaxtrainer.ending import EXIT_RESTART
from jaxtrainer.errors import ConfigError

GRACE_S = 45.0
"""How long the others have after one has failed; by the heartbeat they see it before."""

KILL_S = 10.0
_TAIL = 60
_POLL_S = 0.05


class Processes:
    """Some processes of one run, on this host.

    Args:
        command: What follows `python -m jaxtrainer.launched`: a script or `-m module`, and its
            arguments.
        num: Processes on this host.
        devices: Virtual CPU devices of each; None for the devices that there are.
        gpus: GPUs of each.
        hosts: How many hosts there are.
        host: Which this is.
        address: `host:port` of process 0; None for a free port of this host.
        output: `"first"` shows process 0, and the end of what others have said if they fail;
            `"all"` shows every line with its process before it.
        log_dir: Directory for a file with the whole output of each process but the one shown.
        grace_s: How long the others have after one has failed, before they are ended.
        env: Variables in place of this process's.
        streams: Where output goes; the program's own stdout and stderr by default.

    Attributes:
        started: The `subprocess.Popen` of each.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        num: int,
        devices: int | None = None,
        gpus: int = 1,
        hosts: int = 1,
        host: int = 0,
        address: str | None = None,
        output: str = "first",
        log_dir: Path | None = None,
        grace_s: float = GRACE_S,
        env: Mapping[str, str] | None = None,
        streams: tuple[IO[str], IO[str]] | None = None,
    ) -> None:
        self.command, self.num, self.devices, self.gpus = command, num, devices, gpus
        self.hosts, self.host, self.output, self.log_dir = hosts, host, output, log_dir
        self.grace_s, self.env, self.streams = grace_s, dict(env or os.environ), streams
        self.address = address or f"127.0.0.1:{free_port()}"
        self.started: list[subprocess.Popen[str]] = []
        self.first_failure: tuple[int, int] | None = None
        self._readers: list[threading.Thread] = []
        self._tails: dict[int, collections.deque[str]] = {}
        self._write_lock = threading.Lock()
        self._ends_at: float | None = None
        self._was_told = False
        self._forwarded: int | None = None

    def start(self) -> Processes:
        """Start them."""
        if self.log_dir is not None:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        for local in range(self.num):
            self._start_one(local)
        return self

    def poll(self) -> int | None:
        """Return the exit code of the run if all have ended; one that failed ends the others."""
        codes = [process.poll() for process in self.started]
        for local, code in enumerate(codes):
            if code and self.first_failure is None:
                self.first_failure = (self._index(local), exit_code(code))
                self._ends_at = time.monotonic() + self.grace_s
        if None not in codes:
            self._finish()
            if self._ended_by_signal:
                return 128 + (self._forwarded or 0)
            return 0 if self.first_failure is None else self.first_failure[1]
        self._end_late(codes)
        return None

    def wait(self, timeout_s: float | None = None) -> int:
        """Return the exit code of the run: 0, or that of the first process that failed.

        Raises:
            TimeoutError: If they do not end in time; they are killed.
        """
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if ends is not None and time.monotonic() > ends:
                self.kill()
                raise TimeoutError(f"the processes did not end within {timeout_s:g} s")
            time.sleep(_POLL_S)
        return code

    def send(self, number: int) -> None:
        """Send a signal to all that still run."""
        for process in self.started:
            if process.poll() is None:
                process.send_signal(number)

    def forward(self, number: int) -> None:
        """Send a signal that this process has got, as a terminal would to all."""
        self._forwarded = number
        self.send(number)

    @property
    def _ended_by_signal(self) -> bool:
        """Whether a process has ended by a signal that all of them got."""
        if self._forwarded is None:
            return False
        codes = {exit_code(process.returncode or 0) for process in self.started}
        # One that failed of itself meanwhile is what there is to be told.
        return codes - {0, EXIT_RESTART} == {128 + self._forwarded}

    def kill(self) -> None:
        """End them at once."""
        self.send(signal.SIGKILL)
        for process in self.started:
            process.wait()
        self._finish()

    def _start_one(self, local: int) -> None:
        index = self._index(local)
        is_shown = self.output == "first" and index == 0 and self.streams is None
        pipe = None if is_shown else subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxtrainer.launched", *self.command],
            env=self._environment(local),
            stdin=None if is_shown else subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
            errors="replace",
            # A Ctrl-C of the terminal would come twice: from there, and from this process.
            start_new_session=True,
        )
        self.started.append(process)
        self._tails[index] = collections.deque(maxlen=_TAIL)
        for stream, kind in ((process.stdout, 0), (process.stderr, 1)):
            if stream is not None:
                thread = threading.Thread(
                    target=self._read, args=(stream, kind, index), daemon=True
                )
                thread.start()
                self._readers.append(thread)

    def _environment(self, local: int) -> dict[str, str]:
        env = {
            **self.env,
            ADDRESS: self.address,
            COUNT: str(self.num * self.hosts),
            INDEX: str(self._index(local)),
        }
        if self.devices is not None:
            env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices)}
            # Set both ways, JAX refuses to begin.
            flags = re.sub(
                r"--xla_force_host_platform_device_count=\S*", "", env.get("XLA_FLAGS", "")
            )
            env["XLA_FLAGS"] = flags.strip()
        else:
            ids = range(local * self.gpus, (local + 1) * self.gpus)
            env.setdefault("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, ids)))
        if self.hosts == 1:
            env.setdefault("JAX_COORDINATOR_BIND_ADDRESS", self.address)
        return env

    def _index(self, local: int) -> int:
        return self.host * self.num + local

    def _read(self, stream: IO[str], kind: int, index: int) -> None:
        log = None if self.log_dir is None else self.log_dir / f"process_{index}.log"
        for line in stream:
            with self._write_lock:
                self._take(line, kind, index, log)
        stream.close()

    def _take(self, line: str, kind: int, index: int, log: Path | None) -> None:
        self._tails[index].append(line)
        if log is not None:
            with log.open("a") as file:
                file.write(line)
        if self.output == "all":
            self._show(f"[{index}] {line}", kind)
        elif index == 0:
            self._show(line, kind)

    def _show(self, line: str, kind: int = 1) -> None:
        stream = (self.streams or (sys.stdout, sys.stderr))[kind]
        stream.write(line if line.endswith("\n") else f"{line}\n")
        stream.flush()

    def _end_late(self, codes: Sequence[int | None]) -> None:
        """End those that still run long after one has failed: first asked to, then killed."""
        if self._ends_at is None or time.monotonic() < self._ends_at:
            return
        left = [self._index(i) for i, code in enumerate(codes) if code is None]
        name = "SIGKILL" if self._was_told else "SIGTERM"
        self._show(f"jaxtrainer launch: {name} to {_processes(left)}, which did not end")
        self.send(signal.SIGKILL if self._was_told else signal.SIGTERM)
        self._was_told, self._ends_at = True, time.monotonic() + KILL_S

    def _finish(self) -> None:
        for thread in self._readers:
            thread.join(timeout=5.0)
        if self._ended_by_signal:
            # What each of them says of that is the same, and process 0 has said it.
            name = signal.Signals(self._forwarded or 0).name
            self._show(f"jaxtrainer launch: ended by {name}")
        elif self.first_failure is not None:
            index, code = self.first_failure
            if self.output == "first" and index != 0 and not self._is_told_already(code):
                for line in self._tails[index]:
                    self._show(f"[{index}] {line}")
            self._show(f"jaxtrainer launch: process {index} ended first, with exit code {code}")

    def _is_told_already(self, code: int) -> bool:
        # An exception that all have raised: a process that is left by another one has its own code.
        is_here = self.host == 0 and self.started[0].returncode == code
        return is_here and code != EXIT_RESTART


def free_port() -> int:
    """Return a port of this host on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def exit_code(code: int) -> int:
    """Return a process's exit code as a shell says it: 128 + n after signal n."""
    return 128 - code if code < 0 else code


def _processes(indices: Sequence[int]) -> str:
    return f"process{'' if len(indices) == 1 else 'es'} {', '.join(map(str, indices))}"


def find_module(name: str) -> object | None:
    """Return where the outermost package of a module is, found as `python -m` does; imports none.

    Example:
        >>> find_module("nosuch.module") is None, find_module("json.tool") is None
        (True, False)
    """
    outermost = name.partition(".")[0]
    found = PathFinder.find_spec(outermost, [os.getcwd(), *sys.path])
    return found or BuiltinImporter.find_spec(outermost)


def add_parser(commands: Any) -> None:
    """Add `launch` to the commands of `jaxtrainer`."""
    parser = commands.add_parser(
        "launch",
        help="run a program in several processes of this host",
        description="Run a program in several processes, which train together.",
    )
    parser.add_argument("--processes", type=int, required=True, help="processes on this host")
    parser.add_argument(
        "--devices-per-process",
        type=int,
        metavar="N",
        help="virtual CPU devices of each process, to try out what will run on accelerators",
    )
    parser.add_argument(
        "--gpus-per-process", type=int, default=1, metavar="N", help="GPUs of each (default: 1)"
    )
    parser.add_argument("--hosts", type=int, default=1, help="hosts on which this is run")
    parser.add_argument("--host-index", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, on host 0")
    parser.add_argument(
        "--output",
        choices=("first", "all"),
        default="first",
        help="show process 0, or the lines of all with their number (default: first)",
    )
    parser.add_argument("--log-dir", type=Path, help="directory for the output of each process")
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help=f"how long the others have after one has failed (default: {GRACE_S:g})",
    )
    parser.add_argument("-m", dest="module", help="a module to run, as `python -m` does")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="script and its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `jaxtrainer launch`; return its exit code."""
    _check(args)
    command = [*(["-m", args.module] if args.module else []), *args.program]
    processes = Processes(
        command,
        num=args.processes,
        devices=args.devices_per_process,
        gpus=args.gpus_per_process,
        hosts=args.hosts,
        host=args.host_index,
        address=args.coordinator,
        output=args.output,
        log_dir=args.log_dir,
        grace_s=args.grace,
    )
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: processes.forward(number)) for n in numbers}
    try:
        return processes.start().wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check(args: argparse.Namespace) -> None:
    if args.processes < 1 or args.gpus_per_process < 1 or (args.devices_per_process or 1) < 1:
        raise ConfigError("launch: numbers of processes and devices are 1 or more.")
    if not args.module and not args.program:
        raise ConfigError("launch: what is to be run? `jaxtrainer launch --processes 2 train.py`")
    if not 0 <= args.host_index < args.hosts:
        raise ConfigError(
            f"launch: --host-index {args.host_index} of --hosts {args.hosts}: they are counted "
            f"from 0 to {args.hosts - 1}."
        )
    if args.hosts > 1 and args.coordinator is None:
        raise ConfigError(
            "launch: with several hosts say where process 0 is: `--coordinator host0:12345`."
        )
    if args.program and not args.module and not Path(args.program[0]).exists():
        raise ConfigError(
            f"launch: there is no {args.program[0]}; pass a script, or `-m package.module`."
        )
    if args.module and find_module(args.module) is None:
        raise ConfigError(f"launch: there is no module {args.module!r} here, or on Python's path.")
