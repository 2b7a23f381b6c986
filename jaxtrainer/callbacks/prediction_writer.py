"""`PredictionWriter`: predictions to disk while they are made, and `read_predictions` to get them.

One NumPy archive a batch and one JSON index; nothing in them is executed when they are read.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrainer.alike import in_first
from jaxtrainer.callback import Callback
from jaxtrainer.data import leaf_name, num_rows
from jaxtrainer.distributed import is_first
from jaxtrainer.errors import ConfigError, DataError, RunDirError, checks_options
from jaxtrainer.remote import refuse_url
from jaxtrainer.run import Run
from jaxtrainer.types import PyTree

INDEX = "index.json"
_FORMAT = 1
_WHAT = "what predict_step returned"


class PredictionWriter(Callback):
    """Write what `predict_step` returns to disk, so that memory does not grow with the data.

    Each batch becomes `batch_000000.npz`, ..., an archive of its leaves by name; `index.json`
    comes last, when all are written. `trainer.predict` then returns None, unless
    `return_predictions=True`. `read_predictions` yields the batches again. Of a dict of loaders
    each has a directory of its name in `dirpath`. Of several processes the first one writes, all
    rows in order.

    Args:
        dirpath: Directory for the files; made if missing.
        write_interval: `"batch"`: a file a batch. `"epoch"`: one file of all rows at the end,
            for which they are kept in memory.

    Raises:
        RunDirError: Before anything compiles, if the directory has predictions already, or cannot
            be written.
        DataError: If the leaves differ in their number of rows, or two have one name.

    Example:
        >>> writer = PredictionWriter("runs/mnist/predictions")
    """

    order = 2

    @checks_options
    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        write_interval: Literal["batch", "epoch"] = "batch",
    ) -> None:
        if not isinstance(dirpath, str | os.PathLike):
            raise ConfigError(f"PredictionWriter needs a directory, got {dirpath!r}.")
        if write_interval not in ("batch", "epoch"):
            raise ConfigError(f"write_interval={write_interval!r}: use 'batch' or 'epoch'.")
        refuse_url("PredictionWriter", dirpath)
        self.given_dirpath = os.fspath(dirpath)
        self.dirpath = self.given_dirpath
        self.write_interval = write_interval
        self._parts: dict[str, _Part] = {}
        self._kept: dict[str, list[PyTree]] = {}

    def setup(self, run: Run) -> None:
        """Open the directory, before anything compiles."""
        if run.stage == "predict":
            in_first(lambda: _open_empty(Path(self.dirpath)), "PredictionWriter")

    def on_predict_batch_end(
        self, run: Run, outputs: PyTree, batch: PyTree, batch_idx: int
    ) -> None:
        """Write the batch, or keep it until the end."""
        # Every process has the predictions of all.
        if not is_first():
            return
        name = run.loader_name or ""
        if name not in self._parts:
            self._parts[name] = _Part(Path(self.dirpath, name))
        if self.write_interval == "epoch":
            self._kept.setdefault(name, []).append(outputs)
        else:
            self._parts[name].write(outputs)

    def on_predict_epoch_end(self, run: Run) -> None:
        """Write what was kept, and the index."""
        for name, kept in self._kept.items():
            for outputs in kept:
                num_rows(outputs, _WHAT)
            self._parts[name].write(jax.tree.map(lambda *leaves: np.concatenate(leaves), *kept))
        for part in self._parts.values():
            part.finish()

    def teardown(self, run: Run) -> None:
        """Forget what was kept, also after an exception."""
        self._parts.clear()
        self._kept.clear()


class _Part:
    """The files of one loader, in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.rows: list[int] = []
        self.structure: dict[str, Any] = {}

    def write(self, outputs: PyTree) -> None:
        rows = num_rows(outputs, _WHAT)
        leaves = _by_name(outputs)
        if not self.rows:
            dtypes = {name: str(leaf.dtype) for name, leaf in leaves.items()}
            self.structure = {"dtypes": dtypes, "tree": _describe(outputs)}
        _save(self.directory / _file_name(len(self.rows)), leaves)
        self.rows.append(rows)

    def finish(self) -> None:
        index = {"format_version": _FORMAT, "rows": self.rows, **self.structure}
        # Renamed into place: an index that is there is whole, and so are the files it names.
        new = self.directory / f"{INDEX}.tmp"
        new.write_text(json.dumps(index))
        new.replace(self.directory / INDEX)


def read_predictions(dirpath: str | os.PathLike[str]) -> Iterator[PyTree]:
    """Yield the batches that a `PredictionWriter` has written, in order, one in memory at a time.

    Dicts, lists and tuples come back as they were; of any other node its leaves, by name.

    Raises:
        DataError: At once, if there is no index, or it does not fit the files.

    Example::

        for batch in read_predictions("runs/mnist/predictions"):
            print(batch["label"].shape)
    """
    directory = Path(dirpath)
    index = _read_index(directory)
    return (_read(directory, i, rows, index) for i, rows in enumerate(index["rows"]))


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    if not path.is_file():
        files = len(list(directory.glob("batch_*.npz"))) if directory.is_dir() else 0
        found = f"{files} files of predictions that did not end" if files else "no predictions"
        raise DataError(
            f"{directory} has {found}; expected an {INDEX}, which comes last. Predict again into "
            "another directory, or read single files with `numpy.load`."
        )
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format_version") != _FORMAT:
        raise DataError(f"{path} is no index of predictions in format {_FORMAT}.")
    return index


def _read(directory: Path, number: int, rows: int, index: dict[str, Any]) -> PyTree:
    path = directory / _file_name(number)
    try:
        with np.load(path, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in index["dtypes"]}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged or missing: {error}") from error
    leaves = {name: a.view(jnp.dtype(index["dtypes"][name])) for name, a in stored.items()}
    if wrong := [len(leaf) for leaf in leaves.values() if len(leaf) != rows]:
        raise DataError(f"{path} has {wrong[0]} rows; {INDEX} says {rows}.")
    return _rebuild(index["tree"], leaves)


def _open_empty(directory: Path) -> None:
    patterns = (INDEX, f"*/{INDEX}", "batch_*.npz", "*/batch_*.npz")
    if any(found for pattern in patterns for found in directory.glob(pattern)):
        raise RunDirError(
            f"{directory} has predictions already; give `PredictionWriter` another directory, or "
            "delete them."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f".{INDEX}").touch()
        (directory / f".{INDEX}").unlink()
    except OSError as error:
        raise RunDirError(
            f"cannot write in {directory} ({error}); pass `PredictionWriter` a directory that can "
            "be written, or made."
        ) from error


def _file_name(number: int) -> str:
    return f"batch_{number:06d}.npz"


def _save(path: Path, leaves: dict[str, np.ndarray]) -> None:
    # Not `np.savez`, whose own parameters' names no leaf could have.
    with zipfile.ZipFile(path, "w") as archive:
        for name, leaf in leaves.items():
            # bfloat16 and its like are no types of the file format; their bits are kept.
            known = leaf.view(f"u{leaf.itemsize}") if leaf.dtype.kind == "V" else leaf
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, known, allow_pickle=False)


def _by_name(tree: PyTree) -> dict[str, np.ndarray]:
    leaves: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _name(path)
        if name in leaves:
            raise DataError(f"predict_step returned two leaves of the name {name!r}; rename one.")
        leaves[name] = np.asarray(leaf)
    return leaves


def _name(path: Any) -> str:
    return leaf_name(path) if path else "predictions"


def _describe(tree: PyTree) -> Any:
    """Return the structure as JSON data, with names in place of the leaves."""

    def describe(node: Any) -> Any:
        if node is None or isinstance(node, str):
            return node
        if type(node) is dict and all(isinstance(key, str) for key in node):
            return {"dict": {key: describe(value) for key, value in node.items()}}
        if type(node) in (list, tuple):
            return {type(node).__name__: [describe(value) for value in node]}
        return {"dict": {name: name for name in jax.tree.leaves(node)}}

    return describe(jax.tree_util.tree_map_with_path(lambda path, _: _name(path), tree))


def _rebuild(described: Any, leaves: dict[str, np.ndarray]) -> PyTree:
    if described is None or isinstance(described, str):
        return None if described is None else leaves[described]
    ((kind, nodes),) = described.items()
    if kind == "dict":
        return {key: _rebuild(node, leaves) for key, node in nodes.items()}
    rebuilt = [_rebuild(node, leaves) for node in nodes]
    return rebuilt if kind == "list" else tuple(rebuilt)
