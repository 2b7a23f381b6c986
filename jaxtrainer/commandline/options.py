"""The options of a call, typed by the signatures of trainer, module and data."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jsonargparse
from jsonargparse import ArgumentParser, set_parsing_settings

from jaxtrainer.callback import Callback
from jaxtrainer.commandline.imports import locate, split
from jaxtrainer.commandline.misfit import denied, described
from jaxtrainer.commandline.request import Request, add_general
from jaxtrainer.datamodule import DataModule
from jaxtrainer.errors import ConfigError
from jaxtrainer.loggers import Logger
from jaxtrainer.module import TrainModule
from jaxtrainer.settings import hide
from jaxtrainer.trainer import Trainer

_DESCRIPTION = {
    "fit": "Train a module.",
    "validate": "Validate a module, and print its metrics.",
    "test": "Test a module, and print its metrics.",
    "predict": "Predict with a module, and write what it predicts.",
    "plan": "Say what a training step costs, without allocating model or state.",
}
CALLS = tuple(_DESCRIPTION)
_PLACE = {
    "ckpt_path": (str | None, None, "checkpoint: `last`, `best`, a run or a step directory"),
    "verbose": (bool, True, "print a table of the metrics"),
    "output": (str | None, None, "FILE.npz for all predictions, or a directory of batches"),
    "mesh": (dict[str, int] | Literal["auto"] | None, None, "axis sizes, or `auto`"),
    "num_devices": (int | None, None, "devices of a mesh that does not say"),
    "accelerator": (str | None, None, "estimate the time of a step on this kind of device"),
}
_OF_CALL = {
    "fit": ("ckpt_path",),
    "validate": ("ckpt_path", "verbose"),
    "test": ("ckpt_path", "verbose"),
    "predict": ("ckpt_path", "output"),
    "plan": ("mesh", "num_devices", "accelerator"),
}
_OF_TRAINER = {
    "callbacks": (list[Callback], [], "by class: `--trainer.callbacks+ EarlyStopping`"),
    "logger": (Logger | list[Logger] | None, None, "by class: `--trainer.logger CSVLogger`"),
    "mesh": (dict[str, int] | None, None, "device mesh as axis sizes; all devices by default"),
    "compilation_cache": (bool | str | None, None, "its directory, or false for none"),
}
"""Options whose Python types say more than can be written, or in another order."""

_PLAIN = (bool, int, float, str, list, tuple, dict)
_MOST_NAMES = 8
_known: set[str] = set()


class Options:
    """The options of a call, and what they mean.

    Args:
        request: What the command line asks for.

    Attributes:
        config: All options, as a namespace of plain data.

    Raises:
        ConfigError: For an option, a type or a class that cannot be, in one line.
        SystemExit: After `--help`.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        allow(request.allowed)
        self.module = _class_of_module(request)
        self.data = _maker_of_data(request)
        self.parser = build_parser(request.call, self.module, self.data)
        self.config = self._parse()

    def text(self) -> str:
        """Return the configuration as YAML: what `--config` reads, without secrets."""
        import yaml

        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    def plain(self) -> dict[str, Any]:
        """Return the configuration as JSON data."""
        import json

        own = {"config", "allow_import", "print_config", "seed"}
        config = self.config.clone()
        for name, target in (("module", self.module), ("data", self.data)):
            _drop_objects(config.get(name), target)
        dumped = self.parser.dump(config, format="json", skip_validation=True, skip_unset=False)
        found = {k: v for k, v in json.loads(dumped).items() if k not in own}
        sections = {}
        for name, chosen in (("module", self.request.module), ("data", self.request.data)):
            arguments = found.pop(name, None)
            if chosen is not None:
                sections[name] = {"class_path": ":".join(split(chosen))}
                if isinstance(arguments, dict) and arguments:
                    sections[name]["init_args"] = arguments
        return hide({**sections, **found})

    def made(self) -> Any:
        """Return the options with callbacks, loggers and other objects made."""
        return self.parser.instantiate(self.config)

    def _parse(self) -> Any:
        config = self.parser.get_defaults()
        for path, options in self.request.files.items():
            config = self._step(
                lambda options=options, config=config: self.parser.parse_object(
                    _for_call(options, self.request.call), namespace=config
                ),
                f"{path}: ",
            )
        argv = self.request.argv
        config = self._step(lambda: self.parser.parse_args(argv, namespace=config), "")
        self._refuse_hidden()
        for name, target in (("module", self.module), ("data", self.data)):
            self._drop_passed_on(config.get(name), name, target)
        return config

    def _drop_passed_on(self, arguments: Any, name: str, target: Any) -> None:
        """Leave to a function what its `**options` hand on, where nobody has said it."""
        if target is None or arguments is None or isinstance(arguments, str):
            return
        said = {key for options in self.request.files.values() for key in options.get(name, ())}
        words = [w for w in self.request.argv if w.startswith(f"--{name}.")]
        said |= {word.partition("=")[0].split(".")[1] for word in words}
        own = inspect.signature(target).parameters
        for key in [*vars(arguments)]:
            if key not in own and key not in said:
                delattr(arguments, key)

    def _step(self, parse: Any, where: str) -> Any:
        said = ""
        for _ in range(_MOST_NAMES):
            try:
                return parse()
            except (jsonargparse.ArgumentError, KeyError, TypeError, ValueError) as error:
                said = str(error)
            home = denied(said)
            if home is None or home not in (homes := _homes(self.request.paths)):
                break
            # Typed as `jax.nn.relu`, and at home in a private module.
            self.request.allowed += (home, *homes)
            allow(self.request.allowed)
        raise ConfigError(where + described(said, self.parser))

    def _refuse_hidden(self) -> None:
        given = {word.partition("=")[0] for word in self.request.argv}
        for key, path in self.request.hidden.items():
            if f"--{key}" not in given:
                raise ConfigError(f"{path} hides the value of {key}; pass `--{key}`.")


def _homes(paths: Iterable[str]) -> list[str]:
    """Return where what was typed is defined, as far as it is imported by now."""
    found: list[Any] = [getattr(sys.modules.get(m), n, None) for m, n in map(split, paths)]
    return [f"{x.__module__}.{x.__qualname__}" for x in found if hasattr(x, "__qualname__")]


def _drop_objects(arguments: Any, target: Any) -> None:
    """Leave defaults that are functions or other objects to the code, which says them better."""
    if target is None or arguments is None or isinstance(arguments, str):
        return
    for name, parameter in inspect.signature(target).parameters.items():
        value = vars(arguments).get(name)
        is_object = not isinstance(parameter.default, _PLAIN) and parameter.default is not None
        if is_object and value is not None and _is_default(value, parameter.default):
            delattr(arguments, name)


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    module, _, name = value.rpartition(".") if isinstance(value, str) else ("", "", "")
    return bool(module) and getattr(sys.modules.get(module), name, None) is default


def allow(paths: tuple[str, ...]) -> None:
    """Let values name what is below these paths, and nothing else."""
    stale = _known - {*paths}
    _known.update(paths)
    set_parsing_settings(
        import_path_denylist=["*", *sorted(stale)],
        import_path_allowlist=[*paths],
        instantiate_subclass_spec_in_any=False,
    )


def build_parser(call: str, module: Any, data: Any) -> ArgumentParser:
    """Return the parser of the options of a call.

    Args:
        call: One of `CALLS`.
        module: Class of the module, or None.
        data: Class or function that makes the data, or None.
    """
    parser = ArgumentParser(
        prog=f"jaxtrainer {call}",
        description=_DESCRIPTION[call],
        exit_on_error=False,
        allow_abbrev=False,
    )
    general = _Without(parser, {"--module": module, "--data": data})
    add_general(general)
    for name in _OF_CALL[call]:
        kind, default, text = _PLACE[name]
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    skipped: set[str | int] = {"clock", *_OF_TRAINER}
    parser.add_class_arguments(Trainer, "trainer", skip=skipped, instantiate=False)
    for name, (kind, default, text) in _OF_TRAINER.items():
        group = parser.groups["trainer"] if parser.groups else parser
        group.add_argument(f"--trainer.{name}", type=kind, default=default, help=text)
    for name, target in (("module", module), ("data", data)):
        if target is not None:
            _add_target(parser, target, name)
    _say(parser, {name: general.texts[name] for name in ("--module", "--data")})
    return parser


class _Without:
    """A parser that leaves out what an option of a class takes the place of."""

    def __init__(self, parser: ArgumentParser, targets: Mapping[str, Any]) -> None:
        self.parser, self.targets = parser, targets
        self.texts: dict[str, dict[str, Any]] = {}

    def add_argument(self, name: str, **options: Any) -> None:
        self.texts[name] = options
        if self.targets.get(name) is None:
            self.parser.add_argument(name, **options)


def _say(parser: ArgumentParser, texts: Mapping[str, Any]) -> None:
    """Say what is in the place of the options that jsonargparse makes of a class."""
    for action in parser._actions:
        for name in action.option_strings:
            if name in texts:
                action.help, action.metavar = texts[name]["help"], texts[name]["metavar"]


def _add_target(parser: ArgumentParser, target: Any, name: str) -> None:
    if inspect.isclass(target):
        parser.add_class_arguments(target, name, fail_untyped=False, instantiate=False)
    else:
        parser.add_function_arguments(target, name, fail_untyped=False)


def _for_call(options: Mapping[str, Any], call: str) -> dict[str, Any]:
    """Leave out what a file says for another call."""
    return {k: v for k, v in options.items() if k not in _PLACE or k in _OF_CALL[call]}


def _class_of_module(request: Request) -> Any:
    if request.module is None:
        return None
    found = locate(request.module, request.allowed, "module")
    if not (inspect.isclass(found) and issubclass(found, TrainModule)):
        raise ConfigError(f"module: {request.module} is no class of a TrainModule, but {found!r}.")
    return found


def _maker_of_data(request: Request) -> Any:
    if request.data is None:
        return None
    found = locate(request.data, request.allowed, "data")
    if not callable(found):
        raise ConfigError(
            f"data: {request.data} is a {type(found).__name__}; name a {DataModule.__name__}, or a "
            "function that returns loaders."
        )
    return found
