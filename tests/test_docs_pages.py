"""The pages of the documentation: complete, and what they name exists."""

from __future__ import annotations

import inspect
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxtrainer
from jaxtrainer import Trainer, callbacks, cli, errors, loggers
from jaxtrainer.callback import HOOKS
from tests.test_docs import DOCS, check, is_code, rows, spans

ROOT = DOCS.parent
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "recipes" / "README.md", *PAGES]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, Exception)
}


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_program_of_a_page_is_run(path: Path):
    fences = re.findall(r"^```(python.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    # A block with a file's name is a program that other tests start (`test_scale_docs.py`).
    assert {fence for fence in fences if not fence.endswith(".py")} <= {"python run"}


def shell_lines(text: str) -> Iterator[str]:
    """The lines of blocks for a shell, and the pieces of code within a text."""
    for block in re.findall(r"^```(?:bash.*)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from block.splitlines()
    yield from spans(text)


def missing(line: str) -> list[str]:
    """What a line of a shell names that is not there."""
    there = {
        r"^make ([a-z-]+)": lambda name: re.search(rf"^{name}:", MAKEFILE, re.MULTILINE),
        r"^python ((?:recipes|benchmarks|tests)/\S+)": lambda name: (ROOT / name).is_file(),
        r"pip install '(?:\.|jaxtrainer)\[([\w,]+)\]": lambda names: (
            {*names.split(",")} <= {*EXTRAS}
        ),
        r"^jaxtrainer ([a-z]+)\b": has_command,
    }
    found = [(what, exists) for p, exists in there.items() for what in re.findall(p, line)]
    return [what for what, exists in found if not exists(what)]


def has_command(name: str) -> bool:
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    return left.value.code == 0


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_commands_of_a_page_exist(path: Path):
    for line in shell_lines(path.read_text(encoding="utf-8")):
        assert not missing(line), line


@pytest.mark.parametrize(
    "line",
    ["make dokcs", "python recipes/mnist.py", "pip install '.[tensorbord]'", "jaxtrainer docter"],
)
def test_commands_that_do_not_exist_are_found(line: str):
    assert missing(line)


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_has_an_entry_that_says_what_to_do(name: str):
    [entry] = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", page("errors"), re.DOTALL | re.MULTILINE)
    assert "**Do:**" in entry
    first = entry.partition("**Do:**")[0]
    for base in re.findall(r"\*(?:Also )?an? `(\w+)`|also an? `(\w+)`", first):
        kind = "".join(base)
        assert kind in {base.__name__ for base in ERRORS[name].__mro__}, kind


def test_no_entry_is_of_an_error_that_does_not_exist():
    assert {*re.findall(r"^### (\w+)$", page("errors"), re.MULTILINE)} == {*ERRORS}


def test_page_of_the_trainer_draws_the_loop_of_fit():
    described = inspect.getdoc(Trainer.fit) or ""
    drawing = re.findall(r"hooks included::\n\n(.*?)\n\n\S", described, re.DOTALL)[0]
    assert textwrap.dedent(drawing) in page("trainer")


def test_page_of_the_trainer_names_every_option():
    options = [row for row in rows(page("trainer").partition("## Options")[2])][1:]
    named = [span for row in options for span in spans(row[1])]
    assert sorted(named) == sorted(inspect.signature(Trainer).parameters)


def test_page_of_callbacks_names_every_callback_and_hook():
    named = [span.partition("(")[0] for row in rows(page("callbacks")) for span in spans(row[0])]
    assert {*callbacks.__all__} <= {*named}
    assert not {*HOOKS} - {*spans(page("callbacks"))}


def test_page_of_loggers_names_every_logger():
    named = {span.partition("(")[0] for span in spans(page("loggers"))}
    assert {*loggers.__all__} <= named


@pytest.mark.parametrize(("name", "column"), [("from-keras", 1), ("callbacks", 0), ("loggers", 0)])
def test_names_in_the_tables_of_a_page_exist(name: str, column: int):
    named = [span for row in rows(page(name)) for span in spans(row[column])]
    code = [span for span in named if is_code(span)]
    assert code
    for span in code:
        check(span)


def test_reference_has_every_public_name():
    text = "\n".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md"))
    shown = {*re.findall(r"^::: jaxtrainer\.([\w.]+)$", text, re.MULTILINE)}
    assert {*jaxtrainer.__all__} - shown == {"data"}
    functions = inspect.getmembers(jaxtrainer.data, inspect.isfunction)
    assert {"data.from_arrays", "data.on_device", "data.process_local"} <= shown
    assert {"from_arrays", "on_device", "process_local"} <= {name for name, _ in functions}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for path in DOCS.rglob("*.md"):
        assert f" {path.relative_to(DOCS)}\n" in navigation, path
