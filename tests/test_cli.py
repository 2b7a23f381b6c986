"""The command line of the trainer: typed, saved, repeated, and refused in one line."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxtrainer import cli, read_predictions
from jaxtrainer.checkpoint import read_arrays, read_record
from jaxtrainer.commandline.imports import is_allowed, typed
from jaxtrainer.commandline.loaders import arguments_of
from jaxtrainer.commandline.saved import SavedConfiguration
from jaxtrainer.errors import ConfigError
from jaxtrainer.settings import settings_of
from tests import tiny
from tests.cli_program import Data, Keyed, Mark

MODULE = "--module tests.cli_program:Keyed"
DATA = "--data tests.cli_program:make_pair"
YAML = """
module: {class_path: tests.cli_program:Keyed, init_args: {learning_rate: 1e-3, api_key: abc}}
data: {class_path: tests.cli_program.make_pair, init_args: {batch_size: 16}}
trainer:
  max_epochs: 3
  seed: 5
  mesh: {data: 1}
  steps_per_dispatch: 2
  enable_progress_bar: false
  compilation_cache: false
  num_sanity_val_steps: 0
  data_timeout: null
  callbacks:
    - {class_path: Checkpoint, init_args: {dirpath: run}}
    - {class_path: tests.cli_program.Mark, init_args: {word: here}}
  logger: {class_path: CSVLogger, init_args: {directory: logs}}
"""
ALLOW = "--allow-import tests.cli_program"


def call(*words: Any) -> int:
    return cli.main([part for word in words for part in shlex.split(str(word))])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of the file, and in `again` of one of what it saved."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "given.yaml").write_text(YAML)
    root = f"--trainer.default_root_dir {folder}"
    assert call("fit --config", folder / "given.yaml", ALLOW, root, "--trainer.max_epochs 2") == 0
    saved = folder / "run" / "config.yaml"
    more = f"--module.api_key abc --trainer.default_root_dir {folder / 'again'}"
    assert call("fit --config", saved, ALLOW, more) == 0
    return folder


def says(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line of a command that cannot work."""
    assert call(*words) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0].removeprefix("jaxtrainer: ")


def test_run_from_the_saved_configuration_has_the_same_bits(run: Path):
    one, two = (read_arrays(folder / "run" / "step_4") for folder in (run, run / "again"))
    assert one["params"]
    digests = [read_record(f / "run" / "step_4")["arrays"] for f in (run, run / "again")]
    assert digests[0] == digests[1]
    assert all((two["params"][k] == x).all() for k, x in one["params"].items())


def test_saved_configuration_is_resolved_and_has_no_secret(run: Path):
    text = (run / "run" / "config.yaml").read_text()
    found = yaml.safe_load(text)
    assert "abc" not in text
    assert found["module"]["init_args"] == {"learning_rate": 1e-3, "api_key": "(hidden)"}
    assert found["data"]["init_args"] == {"batch_size": 16}
    assert found["trainer"]["max_epochs"] == 2
    assert found["trainer"]["data_timeout"] is None
    assert found["trainer"]["callbacks"][0]["init_args"]["monitor"] is None


def test_configuration_is_no_setting_of_its_run():
    saved = SavedConfiguration("trainer: {seed: 1}", "runs")
    assert settings_of({}, Keyed(), [saved])["callbacks"] == {"SavedConfiguration": {}}


def test_hidden_value_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]):
    saved = run / "run" / "config.yaml"
    line = says(capsys, "fit --config", saved, ALLOW)
    assert line == f"{saved} hides the value of module.api_key; pass `--module.api_key`."


def test_callback_of_the_user_takes_part(run: Path):
    assert Mark.seen[:2] == ["here", "here"]


def test_predictions_are_one_archive(run: Path, capsys: pytest.CaptureFixture[str]):
    file = run / "p.npz"
    words = "--trainer.enable_progress_bar false --trainer.compilation_cache false"
    ask = f"predict {MODULE} --data tests.cli_program:make_rows {words} --output {file}"
    assert call(ask, "--ckpt_path", run / "run") == 0
    assert capsys.readouterr().out == f"{file}\n"
    with np.load(file) as found:
        assert found["predictions"].shape == (24, tiny.CLASSES)
    assert "is there already" in says(capsys, ask)


def test_checkpoint_is_tested(run: Path, capsys: pytest.CaptureFixture[str]):
    words = "--trainer.enable_progress_bar false --trainer.compilation_cache false"
    ask = f"test {MODULE} --data tests.cli_program:make_stages {words} --ckpt_path"
    assert call(ask, run / "run") == 0
    assert "test/loss" in capsys.readouterr().out
    assert "no checkpoint at" in says(capsys, ask, run / "nowhere")


QUIET = "--trainer.enable_progress_bar false --trainer.compilation_cache false"


def test_checkpoint_is_validated(run: Path, capsys: pytest.CaptureFixture[str]):
    assert call("validate", MODULE, DATA, QUIET, "--ckpt_path", run / "run") == 0
    assert "val/loss" in capsys.readouterr().out


def test_predictions_are_a_directory_of_batches(run: Path, capsys: pytest.CaptureFixture[str]):
    ask = f"predict {MODULE} --data tests.cli_program:make_rows {QUIET} --output {run / 'rows'}"
    assert call(ask, "--ckpt_path", run / "run") == 0
    assert capsys.readouterr().out == f"{run / 'rows'}\n"
    batches = [*read_predictions(run / "rows")]
    assert [batch.shape for batch in batches] == [(8, tiny.CLASSES)] * 3
    assert "rows has predictions already" in says(capsys, ask)


def test_inspect_shows_arrays_without_the_classes(run: Path, capsys: pytest.CaptureFixture[str]):
    assert call("inspect", run / "run", "--verify") == 0
    out = capsys.readouterr().out
    assert "global_step 4" in out
    assert re.search(r"params/first/kernel +float32\[4, 8\] +128 B", out)
    assert "every array has its digest" in out
    assert f"jax {sys.modules['jax'].__version__}" in out


def test_inspect_refuses_a_damaged_record(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(run / "run", tmp_path / "run")
    record = tmp_path / "run" / "step_4" / "record" / "metadata"
    record.write_text(record.read_text().replace('"epoch"', '"epoc"'))
    assert call("inspect", tmp_path / "run") == 2
    assert "digest" in capsys.readouterr().err


def test_files_come_in_order_and_the_command_line_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, text in (("a", "{seed: 1, max_epochs: 1, max_steps: 1}"), ("b", "{max_steps: 2}")):
        (tmp_path / name).write_text(f"trainer: {text}\n")
    files = f"--config {tmp_path / 'a'} --config {tmp_path / 'b'}"
    assert call("fit --trainer.max_epochs 7", files, MODULE, "--seed 9 --print_config") == 0
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (found["seed"], found["max_epochs"], found["max_steps"]) == (9, 7, 2)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--trainer.max_epok 3", "unknown option --trainer.max_epok. Did you mean"),
        ("--trainer.max_epochs x", "trainer.max_epochs: expected int or None, got x."),
        ("--trainer.max_epochs", "argument --trainer.max_epochs: expected one argument"),
        ("--module.learn_rate 3", "unknown option --module.learn_rate. Did you mean '--module.lea"),
        ("--module.learning_rate x", "module.learning_rate: expected float, got x."),
        ("--data.batch_size x", "data.batch_size: expected int, got x."),
        ("--trainer.gradient_clip_algorithm nrm", "expected 'norm' or 'value', got nrm."),
        ("--trainer.callbacks+ EarlyStoping", "no class 'EarlyStoping'. Did you mean 'EarlyStopp"),
        ("--trainer.logger CVSLogger", "no class 'CVSLogger'. Did you mean 'CSVLogger'?"),
        (
            "--trainer.callbacks+ EarlyStopping --trainer.callbacks.monitr a",
            "EarlyStopping has no option 'monitr'. Did you mean 'monitor'?",
        ),
        (
            "--trainer.callbacks+ EarlyStopping --trainer.callbacks.patience x",
            "EarlyStopping.patience expected int, got x.",
        ),
        ("--trainer.precision 17", "precision='17' is not known"),
        ("--module tests.cli_program:Keyd", "has no 'Keyd'. Did you mean 'Keyed'?"),
        ("--module tests.cli_progam:Keyed", "there is no module 'tests.cli_progam'"),
        ("--module tests.cli_program:make_pair", "is no class of a TrainModule"),
        ("--module Keyed", "'Keyed' names no class: write `package.module:Class`."),
        ("--data tests.cli_program:NUMBER", "is a int; name a DataModule, or a function"),
        ("--config nowhere.yaml", "--config nowhere.yaml cannot be read"),
        ("--allow-import a/b", "write the name of a module or package"),
    ],
)
def test_misfit_is_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]):
    assert line in says(capsys, "fit", MODULE, DATA, words)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("trainer: {max_epoch: 3}", "trainer has no option 'max_epoch'. Did you mean 'max_epochs'"),
        ("triner: {max_epochs: 3}", "unknown key 'triner'. Did you mean 'trainer'?"),
        ("trainer: {max_epochs: many}", "trainer.max_epochs: expected int or None, got many."),
        ("module: {learn_rate: 1}", "module has no option 'learn_rate'. Did you mean"),
        ("- a", "holds no options, but list"),
        ("trainer: !!python/object/apply:os.system [x]", "is no plain YAML"),
        ("module: {class_path: antigravity:Net}", "add `--allow-import antigravity`"),
        ("data: antigravity.geohash", "add `--allow-import antigravity`"),
        ("trainer: {callbacks: [{class_path: antigravity.X}]}", "add `--allow-import antigravity`"),
        ("trainer: {callbacks: [{class_path: os.system}]}", "add `--allow-import os`"),
        ("trainer: {logger: {class_path: antigravity.X}}", "add `--allow-import antigravity`"),
    ],
)
def test_misfit_of_a_file_is_one_line_and_imports_nothing(
    text: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    given = "" if text.startswith(("module: {class", "data: anti")) else f"{MODULE} {DATA}"
    said = says(capsys, "fit", given, "--config", file)
    assert line in said
    assert "antigravity" not in sys.modules


def test_what_is_typed_may_be_imported_and_nothing_beside_it():
    words = ["--trainer.callbacks+", "mine.calls.Stop", {"class_path": "other.X"}, "3", "a b.c"]
    assert typed(words) == ["mine.calls", "other"]
    assert is_allowed("mine.calls.Stop", ["mine.calls"])
    assert not is_allowed("mine.calls_too.Stop", ["mine.calls"])


def test_nested_value_is_said_as_it_was_typed(capsys: pytest.CaptureFixture[str]):
    line = says(capsys, "plan", MODULE, DATA, "--mesh.data x")
    assert line == "mesh: expected dict[str, int] or 'auto' or None, got data=x."


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("fitt", "argument command: invalid choice: 'fitt'"),
        ("inspect", "the following arguments are required: CKPT; see `jaxtrainer inspect --help`."),
        ("devices --foo", "unrecognized arguments: --foo; see `jaxtrainer --help`."),
        ("report nowhere", "nowhere is no directory; pass the directory of a run."),
        ("inspect nowhere", "no checkpoint at"),
        ("launch --processes two x.py", "argument --processes: invalid int value: 'two'"),
        ("launch --processes 2 nowhere.py", "launch: there is no nowhere.py; pass a script, or"),
        ("launch --processes 2 -m nowhere.x", "launch: there is no module 'nowhere.x' here, or on"),
    ],
)
def test_command_that_cannot_work_says_so_in_one_line(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
):
    try:
        code = call(words)
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert line in captured.err


def test_help_shows_the_options_of_the_module(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        call("fit", MODULE, DATA, "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{x}" in out for x in ("module.learning_rate", "data.batch_size", "trainer.seed"))


def test_configuration_leaves_objects_and_passed_on_options_to_the_code(
    capsys: pytest.CaptureFixture[str],
):
    ask = "fit --print_config --module tests.cli_program:Acted"
    assert call(ask, "--data tests.cli_program:make_pair") == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert "init_args" not in found["module"]
    assert found["data"]["init_args"] == {"batch_size": 8}
    assert call(ask, "--module.act jax.nn.gelu") == 0
    given = yaml.safe_load(capsys.readouterr().out)["module"]["init_args"]
    assert given == {"act": "jax.nn.gelu"}


def test_error_of_the_user_keeps_its_traceback():
    with pytest.raises(TypeError, match="mine to mend"):
        call("fit --module tests.cli_program:Broken", DATA, "--trainer.max_epochs 1")


def test_call_without_a_module_says_so(capsys: pytest.CaptureFixture[str]):
    assert says(capsys, "fit").startswith("fit needs a module: `jaxtrainer fit --module package:")


def test_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert "pip install 'jaxtrainer[cli]'" in says(capsys, "fit", MODULE)


def test_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["jaxtrainer", "report", "nowhere"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("jaxtrainer", run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("jaxtrainer: nowhere is no directory")


def test_completion_has_the_options_of_the_trainer(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        call("--print_completion bash")
    out = capsys.readouterr().out
    assert "--trainer.max_epochs" in out
    assert "--ckpt_path" in out
    assert "fish" in says(capsys, "--print_completion fish")


def test_data_by_stage_goes_to_its_call():
    pair: Any = ("a", "b")
    stages = {"train": "a", "test": "c"}
    datamodule = Data()
    assert arguments_of("fit", pair) == {"train_loader": "a", "val_loader": "b"}
    assert arguments_of("validate", pair) == {"loader": "b"}
    assert arguments_of("fit", stages) == {"train_loader": "a", "val_loader": None}
    assert arguments_of("test", stages) == {"loader": "c"}
    assert arguments_of("test", ["one"]) == {"loader": ["one"]}
    assert arguments_of("fit", datamodule) == {"datamodule": datamodule}
    assert arguments_of("fit", None) == {}


@pytest.mark.parametrize(
    ("made", "part"),
    [
        ({"train": 1, "tset": 2}, "Did you mean 'test'?"),
        ((1, 2, 3), "a tuple is (train, val); this one has 3 entries"),
        ({"train": 1}, "test needs a loader 'test', and --data has made train"),
    ],
)
def test_data_that_does_not_fit_is_refused(made: Any, part: str):
    with pytest.raises(ConfigError, match=re.escape(part)):
        arguments_of("test", made)


def test_plan_of_a_data_module(capsys: pytest.CaptureFixture[str]):
    ask = f"plan {MODULE} --data tests.cli_program:Data --data.batch_size 16"
    assert call(ask, "--mesh.data 4", "--trainer.compilation_cache false") == 0
    out = capsys.readouterr().out
    assert "16 samples" in out
    assert "data 4" in out


DOCUMENT = Path(__file__).parents[1] / "docs" / "cli.md"


def test_commands_of_the_document_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, content in re.findall(r"^`(\S+)`:\n\n```\w+[^\n]*\n(.*?)^```", text, re.M | re.S):
        Path(name).write_text(content)
    [block] = re.findall(r"^```sh run\n(.*?)^```", text, re.M | re.S)
    for line in block.replace("\\\n", "").splitlines():
        assert call(line.removeprefix("jaxtrainer ")) == 0, line
    assert Path("predictions.npz").is_file()
