"""What `docs/launch.md` and `docs/scale.md` tell to write: parser and signatures take it."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from jaxtrainer import Trainer, cli, distributed, launch
from jaxtrainer.accelerators import ACCELERATORS
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.plan import Plan

DOCS = Path(__file__).parents[1] / "docs"
TEXTS = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("launch", "scale")}
BOTH = "\n".join(TEXTS.values())
TAKEN: list[Any] = [Trainer, Trainer.plan, Checkpoint, distributed.initialize]
"""What the pages speak of with arguments."""

CALLED: dict[str, Any] = {
    "Trainer": Trainer,
    "trainer.plan": Trainer.plan,
    "Checkpoint": Checkpoint,
    "distributed.initialize": distributed.initialize,
    "jax.distributed.initialize": jax.distributed.initialize,
}
SHELL = {"SKYPILOT_NUM_NODES": "4", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
"""Values of variables in the scripts that are not 1."""


def commands(text: str) -> list[list[str]]:
    """The words of every `jaxtrainer launch` in a block of a page, variables filled in."""
    blocks = "\n".join(re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = re.sub(r"\\\n\s*", " ", blocks).splitlines()
    found = [line for line in map(str.strip, lines) if line.startswith("jaxtrainer ")]
    filled = [re.sub(r"\$(\w+)", lambda m: SHELL.get(m[1], "1"), line) for line in found]
    return [shlex.split(line)[1:] for line in filled]


def parse(words: list[str]) -> Any:
    """As `jaxtrainer` does, without running anything."""
    args = cli._parser().parse_args(words)
    launch._check(args)
    return args


def test_every_command_line_of_the_pages_is_taken(in_tmp_path: Path):
    (in_tmp_path / "train.py").touch()
    lines = commands(BOTH)
    for words in lines:
        assert parse(words).program == ["train.py"]
    assert [words[0] for words in lines] == ["launch"] * 4


@pytest.mark.parametrize("old", ["--processes", "--host-index", "--devices-per-process"])
def test_command_line_with_another_flag_is_found(old: str):
    wrong = f"{old}s"
    lines = commands(BOTH.replace(f"{old} ", f"{wrong} "))
    words = next(words for words in lines if wrong in words)
    with pytest.raises(SystemExit):
        parse(words)


def test_subcommands_that_the_text_names_exist():
    known = cli._parser().format_help()
    for name in {*re.findall(r"`jaxtrainer (\w+)", BOTH)}:
        assert re.search(rf"^\s+{name}\s", known, re.MULTILINE), name


def test_variables_that_say_the_cluster_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch):
    told = TEXTS["launch"].split("## The program")[0]
    assert {*re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", told)} == {
        *(distributed.ADDRESS, distributed.COUNT, distributed.INDEX)
    }
    for name in [name for name in os.environ if name.startswith(("JAX_", "SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    values = {"ADDRESS": "node0:12345", "COUNT": "4", "INDEX": "3"}
    for name, value in values.items():
        monkeypatch.setenv(getattr(distributed, name), value)
    cluster = distributed.detect()
    assert cluster is not None
    assert [*cluster.values.values()] == ["node0:12345", 4, 3]


def test_pod_of_the_jobset_finds_the_others(monkeypatch: pytest.MonkeyPatch):
    [text] = re.findall(r"^```yaml jobset.yaml\n(.*?)^```", BOTH, re.DOTALL | re.MULTILINE)
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    for entry in container["env"]:
        monkeypatch.setenv(entry["name"], entry["value"])
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    cluster = distributed.detect()
    assert cluster is not None
    assert [*cluster.values.values()] == ["train-workers-0-0.train:12345", 4, 2]


def test_variable_that_says_the_devices_of_a_process_is_one_of_jax():
    assert "JAX_LOCAL_DEVICE_IDS" in TEXTS["launch"]
    module = inspect.getsourcefile(jax.distributed.initialize)
    assert "JAX_LOCAL_DEVICE_IDS" in Path(str(module)).read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """The pieces of code in a text, blocks left out."""
    return re.findall(
        r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )


def keywords(span: str) -> dict[str, ast.expr]:
    """The arguments of `name=value, name=value`; none if it is something else."""
    try:
        call = ast.parse(f"f({span})", mode="eval").body
    except SyntaxError:
        return {}
    assert isinstance(call, ast.Call)
    return {k.arg: k.value for k in call.keywords if k.arg}


def check(span: str) -> None:
    """Raise AssertionError where an option, or an argument of a call, is none that is taken."""
    names = {name for each in TAKEN for name in inspect.signature(each).parameters}
    assert {*keywords(span)} <= names, span
    for node in ast.walk(ast.parse(span, mode="eval")) if span.endswith(")") else ():
        if isinstance(node, ast.Call) and (called := CALLED.get(ast.unparse(node.func))):
            taken = inspect.signature(called).parameters
            assert {k.arg for k in node.keywords} <= {*taken}, span
    if re.fullmatch(r"[a-z]+(_[a-z]+)+", span):
        assert span in names, span


def is_python(span: str) -> bool:
    try:
        ast.parse(span, mode="eval")
    except SyntaxError:
        return bool(keywords(span))
    return True


def test_options_that_the_pages_name_exist():
    written = [span for span in spans(BOTH) if is_python(span)]
    assert sum(bool(keywords(span)) for span in written) > 10
    for span in written:
        check(span)


@pytest.mark.parametrize(
    "span",
    ['meshes={"data": -1}', "Trainer(data_time=...)", "save_top", "distributed.initialize(a_s=1)"],
)
def test_options_that_do_not_exist_are_found(span: str):
    with pytest.raises(AssertionError):
        check(span)


def test_trainer_takes_the_options_of_the_pages():
    options = [keywords(span) for span in spans(TEXTS["scale"]) if keywords(span)]
    mine = [given for given in options if {*given} <= {*inspect.signature(Trainer).parameters}]
    assert len(mine) > 8
    for given in mine:
        values = {
            name: eval(ast.unparse(value), {"PartitionSpec": jax.P})
            for name, value in given.items()
        }
        if values.get("mesh") != "auto":
            Trainer(max_epochs=1, enable_progress_bar=False, **values)


def test_what_a_plan_has_is_there():
    named = {name for name in re.findall(r"`plan\.(\w+)`", BOTH)}
    assert named == {"candidates", "reason", "traffic"}
    assert all(name in Plan.__dataclass_fields__ or hasattr(Plan, name) for name in named)
    [chosen] = re.findall(r'ACCELERATORS\["([\w-]+)"\]', BOTH)
    assert chosen in ACCELERATORS
