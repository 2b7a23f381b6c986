"""Nothing that is read is executed: neither is there code that could, nor does it happen."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer.manifest import seal
from tests.test_architecture import PACKAGE, imported_names
from tests.test_golden import STEP

UNSAFE_MODULES = {
    *("_pickle", "pickle", "cPickle", "marshal", "dill", "joblib", "cloudpickle", "shelve"),
    *("jsonpickle", "copyreg", "runpy", "subprocess", "pty", "code", "codeop", "torch"),
}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
UNSAFE_METHODS = {
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "os.system"),
    *("os.popen", "os.execv", "os.execve", "os.spawnv", "os.posix_spawn", "shutil.unpack_archive"),
}

ALLOWED = {
    "launch": {"subprocess"},  # starts the user's program, from a list of words
    "launched": {"runpy"},  # is that program
    "imports": {"import_module"},  # classes that the user names; `locate` refuses all others
}
"""What a module is for, and why it is no way for a file to be executed."""


def unsafe(source: str) -> Iterator[str]:
    """What in a module could execute what it reads."""
    yield from (n for n in imported_names(source) if n.partition(".")[0] in UNSAFE_MODULES)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in UNSAFE_CALLS | UNSAFE_METHODS:
            yield name
        if name.endswith("import_module") and not _is_own(node.args[0]):
            yield name
        if any(k.arg == "allow_pickle" and not _is_false(k.value) for k in node.keywords):
            yield f"{name}(allow_pickle=True)"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_own(node: ast.expr) -> bool:
    """Whether a name to import is written out, or is one of the package's own."""
    return isinstance(node, ast.Constant) or ast.unparse(node).startswith("f'jaxtrainer.")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_package_has_no_way_to_execute_what_it_reads(path: Path):
    found = {*unsafe(path.read_text(encoding="utf-8"))}
    assert found - ALLOWED.get(path.stem, set()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "def lazy():\n    import cloudpickle",
        "import importlib\nimportlib.import_module(record['class'])",
        "eval(text)",
        "exec(compile(text, name, 'exec'))",
        "np.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=flag)",
        "yaml.full_load(text)",
        "os.system(command)",
        "import subprocess",
    ],
)
def test_way_to_execute_is_found(source: str):
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source",
    [
        "re.compile(pattern)",
        "lowered.compile()",
        "np.load(file, allow_pickle=False)",
        "yaml.safe_load(text)",
        "import_module('jaxtrainer.data')",
    ],
)
def test_what_is_safe_is_not_found(source: str):
    assert list(unsafe(source)) == []


WATCHED = """
import sys
from pathlib import Path
from tests import golden
from jaxtrainer import load_params

def read(path):
    golden.trainer().predict(golden.Golden(), golden.loader(), ckpt_path=path)
    golden.trainer().fit(golden.Golden(), golden.loader(), ckpt_path=path)
    load_params(golden.Golden(), path, verbose=False)

# What is imported lazily is, by now; what the file might name is not.
read(Path(sys.argv[1]))
BAD = {"exec", "compile", "import", "pickle.find_class", "marshal.loads", "os.system", "os.exec",
       "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect"}
seen = []
sys.addaudithook(lambda name, args: seen.append((name, str(args)[:200])) if name in BAD else None)
if len(sys.argv) > 3:
    exec("1")
    try:
        import this_module_is_not_there
    except ImportError:
        pass
read(Path(sys.argv[2]))
print(seen)
"""


def watched(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCHED, *map(str, args)]
    root = PACKAGE.parent
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """The golden checkpoint, with a record full of what unpickled or imported would be code."""
    copy = Path(shutil.copytree(STEP, tmp_path / STEP.name))
    file = copy / "record" / "metadata"
    record = json.loads(file.read_text())
    del record["digest"]
    bait = {
        "py/object": "antigravity.geohash",
        "py/reduce": ["os.system", ["true"]],
        "_target_": "antigravity",
        "class_path": "antigravity.Module",
        "__class__": "this.Zen",
        "code": "__import__('antigravity')",
        "module": "antigravity",
    }
    record["user"] = bait
    record["callbacks"] = {**record["callbacks"], "antigravity": bait, "os.system": bait}
    file.write_text(json.dumps(seal(record)))
    return copy


def test_reading_a_checkpoint_executes_and_imports_nothing(hostile: Path):
    done = watched(STEP, hostile)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_watch_sees_what_is_executed_or_imported():
    done = watched(STEP, STEP, "and execute")
    assert "('exec', " in done.stdout
    assert "('import', \"('this_module_is_not_there'" in done.stdout
