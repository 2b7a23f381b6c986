"""`docs/launch.md` and `docs/scale.md`: what can be held of them without a cluster."""

from __future__ import annotations

import importlib.util
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
    command = [sys.executable, "train.py"]
    said = [
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
        for _ in range(2)
    ]
    assert len(list((tmp_path / "runs/example").glob("step_*"))) == 1
    assert "Error" not in "".join(said)
