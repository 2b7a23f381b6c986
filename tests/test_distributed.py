"""How a process learns of the others: what is detected, and what cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxtrainer import cli, distributed
from jaxtrainer.errors import ConfigError
from jaxtrainer.launch import Processes, free_port

SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2"}
LAUNCHED = dict(zip(("ADDRESS", "COUNT", "INDEX"), ("host:1", "2", "1"), strict=True))
OF_A_CLUSTER = ("SLURM_", "OMPI_", "TPU_", "JOB_COMPLETION_INDEX")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(OF_A_CLUSTER):
            monkeypatch.delenv(name)


def set_env(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(getattr(distributed, name, name), value)


@pytest.mark.parametrize(
    ("env", "name", "method"),
    [
        (SLURM, "slurm", "slurm"),
        (OPEN_MPI, "open mpi", "mpi4py"),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, "open mpi", "ompi"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu", None),
        (LAUNCHED, "environment", "deactivate"),
        ({**LAUNCHED, **SLURM}, "environment", "deactivate"),
    ],
)
def test_cluster_is_detected(monkeypatch: pytest.MonkeyPatch, env: Any, name: str, method: Any):
    set_env(monkeypatch, env)
    found = distributed.detect()
    assert found is not None
    assert (found.name, found.method) == (name, method)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {**SLURM, "SLURM_NTASKS": "1"},
        # A batch script, before `srun`, is one process.
        {"SLURM_NTASKS": "4"},
        {**SLURM, "COUNT": "1"},
    ],
)
def test_one_process_is_no_cluster(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]):
    set_env(monkeypatch, env)
    assert distributed.detect() is None


def test_index_of_a_kubernetes_job_completes_what_is_given(monkeypatch: pytest.MonkeyPatch):
    env = {"ADDRESS": "job-0.job:1234", "COUNT": "4", "JOB_COMPLETION_INDEX": "3"}
    set_env(monkeypatch, env)
    found = distributed.detect()
    assert found is not None
    assert found.values["process_id"] == 3


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((None, 2), "lacks coordinator_address"),
        (("host:1", 2), "lacks process_id (JAX_PROCESS_ID)"),
        (("host:1", 2, 2), "counted from 0 to 1"),
        (("host", 2, 0), "no `host:port`"),
        (("host:1", "2", 0), "num_processes='2' is no integer"),
        ((), "found neither `jaxtrainer launch` nor SLURM"),
        (("host:1", 2, 0), "comes too late"),
    ],
)
def test_values_that_cannot_work_are_refused(given: Any, text: str):
    jax.devices()  # so that it is too late for all of them
    with pytest.raises(ConfigError) as caught:
        distributed.initialize(*given)
    assert text in str(caught.value)


def test_number_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch):
    set_env(monkeypatch, {**LAUNCHED, "COUNT": "two"})
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES='two'"):
        distributed.detect()


def test_one_process_agrees_with_itself():
    distributed.barrier("alone")
    assert distributed.gather({"rows": 3}, "alone") == [{"rows": 3}]
    assert distributed.broadcast("value", "alone") == "value"
    assert (distributed.count(), distributed.index(), distributed.is_first()) == (1, 0, True)


def test_devices_of_launched_processes_are_their_own():
    gpus = Processes(["train.py"], num=2, gpus=2, env={})
    assert gpus._environment(1)["JAX_LOCAL_DEVICE_IDS"] == "2,3"
    flags = "--xla_force_host_platform_device_count=8 --xla_other"
    cpus = Processes(["train.py"], num=2, devices=4, hosts=2, host=1, env={"XLA_FLAGS": flags})
    env = cpus._environment(0)
    assert (env["JAX_NUM_CPU_DEVICES"], env["XLA_FLAGS"]) == ("4", "--xla_other")
    assert (env[distributed.COUNT], env[distributed.INDEX]) == ("4", "2")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--processes", "0", "a.py"], "1 or more"),
        (["--processes", "2"], "what is to be run?"),
        (["--processes", "2", "--hosts", "2", "a.py"], "--coordinator host0:12345"),
        (["--processes", "2", "--hosts", "2", "--host-index", "2", "a.py"], "from 0 to 1"),
    ],
)
def test_launch_that_cannot_work_is_refused(words: list[str], text: str, capsys: Any):
    assert cli.main(["launch", *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_launcher_ends_the_others_and_keeps_the_first_exit_code(tmp_path: Path, capfd: Any):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1':\n"
        "    print('going', file=sys.stderr, flush=True)\n"
        "    os._exit(7)\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    words = ["launch", "--processes", "2", "--devices-per-process", "1", "--grace", "1"]
    assert cli.main([*words, str(script)]) == 7
    assert time.monotonic() - began < 40
    err = capfd.readouterr().err
    assert "[1] going" in err
    assert "process 1 ended first, with exit code 7" in err


@pytest.mark.slow
@pytest.mark.parametrize(("index", "text"), [(0, "jaxtrainer: the"), (1, "TimeoutError: the")])
def test_processes_that_do_not_come_are_missed_in_words(index: int, text: str):
    call = f"initialize('127.0.0.1:{free_port()}', 2, {index}, initialization_timeout_s=2)"
    code = f"from jaxtrainer import distributed; distributed.{call}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode != 0
    assert f"{text} processes did not come together within 2 s" in ended.stderr
