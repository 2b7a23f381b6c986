"""All that is known of a run after the fact, from its result or from its directory.

What `plot` and `report` read. In a run directory that is `run.json`, the lines of a logger, which
has all of a run that was resumed or killed, and the checkpoints. May import levels 0 to 2.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jaxtrainer.errors import CheckpointError, RunDirError
from jaxtrainer.manifest import unseal
from jaxtrainer.record import decode, encode
from jaxtrainer.remote import RemotePath, refuse_url
from jaxtrainer.run import History, Series
from jaxtrainer.rundir import saved_steps, step_of, step_path

RUN_FILE = "run.json"
LINES_FILE = "metrics.jsonl"
CSV_FILES = {"step": "steps.csv", "epoch": "epochs.csv"}
SETTINGS_FILE = "hyperparameters.json"
_AXES = {"kind", "step", "epoch", "samples", "elapsed_s", "unix_time_s"}
"""Columns of a logger's rows that are no series."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint on the disk.

    Attributes:
        step: Optimiser step.
        score: Value of the monitored series, if there is one.
        size_bytes: Of all its files; None in an object store.
        path: Its directory.
    """

    step: int
    score: float | None = None
    size_bytes: int | None = None
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Account:
    """A run, as `run.json` has it.

    Attributes:
        name: What to call it.
        history: Every logged series.
        stop_reason: Empty for a run that is going on, or was killed.
        num_epochs: Epochs completed; None if not known.
        num_steps: Optimiser updates.
        num_samples: Samples trained on; None if not known.
        elapsed_s: Seconds, those before a resume included; None if not known.
        call_s: Seconds of the last call of `fit`, which the phases are of.
        timings: Seconds by phase.
        config: Options, hyper-parameters and callbacks.
        environment: Versions and machine.
        notices: What the run had to say.
        written_at: When this was written, local time.
        best_checkpoint: Directory of the best one.
        checkpoints: Those that are on the disk now; not in the file.
    """

    name: str = "run"
    history: History = field(default_factory=History)
    stop_reason: str = ""
    num_epochs: int | None = None
    num_steps: int = 0
    num_samples: int | None = None
    elapsed_s: float | None = None
    call_s: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    notices: Sequence[str] = ()
    written_at: str = ""
    best_checkpoint: str | None = None
    checkpoints: Sequence[Saved] = ()


def write_account(directory: str | os.PathLike[str], account: Account) -> Path:
    """Write `run.json` into a directory, in one piece, and return its path."""
    content = {entry.name: getattr(account, entry.name) for entry in fields(account)}
    del content["checkpoints"]
    text = json.dumps(encode({**content, "history": asdict(account.history)}), allow_nan=False)
    return write_whole(Path(directory) / RUN_FILE, text)


def write_whole(path: Path, text: str) -> Path:
    """Write a file so that at every instant the old one or all of the new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


def read_account(path: str | os.PathLike[str]) -> Account:
    """Return the account of the run in a directory.

    Args:
        path: A run directory, or one of its `step_N` directories.

    Raises:
        RunDirError: If nothing there has the curves of a run, or its files are damaged.
    """
    refuse_url("report and plot", path)
    folder = Path(path)
    if step_of(folder.resolve().name) is not None:
        folder = folder.resolve().parent
    record, lines = read_record(folder / RUN_FILE), _rows(folder)
    if record is None and lines is None:
        raise RunDirError(_missing(folder))
    content = _completed(record or {}, lines) if lines else record
    content = {"name": folder.resolve().name, **(content or {})}
    return Account(**{**content, "checkpoints": tuple(saved_in(folder))})


def joined(earlier: History, later: History) -> History:
    """Return the points of the later history, and those of the earlier one before them."""
    steps = [
        s for table in (later.step, later.epoch) for line in table.values() for s in line.steps
    ]
    whole = earlier.until(min(steps) - 1) if steps else earlier.until(2**62)
    for kind, table in (("step", later.step), ("epoch", later.epoch)):
        for name, line in table.items():
            for step, epoch, value in zip(line.steps, line.epochs, line.values, strict=True):
                whole.add(kind, {name: value}, step=step, epoch=epoch)
    return whole


def saved_in(directory: Path) -> list[Saved]:
    """Return the checkpoints in a run directory, by step; of a store that is away none."""
    try:
        steps = saved_steps(directory)
        scores = _scores(directory, steps)
        return [
            Saved(step=step, score=scores.get(step), size_bytes=_size(path), path=str(path))
            for step, path in ((step, step_path(directory, step)) for step in steps)
        ]
    except (CheckpointError, OSError):
        return []


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no directory; pass the directory of a run."
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    return (
        f"{folder} has no {RUN_FILE} and no {LINES_FILE}, but {there}. A run leaves its record "
        f"with `Trainer(callbacks=[Report({str(folder)!r})])`; a run of this process needs none "
        "for `result.report('report.html')` and `result.plot('curves.png')`."
    )


def _completed(record: dict[str, Any], lines: dict[str, Any]) -> dict[str, Any]:
    if lines["num_steps"] > record.get("num_steps", -1):
        # The record is that of an earlier call, or the run goes on.
        return {**record, "num_epochs": None, "elapsed_s": None, "stop_reason": "", **lines}
    return {**lines, **record, "history": lines["history"]}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunDirError(
            f"{file} cannot be read as the record of a run ({type(error).__name__}: {error}); "
            "pass the directory of a run, or move the damaged file away."
        ) from error


def read_record(file: Path) -> dict[str, Any] | None:
    """Return the content of a `run.json`, its history as such; None if there is none.

    Raises:
        RunDirError: If it is damaged.
    """
    if not file.is_file():
        return None
    with _reading(file):
        record = decode(json.loads(file.read_text(encoding="utf-8")))
        tables = {
            kind: {name: Series(**series) for name, series in record["history"][kind].items()}
            for kind in ("step", "epoch")
        }
        known = {entry.name for entry in fields(Account)}
        return {**{k: v for k, v in record.items() if k in known}, "history": History(**tables)}


def _rows(folder: Path) -> dict[str, Any] | None:
    lines = folder / LINES_FILE
    if lines.is_file():
        with _reading(lines):
            return _from_rows(_json_rows(lines.read_text(encoding="utf-8")))
    tables = {kind: folder / name for kind, name in CSV_FILES.items() if (folder / name).is_file()}
    if not tables:
        return None
    with _reading(folder):
        given = folder / SETTINGS_FILE
        settings = json.loads(given.read_text(encoding="utf-8")) if given.is_file() else {}
        rows = _from_rows(
            {"kind": kind, **row}
            for kind, file in tables.items()
            for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())
        )
        return {**rows, "config": settings}


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
    lines = text.splitlines()
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except ValueError:
            # The last line of a run that was killed, or is writing now.
            if number < len(lines) - 1:
                raise


def _from_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    history = History()
    found: dict[str, Any] = {"num_steps": 0}
    for row in rows:
        kind, step = row["kind"], int(row["step"])
        if kind in ("step", "epoch"):
            values = {k: float(v) for k, v in row.items() if k not in _AXES and v not in ("", None)}
            history.add(kind, values, step=step, epoch=int(row["epoch"]))
        elif kind == "hyperparameters":
            found["config"] = row["values"]
        found["stop_reason"] = row["reason"] if kind == "end" else ""
        found["num_steps"] = max(step, found["num_steps"])
        for name, number in (("num_samples", "samples"), ("elapsed_s", "elapsed_s")):
            found[name] = max(float(row.get(number) or 0), found.get(name, 0.0))
    samples = {"num_samples": int(found["num_samples"])} if "num_samples" in found else {}
    return {**found, **samples, "history": history}


def _scores(directory: Path, steps: Sequence[int]) -> dict[int, float]:
    """Return the scores that the newest readable record has, by step."""
    for step in reversed(steps):
        try:
            callbacks = decode(unseal(step_path(directory, step) / "record" / "metadata"))[
                "callbacks"
            ]
            scores = callbacks.get(f"Checkpoint[{directory.name}]", {}).get("scores", {})
            return {int(at): float(score) for at, score in scores.items()}
        except (CheckpointError, KeyError, AttributeError, ValueError):
            continue
    return {}


def _size(path: Path) -> int | None:
    if isinstance(path, RemotePath):
        return None
    files = ((folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(os.path.getsize(os.path.join(*file)) for file in files)
