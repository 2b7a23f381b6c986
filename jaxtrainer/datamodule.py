"""`DataModule`: the data of a project in one class, and where the loaders of a call come from.

Runs on the host only. May import levels 0 and 1, `callback` and `module`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtrainer.alike import once_per_host
from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, DataError, did_you_mean
from jaxtrainer.module import TrainModule
from jaxtrainer.run import Run
from jaxtrainer.vocabulary import IN_THE_STEP

HOOK_OF = {
    "train": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
_PREPARE_S = 6 * 3600.0
_HOOKS = ("prepare_data", "setup", "teardown", "on_exception", "state_dict", "load_state_dict")


class DataModule:
    """How to get, split and load the data of a project; given to the trainer as one object.

    `trainer.fit(module, datamodule)` asks it for loaders, and so do `validate`, `test` and
    `predict`. A loader that it does not define is asked of the module. Keep hyper-parameters as
    plain attributes. The position in the data is kept by the trainer, not by the data module.

    Example:
        >>> import numpy as np
        >>> from jaxtrainer import data
        >>> class Numbers(DataModule):
        ...     def __init__(self, batch_size=4):
        ...         self.batch_size = batch_size
        ...     def setup(self, stage):
        ...         self.train = {"x": np.arange(12.0), "y": np.arange(12.0) * 2}
        ...     def train_dataloader(self):
        ...         return data.from_arrays(self.train, batch_size=self.batch_size, shuffle=True)
    """

    def prepare_data(self) -> None:
        """Download or convert what is not there yet.

        Runs once a call, before `setup`; keep its results on disk. Of several processes the first
        of each host runs it, and the others wait, up to six hours.
        """

    def setup(self, stage: str) -> None:
        """Read and split the data for `"fit"`, `"validate"`, `"test"` or `"predict"`."""

    def train_dataloader(self) -> Any:
        """Return the training loader: any iterable of batches."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """Return what `fit` and `validate` validate on."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """Return what `test` reads."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """Return what `predict` reads."""
        raise NotImplementedError

    def teardown(self, stage: str) -> None:
        """Release what `setup` has opened; also after an exception."""

    def on_exception(self, exception: BaseException) -> None:
        """The call ends by an exception; `teardown` follows."""

    def state_dict(self) -> dict[str, Any]:
        """Return JSON data to keep in each checkpoint, e.g. how the data was split."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; after `setup`, before a loader is asked for."""


class DataHooks(Callback):
    """A data module among the callbacks: it is set up and torn down before them.

    Args:
        datamodule: The user's.
        call: `"fit"`, `"validate"`, `"test"` or `"predict"`.
    """

    may_log = False

    def __init__(self, datamodule: DataModule, call: str) -> None:
        self.datamodule = datamodule
        self.call = call

    @property
    def state_key(self) -> str:
        """One name for any class, so that a renamed one finds its state."""
        return "DataModule"

    def setup(self, run: Run) -> None:
        """Tell it which call it is."""
        self.datamodule.setup(self.call)

    def teardown(self, run: Run) -> None:
        """Tell it the same at the end."""
        self.datamodule.teardown(self.call)

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        return self.datamodule.state_dict()

    def restore(self, states: Mapping[str, Any]) -> None:
        """Give it its state back. Not `load_state_dict`: loaders depend on it, callbacks do not."""
        if self.state_key in states:
            self.datamodule.load_state_dict(states[self.state_key])


class Loaders:
    """Where the loaders of one call come from: its arguments, the data module, or the module.

    Args:
        call: The trainer's method, for messages.
        module: The user's module.
        datamodule: The user's data module, or None.
        given: Loaders by stage, as passed; the first may be a data module instead.

    Raises:
        ConfigError: If a data module and a loader are given, or a hook of it does not fit.
    """

    def __init__(
        self, call: str, module: TrainModule, datamodule: DataModule | None, **given: Any
    ) -> None:
        first = next(iter(given))
        if isinstance(given[first], DataModule) and datamodule is None:
            datamodule, given[first] = given[first], None
        self.call, self.module, self.datamodule, self.given = call, module, datamodule, given
        if datamodule is not None:
            self._check(datamodule)

    def _check(self, datamodule: DataModule) -> None:
        if not isinstance(datamodule, DataModule):
            hint = f"; write `{datamodule.__name__}()`" if isinstance(datamodule, type) else ""
            raise ConfigError(f"datamodule={datamodule!r} is no DataModule{hint}.")
        name = type(datamodule).__name__
        if any(loader is not None for loader in self.given.values()):
            raise ConfigError(
                f"{self.call} got both a loader and the data module {name}; pass one of them: "
                f"`{self.call}(module, datamodule)`."
            )
        for hook in (*HOOK_OF.values(), *_HOOKS):
            _check_parameters(datamodule, hook)
        for hook in (n for n in IN_THE_STEP if hasattr(datamodule, n)):
            raise ConfigError(f"{name}.{hook} is never called: {IN_THE_STEP[hook]}.")

    def has(self, stage: str) -> bool:
        """Return whether there is a loader for the stage; asks for none."""
        return self.given.get(stage) is not None or self._owner(stage) is not None

    def require(self, stage: str) -> None:
        """Raise ConfigError unless there is a loader for the stage."""
        if self.has(stage):
            return
        hook = HOOK_OF[stage]
        argument = "train_loader" if stage == "train" else "loader"
        owner = type(self.datamodule or self.module)
        own = [name for name in vars(owner) if not hasattr(DataModule, name)]
        raise ConfigError(
            f"{self.call} got no loader, and {owner.__name__} has no `{hook}`. Write "
            f"`{self.call}(module, {argument})`, pass a DataModule, or write "
            f"`def {hook}(self)`.{did_you_mean(hook, own, 0.75)}"
        )

    def get(self, stage: str) -> Any:
        """Return the loader for the stage, or None; called after `setup`.

        Raises:
            DataError: If a hook returned None.
        """
        owner = self._owner(stage)
        if self.given.get(stage) is not None or owner is None:
            return self.given.get(stage)
        loader = getattr(owner, HOOK_OF[stage])()
        if loader is None:
            raise DataError(
                f"{type(owner).__name__}.{HOOK_OF[stage]} returned None; end it with "
                "`return loader`."
            )
        return loader

    def prepare(self) -> None:
        """Call `prepare_data` of the data module, then that of the module, once on each host."""

        def job() -> None:
            for owner in (self.datamodule, self.module):
                if owner is not None:
                    owner.prepare_data()

        once_per_host(job, "prepare_data", _PREPARE_S)

    def _owner(self, stage: str) -> DataModule | TrainModule | None:
        for owner, base in ((self.datamodule, DataModule), (self.module, TrainModule)):
            own = getattr(type(owner), HOOK_OF[stage], None)
            if own is not None and own is not getattr(base, HOOK_OF[stage]):
                return owner
        return None


def _check_parameters(datamodule: DataModule, name: str) -> None:
    wanted = list(inspect.signature(getattr(DataModule, name)).parameters)[1:]
    signature = inspect.signature(getattr(datamodule, name))
    got = list(signature.parameters)
    try:
        signature.bind(*wanted)
        # A hook of a callback takes as many arguments, but the run.
        fits = "run" not in got
    except TypeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"{type(datamodule).__name__}.{name}({', '.join(['self', *got])}) does not fit; write "
            f"`def {name}({', '.join(['self', *wanted])})`."
        )
