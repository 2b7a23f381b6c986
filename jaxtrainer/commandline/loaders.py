"""What `--data` made, as the arguments of a call of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrainer.datamodule import DataModule
from jaxtrainer.errors import ConfigError, did_you_mean

STAGES = ("train", "val", "test", "predict")
_STAGE_OF = {"validate": "val", "test": "test", "predict": "predict"}


def arguments_of(call: str, made: Any) -> dict[str, Any]:
    """Return `train_loader`, `val_loader`, `loader` or `datamodule` for a call.

    Args:
        call: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        made: A DataModule; a dict of loaders by `STAGES`; a tuple `(train, val)`; or one loader,
            for whatever is called. None: the module has its own.

    Raises:
        ConfigError: If it has no loader for the call, saying what it has.
    """
    if made is None:
        return {}
    if isinstance(made, DataModule):
        return {"datamodule": made}
    if isinstance(made, Mapping):
        return _by_stage(call, made)
    if isinstance(made, tuple):
        if len(made) != 2:
            raise ConfigError(f"data: a tuple is (train, val); this one has {len(made)} entries.")
        return _by_stage(call, dict(zip(STAGES, made, strict=False)))
    return {"train_loader" if call == "fit" else "loader": made}


def _by_stage(call: str, loaders: Mapping[str, Any]) -> dict[str, Any]:
    for name in loaders:
        if name not in STAGES:
            raise ConfigError(
                f"data: a dict of loaders has the keys {', '.join(STAGES)}, got {name!r}."
                f"{did_you_mean(str(name), STAGES)}"
            )
    if call == "fit":
        return {f"{name}_loader": loaders.get(name) for name in ("train", "val")}
    stage = _STAGE_OF[call]
    if loaders.get(stage) is None:
        raise ConfigError(
            f"{call} needs a loader {stage!r}, and --data has made {', '.join(loaders)}; return "
            f"`{{{stage!r}: loader}}`, or a DataModule."
        )
    return {"loader": loaders[stage]}


def training_loader(made: Any, module: Any) -> Any:
    """Return the training loader for a plan; a DataModule is set up first."""
    owner = made if isinstance(made, DataModule) else module if made is None else None
    if owner is not None:
        for hook in ("prepare_data", "setup"):
            if (found := getattr(owner, hook, None)) is not None and isinstance(owner, DataModule):
                found(*(["fit"] if hook == "setup" else []))
        return owner.train_dataloader()
    return arguments_of("fit", made).get("train_loader")
