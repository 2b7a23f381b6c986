"""Which tests there are, by reading the files: for tables that name the test behind a claim."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path


def missing_tests(places: Iterable[str]) -> list[str]:
    """The places, written `test_file.py::test_name`, where there is no test."""
    named = {*places}
    files = {place.split("::")[0] for place in named}
    return sorted(named - {f"{file}::{test}" for file in files for test in names_in(file)})


def names_in(file: str) -> list[str]:
    """Names of the functions of a test file; none if there is no such file."""
    path = Path(__file__).with_name(file)
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
