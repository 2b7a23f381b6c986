"""The doctor: what it finds, what it says to do, and its exit code."""

from __future__ import annotations

import io
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from rich.console import Console

from jaxtrainer import doctor
from jaxtrainer.commands import add_parsers
from jaxtrainer.doctor import Finding, check_pair, check_variables, examine, judge_version, show
from tests.commands import call

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_doctor_of_this_machine_fails_nothing(tmp_path: Path):
    found = by_name(examine({}, tmp_path))
    assert not [f for f in found.values() if f.status == "fail"]
    assert {"versions", "devices", "computation", "compilation cache", "disk"} <= found.keys()
    assert found["devices"].text == "8 x cpu"
    assert f"jax {jax.__version__}" in found["versions"].text


def test_oldest_versions_are_those_of_the_package():
    dependencies = PROJECT["project"]["dependencies"]
    wanted: dict[str, str] = {}
    for line in dependencies:
        name, oldest = re.match(r"([\w-]+)>=([\d.]+)", line).groups()  # pyright: ignore
        wanted.setdefault(name, oldest)
    assert {k: v for k, v in doctor.OLDEST.items() if k != "jaxlib"} == wanted


def test_old_library_fails_with_the_command():
    (found,) = judge_version("optax", "0.2.7", "0.2.8")
    assert found.status == "fail"
    assert found.advice == "`pip install --upgrade 'optax>=0.2.8'`"
    assert not [*judge_version("optax", "0.10.0", "0.2.8")]
    (missing,) = judge_version("optax", None, "0.2.8")
    assert missing.text == "not installed"


@pytest.mark.parametrize(
    ("versions", "count"),
    [
        (("0.10.2", "0.12.8"), 0),
        (("0.12.0", "0.12.8"), 1),
        (("0.12.0", "0.12.12"), 0),
        ((None, None), 0),
    ],
)
def test_pair_of_jax_and_flax_is_judged(versions: tuple[str | None, str | None], count: int):
    assert len([*check_pair(*versions)]) == count


def test_variables_that_hurt_are_named_with_the_remedy():
    environ = {"JAX_DISABLE_JIT": "1", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    found = [*check_variables({**environ, "JAX_DEBUG_NANS": "0"})]
    assert [f.status for f in found] == ["warn", "warn"]
    assert "unset JAX_DISABLE_JIT" in found[0].advice
    assert "unset XLA_FLAGS" in found[1].advice
    assert [f.status for f in check_variables({"JAX_PLATFORMS": "cpu"})] == ["note"]
    assert [f.status for f in check_variables({})] == ["ok"]


@pytest.mark.parametrize(
    ("environ", "advice"),
    [({}, r"pip install 'jaxtrainer\[cuda\]'"), ({"JAX_PLATFORMS": "cpu"}, "unset JAX_PLATFORMS")],
)
def test_gpu_that_jax_does_not_use_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], advice: str
):
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: True)
    (found,) = doctor.check_devices(environ)
    assert found.status == "warn"
    assert re.search(advice, found.advice)


def test_cache_that_cannot_be_written_is_a_warning(tmp_path: Path):
    (tmp_path / "file").touch()
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", f"{tmp_path}/file/xla")
    try:
        (found,) = doctor.check_cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (found.status, "XDG_CACHE_HOME" in found.advice) == ("warn", True)


def test_full_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    (found,) = doctor.check_disk(tmp_path)
    assert (found.status, found.text) == ("warn", f"0.0 GiB free in {tmp_path}")


def test_broken_library_is_a_line_and_the_other_checks_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, "jax", None)
    found = by_name(examine({}, tmp_path))
    assert found["devices"].status == found["computation"].status == "fail"
    assert found["disk"].status == "ok"


def test_missing_extra_has_its_command(monkeypatch: pytest.MonkeyPatch):
    lines = ["rich>=14", "nosuchpackage>=3; extra == 'plot'", "rich; extra == 'shiny'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: lines)
    found = by_name(doctor.check_extras())
    assert found["extra plot"].status == "note"
    assert found["extra plot"].advice == "if you want it: `pip install 'jaxtrainer[plot]'`"
    assert found["extra shiny"].status == "ok"


FINDINGS = [
    Finding(status="ok", name="disk", text="9 GiB free in " + "/long" * 20),
    Finding(status="warn", name="cache", text="cannot be written", advice="set XDG_CACHE_HOME"),
]


def printed(width: int, **options: Any) -> tuple[int, str]:
    file = io.StringIO()
    code = show(iter(FINDINGS), Console(file=file, width=width, highlight=False, **options))
    return code, file.getvalue()


def test_doctor_in_a_file_has_whole_lines_without_colour():
    code, text = printed(40)
    assert code == 0
    assert text.splitlines() == [
        "ok   disk: 9 GiB free in " + "/long" * 20,
        "warn cache: cannot be written",
        "     set XDG_CACHE_HOME",
        "ready to train, 1 to look at",
    ]


def test_doctor_on_a_terminal_wraps_beside_its_words():
    _, text = printed(60, force_terminal=True, color_system=None)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 60
    assert [line[:5] for line in lines if "/long" in line] == ["     ", "     "]


def test_doctor_with_a_failure_returns_1():
    file = io.StringIO()
    findings = iter([Finding(status="fail", name="jax", text="not installed", advice="`pip`")])
    assert show(findings, Console(file=file)) == 1
    assert "1 of these must be put right" in file.getvalue()


def test_command_devices_lists_each_and_the_meshes():
    code, out = call(add_parsers, "devices")
    assert code == 0
    assert out.splitlines()[0] == "cpu:0"
    assert out.splitlines()[-2:] == [
        'All 8 share each batch: Trainer(mesh={"data": 8}), the default.',
        'A model too large for one: kept in 8 parts by Trainer(mesh={"fsdp": 8}).',
    ]


def test_one_device_needs_no_mesh():
    assert doctor.suggested_meshes(1) == ["One device: leave `mesh` out of the `Trainer`."]


def test_device_is_described_with_memory_and_peak():
    device: Any = SimpleNamespace(
        platform="gpu",
        id=1,
        device_kind="NVIDIA H100 80GB HBM3",
        process_index=2,
        memory_stats=lambda: {"bytes_limit": 64 * 2**30, "bytes_in_use": 2**30},
    )
    assert doctor.describe_device(device) == (
        "gpu:1  NVIDIA H100 80GB HBM3  64.0 GiB, 1.0 GiB in use  990 TFLOP/s bfloat16  process 2"
    )
