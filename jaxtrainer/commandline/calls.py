"""The calls of the trainer as commands: everything made from options, then one call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxtrainer.callbacks import PredictionWriter
from jaxtrainer.commandline.archive import check_free, write_archive
from jaxtrainer.commandline.loaders import arguments_of, training_loader
from jaxtrainer.commandline.options import Options
from jaxtrainer.commandline.request import read_request
from jaxtrainer.commandline.saved import SavedConfiguration
from jaxtrainer.distributed import is_first
from jaxtrainer.errors import ConfigError
from jaxtrainer.trainer import Trainer


def run(call: str, argv: Sequence[str]) -> int:
    """Run `jaxtrainer fit` and its like; return the exit code.

    Raises:
        ConfigError: For a command line or a file that cannot work, in one line.
        SystemExit: After `--help`, and as `Trainer.fit` does.
    """
    options = Options(read_request(call, argv))
    if options.request.prints:
        sys.stdout.write(options.text())
        return 0
    if options.module is None:
        raise ConfigError(f"{call} needs a module: `jaxtrainer {call} --module package:Class`.")
    made = options.made()
    {"fit": _fit, "plan": _plan, "predict": _predict}.get(call, _evaluate)(call, options, made)
    return 0


def _fit(call: str, options: Options, made: Any) -> None:
    saved = SavedConfiguration(options.text(), made.trainer.default_root_dir)
    trainer = _trainer(made, saved)
    saved.trainer = trainer
    module, data = _user_objects(options, made)
    result = trainer.fit(module, **arguments_of(call, data), ckpt_path=made.ckpt_path)
    if is_first():
        print(result)


def _evaluate(call: str, options: Options, made: Any) -> None:
    trainer = _trainer(made)
    module, data = _user_objects(options, made)
    arguments = {**arguments_of(call, data), "ckpt_path": made.ckpt_path, "verbose": made.verbose}
    getattr(trainer, call)(module, **arguments)


def _predict(call: str, options: Options, made: Any) -> None:
    writers = [c for c in made.trainer.callbacks if isinstance(c, PredictionWriter)]
    if made.output is None and not writers:
        raise ConfigError(
            "predict: pass `--output FILE.npz`, `--output DIRECTORY`, or a PredictionWriter among "
            "`--trainer.callbacks`."
        )
    output: str = made.output or ""
    is_archive = output.endswith(".npz")
    if is_archive:
        check_free(Path(output))
    writer = [PredictionWriter(output)] if output and not is_archive else []
    trainer = _trainer(made, *writer)
    module, data = _user_objects(options, made)
    predictions = trainer.predict(
        module,
        **arguments_of(call, data),
        ckpt_path=made.ckpt_path,
        return_predictions=is_archive,
    )
    if is_archive:
        write_archive(Path(output), predictions)
    if output and is_first():
        print(output)


def _plan(call: str, options: Options, made: Any) -> None:
    trainer = _trainer(made)
    module, data = _user_objects(options, made)
    asked = {name: made[name] for name in ("mesh", "num_devices", "accelerator")}
    Console().print(trainer.plan(module, training_loader(data, module), **asked))


def _trainer(made: Any, *more: Any) -> Trainer:
    given = dict(vars(made.trainer))
    # First the trainer, which joins the other processes: data may look at the devices.
    return Trainer(**{**given, "callbacks": [*given["callbacks"], *more]})


def _user_objects(options: Options, made: Any) -> tuple[Any, Any]:
    """Make module and data; errors in here are the user's, with their traceback."""
    module = options.module(**_arguments(made, "module"))
    data = None if options.data is None else options.data(**_arguments(made, "data"))
    return module, data


def _arguments(made: Any, name: str) -> dict[str, Any]:
    found = made.get(name)
    return {} if found is None or isinstance(found, str) else dict(vars(found))
