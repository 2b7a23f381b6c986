"""`load_params`: weights of another run into a fresh model, and a report of which.

May import levels 0 to 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtrainer import distributed
from jaxtrainer.checkpoint import find_checkpoint, read_arrays
from jaxtrainer.checks import require
from jaxtrainer.errors import CheckpointMismatchError, ConfigError
from jaxtrainer.manifest import described
from jaxtrainer.module import TrainModule
from jaxtrainer.optim import matching, nearest
from jaxtrainer.precision import parse_precision
from jaxtrainer.programs import Initializer
from jaxtrainer.result import render
from jaxtrainer.state import flat_items, nest


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load_params` did, by the names of arrays; it prints as a table.

    Attributes:
        path: The checkpoint.
        loaded: What the model got, by its name there the name in the checkpoint.
        cast: Of these, the ones that were saved in another floating-point dtype, and which.
        fresh: What the model keeps of its own.
        unused: What the checkpoint has beyond that.
    """

    path: Path
    loaded: Mapping[str, str]
    cast: Mapping[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __rich__(self) -> Table:
        title = f"{len(self.loaded)} arrays loaded from {self.path}"
        table = Table(title=title, title_justify="left")
        for column in ("array", "is"):
            table.add_column(column)
        for name, source in self.loaded.items():
            origin = "loaded" if source == name else f"loaded from {source}"
            casts = f", saved as {self.cast[name]}" if name in self.cast else ""
            table.add_row(name, origin + casts)
        for name in self.fresh:
            table.add_row(name, "fresh")
        for name in self.unused:
            table.add_row(name, "not used")
        return table

    def __str__(self) -> str:
        return render(self.__rich__())


def load_params(
    module: TrainModule,
    ckpt_path: str | os.PathLike[str],
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> LoadReport:
    """Make the module's model with weights of a checkpoint, for `fit` to start from.

    Optimiser, counters and random streams start anew; statistics such as BatchNorm's come along,
    and where a run has averaged its weights, the averages are taken. Every array that is not
    excluded has to be there, in its shape: what stays fresh is said, not found out.

    Args:
        module: What will be trained. If it has a `model`, that is what stays where nothing is
            loaded; otherwise a fresh one is made.
        ckpt_path: A run directory (its last checkpoint), or a step directory in one.
        include: What to load: a name in the model (`"encoder"`, with all below it), a pattern
            (`"*/kernel"`), or several.
        exclude: What of it not to.
        rename: Where the names differ: `{"backbone": "encoder"}`, from the name in the checkpoint
            to the name in the model.
        seed: Seed of what stays fresh.
        verbose: Print the report.

    Returns:
        What was loaded, what is fresh, and what was not used.

    Raises:
        CheckpointMismatchError: If arrays are missing or have other shapes, naming each.
        CheckpointCorruptError: If the checkpoint is damaged.
        ConfigError: For a name that nothing has.

    Example:
        >>> from jaxtrainer import load_params
        >>> # load_params(module, "runs/pretrained", exclude="head")
        >>> # trainer.fit(module, loader)
    """
    require(module, ("configure_model",))
    path = find_checkpoint(ckpt_path)
    init = Initializer(module, seed, parse_precision("32-true"))
    params, model_state = init.given or jax.jit(init.make_model)(init.seed)
    here = {**dict(flat_items(params)), **dict(flat_items(model_state))}
    sources = _sources(path, rename or {})
    selected = _selected(_loadable(here), include, exclude)
    _check(path, here, sources, selected)
    values = {name: sources[name][1] for name in selected}
    report = LoadReport(
        path=path,
        loaded={name: sources[name][0] for name in selected},
        cast={n: str(x.dtype) for n, x in values.items() if x.dtype != here[n].dtype},
        fresh=tuple(name for name in here if name not in values),
        unused=tuple(source for name, (source, _) in sources.items() if name not in values),
    )
    new = {n: jnp.asarray(values[n], x.dtype) if n in values else x for n, x in here.items()}
    both = [nest({n: new[n] for n, _ in flat_items(tree)}) for tree in (params, model_state)]
    module.model = init.adapter.merge(*both, training=False)
    if verbose and distributed.is_first():
        Console().print(report)
    return report


def _sources(path: Path, rename: Mapping[str, str]) -> dict[str, tuple[str, np.ndarray]]:
    """Return what the checkpoint has, by the name in the model, with the name it has there."""
    items = read_arrays(path, ("params", "model_state", "averaged"))
    arrays = {**items.get("model_state", {}), **items.get("params", {})}
    for name, value in items.get("averaged", {}).items():
        item, _, rest = name.partition("/")
        if item in ("params", "model_state"):
            arrays[rest] = value
    for old in rename:
        if not matching(arrays, old):
            raise ConfigError(
                f"rename: the checkpoint has no array below {old!r}.{nearest(old, arrays)}"
            )
    return {_renamed(name, rename): (name, value) for name, value in arrays.items()}


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    # Of several names that fit, the longest says most.
    for old in sorted(rename, key=len, reverse=True):
        if name == old or name.startswith(f"{old}/"):
            return rename[old] + name[len(old) :]
    return name


def _loadable(here: Mapping[str, Any]) -> list[str]:
    """Return the names of parameters and statistics: keys and counters are integers."""
    return [name for name, x in here.items() if jnp.issubdtype(x.dtype, jnp.inexact)]


def _selected(
    names: Iterable[str], include: str | Sequence[str], exclude: str | Sequence[str]
) -> list[str]:
    names = list(names)
    wanted, unwanted = (_matched(names, p) for p in (include, exclude))
    return [name for name in names if name in wanted and name not in unwanted]


def _matched(names: Sequence[str], patterns: str | Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not (some := matching(names, pattern)):
            raise ConfigError(
                f"{pattern!r} matches no array of the model.{nearest(pattern, names)}"
            )
        found.update(some)
    return found


def _check(
    path: Path, here: Mapping[str, Any], sources: Mapping[str, Any], selected: Sequence[str]
) -> None:
    lines, bad = [], []
    for name in selected:
        found = sources[name][1] if name in sources else None
        if found is None:
            lines.append(f"{name}: {_spec(here[name])} here, not saved")
        elif found.shape != here[name].shape or not jnp.issubdtype(found.dtype, jnp.inexact):
            lines.append(f"{name}: saved as {_spec(found)}, here {_spec(here[name])}")
        else:
            continue
        bad.append(name)
    if lines:
        raise CheckpointMismatchError(
            f"{path} does not have what the model needs:\n  " + "\n  ".join(lines) + "\n"
            f"Leave these fresh with `exclude={bad!r}`, or say what they are called in the "
            "checkpoint with `rename={'there': 'here'}`."
        )


def _spec(array: Any) -> str:
    return described({"dtype": array.dtype, "shape": array.shape})
