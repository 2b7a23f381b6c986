"""`load_params`: weights of another run into a fresh model, and a report of which.

What is to be loaded is settled on names and shapes; then the arrays that are wanted are read, each
device its part. May import levels 0 to 6.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxtrainer import distributed
from jaxtrainer.checkpoint import Arrays, find_checkpoint, read_some, saved_specs
from jaxtrainer.checks import require
from jaxtrainer.errors import CheckpointMismatchError, ConfigError
from jaxtrainer.layout import Layout
from jaxtrainer.manifest import described
from jaxtrainer.module import TrainModule
from jaxtrainer.optim import matching, nearest
from jaxtrainer.precision import Precision, parse_precision
from jaxtrainer.programs import Initializer, layout_of, shardings
from jaxtrainer.result import render
from jaxtrainer.sharding import build_mesh
from jaxtrainer.state import flat_items, nest
from jaxtrainer.trainer import Trainer


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
    trainer: Trainer | None = None,
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
        trainer: Where its `mesh` and `sharding` divide the model, each device reads its part, and
            a model that is larger than a device is never whole on one. None: whole on the first
            device.
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
    init = Initializer(module, seed, _precision(trainer))
    layout = None if trainer is None else _layout(trainer, init)
    here = _specs(init, layout)
    sources = _sources(path, rename or {})
    selected = _selected(_loadable(here), include, exclude)
    _check(path, here, sources, selected)
    found = {name: sources[name] for name in selected}
    report = LoadReport(
        path=path,
        loaded={name: source.name for name, source in found.items()},
        cast={n: str(x.spec.dtype) for n, x in found.items() if x.spec.dtype != here[n].dtype},
        fresh=tuple(name for name in here if name not in found),
        unused=tuple(source.name for name, source in sources.items() if name not in found),
    )
    new = {**_kept(init, layout, report.fresh), **_read(path, found, here)}
    trees = init.params, init.model_state
    both = [nest({n: new[n] for n, _ in flat_items(tree)}) for tree in trees]
    module.model = init.adapter.merge(*both, training=False)
    if verbose and distributed.is_first():
        Console().print(report)
    return report


class _Source(NamedTuple):
    """An array of the checkpoint: its name as a parameter, where it is, and what."""

    name: str
    item: str
    key: str
    spec: Any


def _precision(trainer: Trainer | None) -> Precision:
    if trainer is None:
        return parse_precision("32-true")
    if not isinstance(trainer, Trainer):
        raise ConfigError(
            f"load_params got trainer={trainer!r}, expected the `Trainer` that will train: "
            "`load_params(module, path, trainer=trainer)`."
        )
    return trainer.options.precision


def _layout(trainer: Trainer, init: Initializer) -> Layout:
    options = trainer.options
    return layout_of(init, options, build_mesh(options.mesh))


def _specs(init: Initializer, layout: Layout | None) -> dict[str, Any]:
    """Return the specs of the model's arrays by name, with shardings if there is a layout."""
    both = init.params, init.model_state
    if layout is not None:
        both = layout.of_variables(*both)
    return {name: spec for tree in both for name, spec in flat_items(tree)}


def _kept(init: Initializer, layout: Layout | None, names: Sequence[str]) -> dict[str, Any]:
    """Return the arrays that the model has of its own, where they live."""

    def make(seed: Any, given: Any = None) -> dict[str, Any]:
        both = init.make_model(seed) if given is None else given
        flat = {name: x for tree in both for name, x in flat_items(tree)}
        return {name: flat[name] for name in names}

    if init.given is not None:
        return make(init.seed, init.given if layout is None else layout.place(init.given))
    specs = _specs(init, layout)
    where = None if layout is None else shardings({name: specs[name] for name in names})
    return jax.jit(make, out_shardings=where)(init.seed) if names else {}


def _read(
    path: Path, found: Mapping[str, _Source], here: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
    """Return arrays of a checkpoint by their names in the model, each where it lives there."""
    wanted: Arrays = {}
    for name, source in found.items():
        spec, where = source.spec, here[name].sharding
        if where is not None:
            spec = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=where)
        wanted.setdefault(source.item, {})[source.key] = spec
    arrays = read_some(path, wanted)
    values = {name: arrays[source.item][source.key] for name, source in found.items()}
    return {name: jnp.asarray(x, here[name].dtype) for name, x in values.items()}


def _sources(path: Path, rename: Mapping[str, str]) -> dict[str, _Source]:
    """Return what the checkpoint has, by the name in the model."""
    items = saved_specs(path, ("model_state", "params", "averaged"))
    found: dict[str, _Source] = {}
    for item in ("model_state", "params"):
        found |= {name: _Source(name, item, name, x) for name, x in items[item].items()}
    for key, spec in items["averaged"].items():
        item, _, name = key.partition("/")
        if item in ("params", "model_state"):
            found[name] = _Source(name, "averaged", key, spec)
    for old in rename:
        if not matching(found, old):
            raise ConfigError(
                f"rename: the checkpoint has no array below {old!r}.{nearest(old, found)}"
            )
    return {_renamed(name, rename): source for name, source in found.items()}


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
        found = sources[name].spec if name in sources else None
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
