"""What several processes add on the host: barriers, checks, agreement, start-up, the watchdog.

start-up    of a process: from its start to all having joined, and to its first step done
barrier     `distributed.barrier`, and `gather` and `broadcast` of a small value
check       what a step of the loop asks: `Agreement.tick`
watchdog    step time with the two threads over step time without, A B A B ... in one run, and the
            share of one core that they use
table       one round of the thread that talks: its row, all rows, no reason to leave
host        time of a step with one step a dispatch and with as many as the trainer chooses, over
            that of a loop by hand, which puts the next batch on the devices while a step runs; the
            limit is that loop with one batch that stays there, step by step as well. With 1, 2, 4
            and 8 virtual devices of one process, and 8 of 2 and of 4. The maths is the same in all

    PYTHONPATH=. python benchmarks/processes.py
    PYTHONPATH=. python benchmarks/processes.py --only costs
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import parse, parser
from benchmarks.report import Report

BEGAN = "BENCHMARK_BEGAN"
TITLES = {
    "costs": "what processes do together",
    "watched": "the watchdog's two threads",
    "host": "a step on virtual devices, by the trainer and by hand",
}


def run_processes(task: str, folder: Path, *, processes: int, devices: int) -> list[dict[str, Any]]:
    """Run this script in several processes; each writes its answer into the folder."""
    from jaxtrainer.launch import Processes

    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, BEGAN: repr(time.time()), "BENCHMARK_OUT": str(folder)}
    command = ["-m", "benchmarks.processes", "--child", task]
    started = Processes(command, num=processes, devices=devices, env=env).start()
    if started.wait(300.0):
        raise RuntimeError(f"{task} failed in {processes} processes")
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def timed(job: Callable[[], Any], count: int) -> float:
    """Return the median seconds of a job."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def costs() -> dict[str, float]:
    """Return milliseconds of each thing that processes do together; called in each of them."""
    from jaxtrainer import distributed
    from jaxtrainer.agreement import Agreement
    from jaxtrainer.table import CoordinatedTable

    joined_s = time.time() - float(os.environ[BEGAN])
    table = CoordinatedTable(10_000)
    text = "x" * 300

    def one_round() -> None:
        table.put(distributed.index(), text)
        table.rows()

    agreement = Agreement()
    ticks = 100_000
    began = time.perf_counter()
    for _ in range(ticks):
        agreement.tick()
    tick_s = (time.perf_counter() - began) / ticks
    agreement.close()
    return {
        "joined s": joined_s,
        "barrier ms": 1e3 * timed(lambda: distributed.barrier("benchmark"), 50),
        "gather ms": 1e3 * timed(lambda: distributed.gather(1, "benchmark"), 50),
        "broadcast ms": 1e3 * timed(lambda: distributed.broadcast(1, "benchmark"), 50),
        "table ms": 1e3 * timed(one_round, 50),
        "tick us": 1e6 * tick_s,
    }


def watched() -> dict[str, float]:
    """Return a step's microseconds with and without the watchdog, in turns within one run."""
    from jaxtrainer import peers

    seconds: dict[str, list[float]] = {"with": [], "without": []}
    start = peers.Peers.start
    for _ in range(9):
        for name in seconds:
            peers.Peers.start = start if name == "with" else _start_nothing(start)
            seconds[name].append(_train(1024))
    peers.Peers.start = start
    shares = [_train(2048, share=True) for _ in range(3)]
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "with us/step": 1e6 * median(seconds["with"]),
        "without us/step": 1e6 * median(seconds["without"]),
        "with / without": median(ratios),
        "share of a core": median(shares),
    }


def _start_nothing(start: Any) -> Any:
    import threading

    class Idle:
        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None: ...

        def is_alive(self) -> bool:
            return False

        def join(self, timeout: float | None = None) -> None: ...

    def start_without_threads(self: Any) -> None:
        real, threading.Thread = threading.Thread, Idle  # pyright: ignore[reportAttributeAccessIssue]
        try:
            start(self)
        finally:
            threading.Thread = real

    return start_without_threads


def _train(steps: int, *, share: bool = False) -> float:
    """Return the seconds of a step, or which share of a core the watchdog uses meanwhile."""
    from benchmarks import processes_child

    half = processes_child.train(steps)
    return half.cpu_s / half.seconds if share else half.seconds / steps


def host() -> dict[str, float]:
    """Return what the trainer adds to a step, A B C A B C ..., in this process on its devices."""
    from benchmarks import processes_child as child
    from jaxtrainer import distributed

    # Between processes that share few cores a step takes far longer.
    steps, rounds = 512 if distributed.count() == 1 else 64, 3
    single, fused, hand, limit = [], [], [], []
    for _ in range(rounds):
        single.append(child.train(steps))
        fused.append(child.train(steps, "auto"))
        hand.append(child.by_hand(steps))
        limit.append(child.by_hand(steps, is_resident=True))
    found = {
        "devices": float(child.num_devices()),
        "limit us": 1e6 * median(limit),
        "by hand us": 1e6 * median(hand),
    }
    for name, halves in (("K=1", single), ("auto", fused)):
        each = [half.seconds / steps for half in halves]
        pairs = list(zip(each, hand, strict=True))
        found |= {
            f"{name} us": 1e6 * median(each),
            f"{name} added": 1e6 * median(mine - other for mine, other in pairs),
            f"{name} / hand": median(mine / other for mine, other in pairs),
        }
    return found | {"auto: K": float(fused[-1].chosen)}


def main(argv: Sequence[str] | None = None) -> Report | None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=[*TITLES], help="these tables")
    args = parse(options, argv, rounds=3, short=1)
    if args.child:
        from jaxtrainer import distributed

        answer = {"costs": costs, "watched": watched, "host": host}[args.child]()
        path = Path(os.environ["BENCHMARK_OUT"]) / f"{distributed.index()}.json"
        path.write_text(json.dumps(answer))
        return None
    report = Report(name="processes", as_json=args.json)
    for task in args.only or TITLES:
        rows = []
        for processes, devices in _settings(args.short)[task]:
            with tempfile.TemporaryDirectory() as folder:
                answers = run_processes(task, Path(folder), processes=processes, devices=devices)
            slowest = {key: max(answer[key] for answer in answers) for key in answers[0]}
            rows.append({"processes": processes, **slowest})
        report.add(TITLES[task], rows)
    report.finish()
    return report


def _settings(short: bool) -> dict[str, list[tuple[int, int]]]:
    """Return processes and devices of each, for each task."""
    return {
        "costs": [(2, 1)] if short else [(2, 1), (4, 1)],
        "watched": [(2, 1)],
        "host": [(1, 2), (2, 1)] if short else [*((1, n) for n in (1, 2, 4, 8)), (2, 4), (4, 2)],
    }


if __name__ == "__main__":
    main()
