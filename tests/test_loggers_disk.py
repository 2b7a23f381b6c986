"""Loggers on a disk that is full in earnest, and one that sleeps: the run goes on to its end."""

from __future__ import annotations

import json
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer.errors import LoggerWarning
from jaxtrainer.loggers import CSVLogger, JSONLinesLogger, Logger, TensorBoardLogger, outbox
from jaxtrainer.loggers.logger import Call
from jaxtrainer.loggers.outbox import Outbox
from jaxtrainer.records import Axes, Record, Scalars
from tests import tiny
from tests.test_save_errors import mount

FILES = {CSVLogger: "steps.csv", JSONLinesLogger: "metrics.jsonl"}
LIMIT = 700
"""Bytes; no line ends there."""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB with room for one more page of memory, 4 KiB, in each of two files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    (folder / "ballast").write_bytes(bytes(2**20 - 2 * 4096))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def short_files() -> Iterator[None]:
    """Files of this process can have no more than `LIMIT` bytes; the kernel refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def whole_lines(file: Path) -> list[str]:
    content = file.read_bytes()
    assert content.endswith(b"\n")
    lines = content.decode().splitlines()
    if file.suffix == ".jsonl":
        assert all(json.loads(line)["kind"] for line in lines)
        return lines
    assert {line.count(",") for line in lines} == {lines[0].count(",")}
    return lines[1:]


@pytest.mark.usefixtures("short_files")
@pytest.mark.parametrize("kind", FILES)
def test_write_that_the_kernel_cuts_short_leaves_whole_lines(kind: Any, tmp_path: Path):
    box = Outbox(kind("logs"))
    box.begin(tmp_path, Call(stage="fit"))
    for step in range(40):
        axes = Axes(step=step, epoch=0, samples=8 * step, elapsed_s=0.5 * step)
        box.put(Scalars(axes=axes, kind="step", values={"loss": 1.0 / (step + 1)}))
    box.end()
    box.join(20.0)
    told = box.news()
    lines = whole_lines(tmp_path / "logs" / FILES[kind])
    assert 0 < len(lines) == box.written < 40
    assert box.written + box.dropped == 40
    assert ["is tried again" in told[0], "is left out" in told[1]] == [True, True]
    assert "File too large" in told[0]


DISK_LOGGERS = [
    pytest.param(CSVLogger, marks=pytest.mark.slow),
    pytest.param(JSONLinesLogger, marks=pytest.mark.slow),
    pytest.param(TensorBoardLogger, marks=pytest.mark.loggers),
]


@pytest.mark.parametrize("kind", DISK_LOGGERS)
def test_run_whose_disk_is_full_goes_on_without_the_logger(kind: Any, full_disk: Path):
    logger = kind(full_disk / "logs")
    module = tiny.Tiny(tiny.line)
    with pytest.warns(LoggerWarning, match="No space left on device"):
        result, _ = tiny.fit(module=module, logger=logger, max_epochs=25, log_every_n_steps=1)
    assert (result.num_steps, result.stop_reason) == (200, "max_epochs")
    assert module.run is not None
    assert any(f"{kind.__name__} is left out" in notice for notice in module.run.notices)
    if kind in FILES:
        assert 0 < len(whole_lines(full_disk / "logs" / FILES[kind])) < 200


class Sleeps(Logger):
    """Takes a minute for its first record."""

    def __init__(self) -> None:
        self.is_awake = threading.Event()

    def write(self, record: Record) -> None:
        time.sleep(60.0)
        self.is_awake.set()


@pytest.mark.slow
def test_run_ends_while_its_logger_still_sleeps():
    logger, module = Sleeps(), tiny.Tiny(tiny.line)
    with pytest.warns(LoggerWarning, match="has not ended within"):
        result, _ = tiny.fit(module=module, logger=logger, max_epochs=2)
    assert result.num_steps == 16
    assert not logger.is_awake.is_set()
    assert module.run is not None
    assert any("Sleeps has not written" in notice for notice in module.run.notices)
