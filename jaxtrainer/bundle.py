"""What is left of a failure: the step's inputs and a script that runs it again, in a directory.

Arrays are `.npz` without pickle, the rest is JSON and text; the step itself is StableHLO as
`jax.export` makes it. Imports nothing of the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

_SCRIPT = '''"""Runs the step once more, and says which of its outputs are finite."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

here = Path(__file__).parent
manifest = json.loads((here / "manifest.json").read_text())
files = {name: np.load(here / name, allow_pickle=False) for name in manifest["files"]}
inputs = [files[x["file"]][x["name"]].view(x["dtype"]) for x in manifest["inputs"]]


def like_the_step(*inputs):
    return [jnp.zeros(x["shape"], x["dtype"]) for x in manifest["outputs"]]


stub = jax.export.export(jax.jit(like_the_step, keep_unused=True))(*inputs)
step = dataclasses.replace(stub, mlir_module_serialized=(here / "step.stablehlo").read_bytes())
names = [x["name"] for x in manifest["outputs"]]
for name, value in zip(names, step.call(*inputs), strict=True):
    value = np.asarray(value).astype(np.float64)
    bad = value.size - np.isfinite(value).sum()
    print(f"{name} {list(value.shape)}:", f"{bad} not finite" if bad else "finite")
'''


def write_bundle(
    directory: Path,
    fn: Callable[..., Sequence[Any]],
    inputs: Sequence[tuple[str, Any]],
    outputs: Sequence[str],
    readme: str,
    jaxpr: str,
) -> None:
    """Write everything that is needed to run a step again.

    Args:
        directory: Where; made if missing.
        fn: From the inputs, in order, to the outputs.
        inputs: Name and array of each. Those of `batch` go into a file of their own.
        outputs: Names of the outputs, numbers each.
        readme: What happened; how to use the directory is added.
        jaxpr: The step as text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arrays = [(name, np.asarray(x)) for name, x in inputs]
    tables: dict[str, dict[str, np.ndarray]] = {"state.npz": {}, "batch.npz": {}}
    entries: list[dict[str, str]] = []
    for name, array in arrays:
        file = "batch.npz" if name.split("/")[0] == "batch" else "state.npz"
        tables[file][name] = _plain(array)
        entries.append({"file": file, "name": name, "dtype": array.dtype.name})
    for file, table in tables.items():
        np.savez(directory / file, allow_pickle=False, **table)
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for _, a in arrays]
    results = [
        {"name": name, "shape": list(x.shape), "dtype": x.dtype.name}
        for name, x in zip(outputs, jax.eval_shape(fn, *specs), strict=True)
    ]
    manifest = {"jax": jax.__version__, "files": [*tables], "inputs": entries, "outputs": results}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    (directory / "step.txt").write_text(jaxpr, encoding="utf-8")
    usage = _export(directory, fn, specs)
    (directory / "README.md").write_text(f"{readme}\n\n{usage}\n", encoding="utf-8")


def _export(directory: Path, fn: Callable[..., Any], specs: Sequence[Any]) -> str:
    """Write the step and the script, and return how to use what there is."""
    files = (
        "`state.npz` has the state before the batch, `batch.npz` the batch (NumPy, no pickle; "
        "`manifest.json` has names and dtypes), `step.txt` the traced step."
    )
    try:
        # What the step does not use is an argument all the same, as in the script's stand-in.
        exported = jax.export.export(jax.jit(fn, keep_unused=True))(*specs)
    except Exception as error:
        return f"{files} The step itself could not be exported: {error}"
    (directory / "step.stablehlo").write_bytes(exported.mlir_module_serialized)
    (directory / "run.py").write_text(_SCRIPT, encoding="utf-8")
    return (
        f"{files} `python run.py` runs the step on them once more; it needs "
        f"JAX {jax.__version__} only."
    )


def _plain(array: np.ndarray) -> np.ndarray:
    """Return bits that NumPy can store where it does not know the dtype (bfloat16)."""
    if array.dtype.isbuiltin == 1:
        return array
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))
