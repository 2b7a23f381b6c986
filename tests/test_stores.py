"""Checkpoints in `s3://` and `gs://`, against servers that speak as Amazon's and Google's do.

Needs the group `stores`; run with `make test-stores`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import run_cluster

pytestmark = pytest.mark.stores

ROOT = Path(__file__).parents[1]
S3 = "from moto.server import ThreadedMotoServer as S; s = S(port={port}); s.start(); {wait}"
GS = """
from gcp_storage_emulator.server import create_server
s = create_server("localhost", {port}, in_memory=True, default_bucket="bucket"); s.start(); {wait}
"""
WAIT = "__import__('threading').Event().wait()"
MAKE_BUCKET = "import s3fs; s3fs.S3FileSystem().mkdir('bucket')"


def settings(scheme: str, port: int) -> dict[str, str]:
    """The variables of a process that talks to the server on a port."""
    url = f"http://localhost:{port}"
    s3 = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }
    # The kind of bucket is asked for by gRPC, which the emulator does not speak.
    gs = {"STORAGE_EMULATOR_HOST": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", **(s3 if scheme == "s3" else gs)}


class Bucket:
    """A bucket of a server, and runs in it."""

    def __init__(self, scheme: str, port: int) -> None:
        self.environment = settings(scheme, port)
        self.url = f"{scheme}://bucket/run{time.monotonic_ns()}"

    def start(self, command: str, *args: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "tests.store_program", command, *args]
        return subprocess.run(
            arguments,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def tell(self, command: str, *args: str) -> str:
        """Return the last line of a process that must end well."""
        done = self.start(command, *args)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.splitlines()[-1]

    def names(self) -> list[str]:
        return json.loads(self.tell("names", self.url))


def wait_for(port: int) -> None:
    """Return when a server listens there."""
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no server at port {port}")


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    code = (S3 if request.param == "s3" else GS).format(port=port, wait=WAIT)
    nowhere = subprocess.DEVNULL
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=nowhere, stderr=nowhere) as process:
        wait_for(port)
        if request.param == "s3":
            environment = settings("s3", port)
            subprocess.run([sys.executable, "-c", MAKE_BUCKET], env=environment, check=True)
        yield request.param, port
        process.kill()


@pytest.fixture
def bucket(server: tuple[str, int]) -> Bucket:
    return Bucket(*server)


@pytest.fixture(scope="module")
def undisturbed(server: tuple[str, int], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest after three epochs of a run on the disk."""
    return Bucket(*server).tell("fit", str(tmp_path_factory.mktemp("run")), "3", "")


def test_run_killed_in_a_save_goes_on_to_the_same_bits(bucket: Bucket, undisturbed: str):
    killed = bucket.start("fit", bucket.url, "3", "", "16")
    assert killed.returncode == -signal.SIGKILL
    assert bucket.names() == [".lock", ".unfinished_step_16", "step_16", "step_8"]
    assert bucket.tell("fit", bucket.url, "3", "last") == undisturbed
    # The best is the last one: the loss of this model falls.
    assert bucket.names() == ["step_24"]


@pytest.mark.parametrize("which", ["last", "best"])
def test_run_in_a_store_goes_on_to_the_same_bits(bucket: Bucket, undisturbed: str, which: str):
    bucket.tell("fit", bucket.url, "2", "")
    assert bucket.names() == ["step_16"]
    assert bucket.tell("fit", bucket.url, "3", which) == undisturbed


def test_damaged_array_in_a_store_is_named(bucket: Bucket):
    bucket.tell("fit", bucket.url, "1", "")
    bucket.tell("damage", f"{bucket.url}/step_8")
    refused = bucket.start("fit", bucket.url, "2", f"{bucket.url}/step_8")
    assert f"CheckpointCorruptError: reading {bucket.url}/step_8 failed: " in refused.stderr
    assert "/step_8/params/" in refused.stderr


def test_bucket_that_does_not_exist_is_refused(bucket: Bucket):
    refused = bucket.start("fit", bucket.url.replace("bucket", "none"), "1", "")
    assert "RunDirError: " in refused.stderr
    assert "://none/run" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_processes_save_together_and_one_goes_on(bucket: Bucket, mesh: str, tmp_path: Path):
    def play(*args: object, processes: int = 2) -> Any:
        names = ("AWS_", "STORAGE_", "GCSFS_")
        env = {k: v for k, v in bucket.environment.items() if k.startswith(names)}
        devices = 8 // processes
        shape: Any = {"processes": processes, "devices": devices, "env": env}
        return run_cluster("tests.endings_program", "saves", *args, **shape)

    play(bucket.url, 1, mesh)
    assert bucket.names() == ["step_4"]
    alone = play(bucket.url, 2, mesh, bucket.url, processes=1)
    assert alone.same("resumed") == 4
    assert bucket.names() == ["step_4", "step_8"]
    assert alone.same("params") == play(tmp_path / "run", 2, mesh).same("params")
