"""`LambdaCallback`: hooks as keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtrainer.callback import HOOKS, Callback
from jaxtrainer.errors import ConfigError, OptionError, did_you_mean
from jaxtrainer.hooks import check_hooks


class LambdaCallback(Callback):
    """A callback made of functions; the hooks that are not given cost nothing.

    Args:
        **hooks: Any hook of `Callback` by name, as a function of the same parameters without
            `self`.

    Raises:
        OptionError: For a hook that does not exist, naming the close match.
        ConfigError: For a hook whose parameters do not fit.

    Example:
        >>> callback = LambdaCallback(on_train_epoch_end=lambda run: print(run.metrics))
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, hook in hooks.items():
            if not callable(hook):
                raise ConfigError(f"LambdaCallback({name}={hook!r}): pass a function.")
        # On the instance, because that is where a hook counts as overridden.
        vars(self).update(hooks)
        check_hooks(self)
        for name in hooks:
            if name not in HOOKS:
                hint = did_you_mean(name, HOOKS) or f" Hooks: {', '.join(HOOKS)}."
                raise OptionError(f"LambdaCallback got an unknown hook {name!r}.{hint}")
