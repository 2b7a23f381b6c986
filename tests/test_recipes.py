"""All recipes: they use public names only, are short, and are in the list of recipes."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import jaxtrainer
from jaxtrainer import callbacks, data, errors, loggers, testing

FOLDER = Path(__file__).parents[1] / "recipes"
FILES = sorted(FOLDER.glob("*.py"))
HELPERS = {"command_line.py", "mnist_data.py", "mnist_image.py"}
"""What recipes share; no programs."""
PROGRAMS = [p.stem for p in FILES if p.name not in HELPERS | {"regression.py"}]
"""Those that take options."""

PUBLIC = {
    "jaxtrainer": {*jaxtrainer.__all__},
    "jaxtrainer.callbacks": {*callbacks.__all__},
    "jaxtrainer.data": {n for n in vars(data) if not n.startswith("_")},
    "jaxtrainer.loggers": {*loggers.__all__},
    "jaxtrainer.errors": {n for n in vars(errors) if not n.startswith("_")},
    "jaxtrainer.testing": {*testing.__all__},
}


def imports(source: str) -> list[tuple[str, str]]:
    """What a program imports: pairs of module and name, `""` for a module itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def private(source: str) -> list[str]:
    """What it imports of the package that is not public."""
    ours = [x for x in imports(source) if x[0].split(".")[0] == "jaxtrainer"]
    return [
        f"{m} {n}".strip() for m, n in ours if n not in {"", *PUBLIC.get(m, ())} or m not in PUBLIC
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_imports_public_names_only(path: Path):
    assert private(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import jaxtrainer.step",
        "from jaxtrainer.parts import build_step",
        "from jaxtrainer import Fed",
    ],
)
def test_private_names_are_found(line: str):
    assert len(private(line)) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_short(path: Path):
    """Without what it says about itself, and blank lines."""
    source = path.read_text(encoding="utf-8")
    header = ast.get_docstring(ast.parse(source), clean=False) or ""
    assert len([line for line in source.replace(header, "").splitlines() if line]) <= 160


@pytest.mark.parametrize("name", PROGRAMS)
def test_recipe_shows_its_header_and_refuses_unknown_options(
    name: str, capsys: pytest.CaptureFixture[str]
):
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert f"    python recipes/{name}.py" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["--sead", "1"])
    assert "unrecognized arguments: --sead 1" in capsys.readouterr().err


def test_every_recipe_is_in_the_list():
    listed = re.findall(
        r"^\| \[`(\w+\.py)`\]\(\1\)", (FOLDER / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == [path.name for path in FILES if path.name not in HELPERS]
