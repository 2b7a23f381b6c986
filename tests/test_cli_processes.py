"""`jaxtrainer fit` in several processes, by the launcher, with loggers and checkpoints."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from jaxtrainer.rundir import saved_steps
from tests.cluster import run_cluster

DATA = "--data tests.cli_program:Data --data.batch_size 16"
QUIET = "--trainer.compilation_cache false --trainer.enable_progress_bar false"
WORDS = f"fit --module tests.cli_program:Keyed {DATA} --trainer.max_epochs 2 {QUIET}".split()


@pytest.mark.slow
def test_processes_fit_with_a_logger_from_the_command_line(tmp_path: Path):
    saver = ["--trainer.callbacks+", "Checkpoint", "--trainer.callbacks.dirpath"]
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.directory"]
    words = [*WORDS, *saver, tmp_path / "run", *logger, tmp_path / "logs"]
    outcome = run_cluster("jaxtrainer.cli", *words, devices=1)
    assert outcome.codes == [0, 0]
    assert outcome.out.count("fit: max_epochs") == 1
    assert [*saved_steps(tmp_path / "run")] == [4]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]
    with (tmp_path / "logs" / "epochs.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"]
