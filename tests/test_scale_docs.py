"""`docs/launch.md` and `docs/scale.md`: what can be held of them without a cluster."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxtrainer.accelerators import ACCELERATORS

DOCS = Path(__file__).parents[1] / "docs"
LAUNCH = (DOCS / "launch.md").read_text(encoding="utf-8")
SCALE = (DOCS / "scale.md").read_text(encoding="utf-8")
FILES = {
    name: text
    for name, text in re.findall(r"^```\w+ (\S+\.\w+)\n(.*?)^```", LAUNCH, re.DOTALL | re.MULTILINE)
}
SHELL = [name for name in FILES if name.endswith((".sh", ".slurm"))]


def load(name: str) -> Any:
    return yaml.safe_load(FILES[name])


def test_every_launch_is_there():
    assert {*FILES} == {
        *("train.py", "local.sh", "hosts.sh", "train.slurm", "jobset.yaml"),
        *("sky.yaml", "ray_train.py", "tpu.sh"),
    }


@pytest.mark.parametrize("name", SHELL)
def test_shell_script_parses(name: str):
    done = subprocess.run(["bash", "-n"], input=FILES[name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_in_yaml_parse():
    for script in (load("sky.yaml")["run"], load("sky.yaml")["setup"]):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("code", [0, 1, 75, 143])
@pytest.mark.parametrize("restarts", [0, 50])
def test_slurm_job_asks_for_the_queue_after_what_a_restart_may_mend(
    code: int, restarts: int, tmp_path: Path
):
    for name, body in (("srun", f"exit {code}"), ("scontrol", 'echo "asked: $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "12",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(
        ["bash"], input=FILES["train.slurm"], env=env, capture_output=True, text=True
    )
    asked = "asked: requeue 12" in done.stdout
    assert (done.returncode, asked) == (code, code in (75, 143) and restarts < 50)


def test_jobset_says_what_the_text_does():
    spec = load("jobset.yaml")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    # Its names: <JobSet>-<job>-<replica>-<pod>.<JobSet>.
    assert env["JAX_COORDINATOR_ADDRESS"] == "train-workers-0-0.train:12345"
    assert int(env["JAX_NUM_PROCESSES"]) == job["completions"] == job["parallelism"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    # What Kubernetes asks for beside such a policy.
    assert pod["restartPolicy"] == "Never"
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("name", ["train.py", "ray_train.py"])
def test_program_compiles(name: str):
    compile(FILES[name], name, "exec")


@pytest.mark.slow
def test_program_goes_on_from_its_last_checkpoint(tmp_path: Path):
    (tmp_path / "train.py").write_text(FILES["train.py"], encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(DOCS.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    saved = []
    for _ in range(2):
        command = [sys.executable, "train.py"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        saved.append([path.name for path in (tmp_path / "runs/example").glob("step_*")])
        # More to do, for the second time.
        program = FILES["train.py"].replace("max_epochs=10", "max_epochs=12")
        (tmp_path / "train.py").write_text(program, encoding="utf-8")
    assert saved == [["step_80"], ["step_96"]]


def table_row(first: str) -> list[str]:
    [line] = [line for line in SCALE.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_every_accelerator_is_in_the_table_with_its_figures():
    for name, one in ACCELERATORS.items():
        bf16, tf32 = one.peak.bf16, one.peak.of("tf32")
        assert bf16 is not None
        assert tf32 is not None
        assert table_row(f"`{name}`")[1:] == [
            f"{bf16 / 1e12:g}",
            f"{tf32 / 1e12:g}",
            f"{one.memory_bytes / 1e9:.4g}",
            f"{one.memory_bytes_per_s / 1e9:,.0f}",
            f"{one.link_bytes_per_s / 1e9:g} x {one.devices_per_node:,}",
            f"{one.network_bytes_per_s / 1e9:g}",
        ]


@pytest.mark.parametrize("devices", [1000, 10_000])
def test_failures_and_their_cost_are_what_the_rates_say(devices: int):
    a_day = 419 / 54 / 16_384 * devices
    between_s, save_s, restart_s = 86_400 / a_day, 2.0, 300.0
    every_s = math.sqrt(2 * save_s * between_s)
    costs = save_s / every_s, every_s / 2 / between_s, restart_s / between_s
    shown = [a_day, between_s / 3600, every_s, *(100 * cost for cost in (*costs, sum(costs)))]
    cells = [float(cell.rstrip(" hs%")) for cell in table_row(f"{devices:,}")[1:]]
    # As rounded in the table, to two digits at least.
    assert cells == pytest.approx(shown, rel=0.03)


def test_arithmetic_of_the_text_is_right():
    state = 70e9 * 12
    figures = {
        "840 GB": state / 1e9,
        "13 TB": state * (1000 // 64 + 1) / 1e12,
        "131 TB": state * (10_000 // 64) / 1e12,
        "66 s": state * (10_000 // 64) / 2e12,
        "3.1 GB/s": state / 270 / 1e9,
        "31 GB/s": state / 27 / 1e9,
        "82 million": 10_000 * 8192 / 1e6,
        "9.5 %": 100 * (1 - (1 - 1e-5) ** 10_000),
        "2.8 TB": 16 * 175e9 / 1e12,
    }
    for text, value in figures.items():
        assert text in SCALE
        assert float(text.split()[0]) == pytest.approx(value, rel=0.04)
