"""The import law: a module imports from lower levels, or from its own as long as no circle forms.

Reads the source, so imports inside functions and under `if TYPE_CHECKING` count as well.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxtrainer"

# Level of each module, or of all modules below a prefix; the longest prefix decides.
LEVELS = {
    "jaxtrainer": 8,  # public names: above everything, so nothing inside may import it
    "jaxtrainer.errors": 0,
    "jaxtrainer.settings": 0,
    "jaxtrainer.types": 0,
    "jaxtrainer.vocabulary": 0,
    "jaxtrainer.handed": 0,
    "jaxtrainer.collectives": 0,
    "jaxtrainer.distributed": 1,
    "jaxtrainer.aborts": 0,
    "jaxtrainer.blame": 1,
    "jaxtrainer.ending": 1,
    "jaxtrainer.table": 1,
    "jaxtrainer.agreement": 1,
    "jaxtrainer.accelerators": 1,
    "jaxtrainer.arrays": 1,
    "jaxtrainer.cache": 1,
    "jaxtrainer.control": 1,
    "jaxtrainer.data": 1,
    "jaxtrainer.display": 1,
    "jaxtrainer.duration": 1,
    "jaxtrainer.environment": 1,
    "jaxtrainer.bundle": 1,
    "jaxtrainer.emitter": 1,
    "jaxtrainer.every": 1,
    "jaxtrainer.flops": 1,
    "jaxtrainer.forensics": 1,
    "jaxtrainer.frozen": 1,
    "jaxtrainer.loaders": 1,
    "jaxtrainer.memory": 1,
    "jaxtrainer.flax_metrics": 1,
    "jaxtrainer.metrics": 1,
    "jaxtrainer.modules": 1,
    "jaxtrainer.casts": 1,
    "jaxtrainer.offload": 1,
    "jaxtrainer.patterns": 1,
    "jaxtrainer.peaks": 1,
    "jaxtrainer.remat": 1,
    "jaxtrainer.precision": 1,
    "jaxtrainer.lease": 1,
    "jaxtrainer.lock": 1,
    "jaxtrainer.places": 1,
    "jaxtrainer.png": 1,
    "jaxtrainer.record": 1,
    "jaxtrainer.records": 1,
    "jaxtrainer.remedies": 1,
    "jaxtrainer.remote": 1,
    "jaxtrainer.grain_source": 1,
    "jaxtrainer.local": 1,
    "jaxtrainer.rows": 1,
    "jaxtrainer.roofline": 1,
    "jaxtrainer.rundir": 1,
    "jaxtrainer.run": 1,
    "jaxtrainer.scopes": 1,
    "jaxtrainer.shapes": 1,
    "jaxtrainer.sharding": 1,
    "jaxtrainer.virtual": 1,
    "jaxtrainer.waiting": 1,
    "jaxtrainer.watch": 1,
    "jaxtrainer.workers": 1,
    "jaxtrainer.alike": 2,
    "jaxtrainer.account": 2,
    "jaxtrainer.averaging": 2,
    "jaxtrainer.stragglers": 2,
    "jaxtrainer.callback": 2,
    "jaxtrainer.hooks": 2,
    "jaxtrainer.checks": 2,
    "jaxtrainer.chunks": 2,
    "jaxtrainer.configuration": 2,
    "jaxtrainer.curves": 2,
    "jaxtrainer.datamodule": 2,
    "jaxtrainer.feed": 2,
    "jaxtrainer.figure": 2,
    "jaxtrainer.guard": 2,
    "jaxtrainer.layout": 2,
    "jaxtrainer.partition": 2,
    "jaxtrainer.indexed": 2,
    "jaxtrainer.interrupts": 2,
    "jaxtrainer.loss_scale": 2,
    "jaxtrainer.manifest": 2,
    "jaxtrainer.isolation": 2,
    "jaxtrainer.manual": 2,
    "jaxtrainer.module": 2,
    "jaxtrainer.options": 2,
    "jaxtrainer.peers": 2,
    "jaxtrainer.watchdog": 2,
    "jaxtrainer.whereabouts": 2,
    "jaxtrainer.optim": 2,
    "jaxtrainer.outputs": 2,
    "jaxtrainer.page": 2,
    "jaxtrainer.probe": 2,
    "jaxtrainer.rate": 2,
    "jaxtrainer.reread": 2,
    "jaxtrainer.result": 2,
    "jaxtrainer.state": 2,
    "jaxtrainer.summary": 2,
    "jaxtrainer.update": 2,
    "jaxtrainer.users_step": 2,
    "jaxtrainer.validation": 2,
    "jaxtrainer.checkpoint": 3,
    "jaxtrainer.store": 3,
    "jaxtrainer.step": 3,
    "jaxtrainer.callbacks": 4,
    "jaxtrainer.dispatch": 4,
    "jaxtrainer.doctor": 4,
    "jaxtrainer.loggers": 4,
    "jaxtrainer.programs": 4,
    "jaxtrainer.plan": 4,
    "jaxtrainer.trial": 4,
    "jaxtrainer.weights": 4,
    "jaxtrainer.lineup": 5,
    "jaxtrainer.loops": 5,
    "jaxtrainer.assemble": 6,
    "jaxtrainer.evaluation": 6,
    "jaxtrainer.parts": 6,
    "jaxtrainer.planning": 6,
    "jaxtrainer.replay": 6,
    "jaxtrainer.shortage": 6,
    "jaxtrainer.pretrained": 6,
    "jaxtrainer.position": 5,
    "jaxtrainer.session": 6,
    "jaxtrainer.testing": 6,
    "jaxtrainer.traced": 6,
    "jaxtrainer.trainer": 6,
    "jaxtrainer.tuning": 6,
    "jaxtrainer.verify": 6,
    "jaxtrainer.__main__": 7,
    "jaxtrainer.cli": 7,
    "jaxtrainer.commandline": 7,
    "jaxtrainer.inspection": 4,
    "jaxtrainer.launch": 7,
    "jaxtrainer.launched": 7,
    "jaxtrainer.commands": 6,
}

# Lower, and still not for these: a module at or below the key imports none of the prefixes.
FORBIDDEN = {
    "jaxtrainer.errors": ["jaxtrainer"],
    "jaxtrainer.types": ["jaxtrainer"],
    "jaxtrainer.loops": [
        "jaxtrainer.callbacks",
        "jaxtrainer.checkpoint",
        "jaxtrainer.loggers",
        "jaxtrainer.step",
        "jaxtrainer.users_step",
    ],
}

Sources = Mapping[str, str]
Graph = dict[str, set[str]]


def read_package(folder: Path) -> dict[str, str]:
    """Source by dotted name; a package is named without its `__init__`."""
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def entry_of(name: str) -> str:
    """The entry of LEVELS that covers a module, or ''. The root covers itself only."""
    entries = [e for e in LEVELS if name == e or (e != "jaxtrainer" and is_below(name, e))]
    return max(entries, key=len, default="")


def imported_names(source: str) -> Iterator[str]:
    """Dotted names, `from a import b` as `a.b`; a relative import keeps its leading dots."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=dots):
                base = "." * dots + (f"{module}." if module else "")
                yield from (base + alias.name for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield target


def import_graph(sources: Sources) -> Graph:
    """Edges between the modules of `sources`; a name in a module stands for the module."""
    graph: Graph = {name: set() for name in sources}
    for name, source in sources.items():
        for target in imported_names(source):
            while target and not target.startswith(".") and target not in sources:
                target = target.rpartition(".")[0]
            if target:
                graph[name].add(target)
    return graph


def find_break(name: str, target: str) -> str | None:
    """What the law has against `name` importing `target`."""
    if target.startswith("."):
        return f"{name} imports {target}: write the absolute name"
    level, target_level = LEVELS[entry_of(name)], LEVELS[entry_of(target)]
    if target_level > level:
        return f"{name} (level {level}) imports {target} (level {target_level}) above it"
    banned = [prefix for key in FORBIDDEN if is_below(name, key) for prefix in FORBIDDEN[key]]
    if any(is_below(target, prefix) for prefix in banned):
        return f"{name} imports {target}, which FORBIDDEN keeps from it"
    return None


def find_violations(sources: Sources) -> list[str]:
    """One line for each break of the law."""
    if unknown := [name for name in sources if not entry_of(name)]:
        return [f"{name} has no level: assign one in LEVELS of {__file__}" for name in unknown]
    graph = import_graph(sources)
    edges = [(name, target) for name in graph for target in sorted(graph[name])]
    found = [problem for edge in edges if (problem := find_break(*edge))]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circular import: " + " <- ".join(error.args[1]))
    return found


def test_package_obeys_the_import_law():
    sources = read_package(PACKAGE)
    assert len(sources) > 1, f"no modules under {PACKAGE}"
    assert not (found := find_violations(sources)), "\n".join(found)


UPWARD = "jaxtrainer.run (level 1) imports jaxtrainer.step (level 3) above it"


@pytest.mark.parametrize(
    "source",
    [
        "import jaxtrainer.step",
        "from jaxtrainer.step import build_train_step",
        "from jaxtrainer import step",
        "def lazy():\n    from jaxtrainer.step import build_train_step",
        "import importlib\nimportlib.import_module('jaxtrainer.step')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxtrainer import step",
    ],
)
def test_upward_import_is_found(source):
    sources = {"jaxtrainer": "", "jaxtrainer.run": source, "jaxtrainer.step": ""}
    assert find_violations(sources) == [UPWARD]


def test_import_of_the_public_package_is_found():
    sources = {"jaxtrainer": "", "jaxtrainer.trainer": "from jaxtrainer import Trainer"}
    assert find_violations(sources) == [
        "jaxtrainer.trainer (level 6) imports jaxtrainer (level 8) above it"
    ]


def test_circle_within_a_level_is_found():
    sources = {
        "jaxtrainer.run": "def lazy():\n    import jaxtrainer.data",
        "jaxtrainer.data": "from jaxtrainer.run import Run",
    }
    (found,) = find_violations(sources)
    assert found.startswith("circular import: ")


@pytest.mark.parametrize("source", ["from . import step", "from .step import build_train_step"])
def test_relative_import_is_found(source):
    (found,) = find_violations({"jaxtrainer.run": source, "jaxtrainer.step": ""})
    assert found.startswith("jaxtrainer.run imports .step")


def test_import_from_the_own_level_is_allowed():
    sources = {"jaxtrainer.run": "import jaxtrainer.data", "jaxtrainer.data": ""}
    assert find_violations(sources) == []


def test_loop_importing_a_concrete_callback_is_found():
    sources = {
        "jaxtrainer.loops.fit": "from jaxtrainer.callbacks.timer import Timer",
        "jaxtrainer.callbacks.timer": "",
    }
    (found,) = find_violations(sources)
    assert "FORBIDDEN" in found


def test_module_without_a_level_is_named():
    (found,) = find_violations({"jaxtrainer.novelty": ""})
    assert found.startswith("jaxtrainer.novelty has no level: assign one in LEVELS")
