"""Context managers that fail where something compiles, or waits for the device.

May import levels 0 to 2.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np

from jaxtrainer.callback import Callback
from jaxtrainer.run import Run

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/backend_compile_duration",
)
_READS = (
    *("__array__", "__bool__", "__complex__", "__float__", "__format__", "__index__", "__int__"),
    *("__repr__", "__str__", "block_until_ready", "item", "tobytes", "tolist"),
)
_OF_TREES = ("block_until_ready", "device_get")
_CONVERTERS: tuple[tuple[Any, str], ...] = (
    *((np, "array"), (np, "asarray"), (np, "ascontiguousarray")),
    *((jax, name) for name in _OF_TREES),
)
"""On the CPU backend NumPy looks into the array's memory, and calls none of its methods."""

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIBRARIES = tuple(os.path.dirname(m.__file__ or "?") + os.sep for m in (jax, np))
# A value that is handed to `run.log` is read for whoever does so.
_IN_BETWEEN = (
    *(os.path.join(_PACKAGE, name) for name in ("run.py", "metrics.py")),
    os.path.join(_PACKAGE, "testing"),
)


@contextmanager
def assert_no_retrace() -> Iterator[None]:
    """Fail if JAX traces or compiles anything in the block, naming what and why.

    A call of `fit` compiles its programs in its first epoch; for the epochs after it see
    `FromEpoch`.

    Raises:
        AssertionError: At the end of the block.

    Example:
        >>> import jax.numpy as jnp
        >>> double = jax.jit(lambda x: 2 * x)
        >>> y = double(jnp.ones(3))
        >>> with assert_no_retrace():
        ...     y = double(y)
    """
    names: list[str] = []

    def listen(event: str, duration_secs: float, **of: str | int) -> None:
        if event in _COMPILE_EVENTS:
            names.append(str(of.get("fun_name", "a function")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with _explanations() as why:
            yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if names:
        found = ", ".join(dict.fromkeys(names))
        lines = [f"expected no compilation, got: {found}", *why]
        hint = (
            "Give a compiled function the same shapes, dtypes and weak types each time, and call "
            "eager functions once before the block."
        )
        raise AssertionError("\n".join([*lines, hint]))


@contextmanager
def _explanations() -> Iterator[list[str]]:
    """Collect what JAX says of functions that it traces again."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "CACHE MISS" in (text := record.getMessage()):
                texts.append(text)

    handler, logger = Keep(), logging.getLogger("jax")
    before, propagates = jax.config.values["jax_explain_cache_misses"], logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    jax.config.update("jax_explain_cache_misses", True)
    try:
        yield texts
    finally:
        jax.config.update("jax_explain_cache_misses", before)
        logger.propagate = propagates
        logger.removeHandler(handler)


@contextmanager
def assert_no_sync() -> Iterator[None]:
    """Fail where the block reads a value from the device, or waits for it.

    Seen are reads of this thread by NumPy, by Python (`float(x)`, `if x:`, `print(x)`) and by
    `block_until_ready`, on every backend. The trainer's own reads, for reports and checkpoints,
    are none: a whole `fit` may be in the block, and what is found is in a hook of yours.

    Raises:
        AssertionError: At the read, with its place.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = jnp.ones(())
        >>> with assert_no_sync():  # doctest: +ELLIPSIS
        ...     print(float(loss))
        Traceback (most recent call last):
        ...
        AssertionError: __float__ of a float32[] on the device, which waits for it...
    """
    thread = threading.get_ident()
    kind = type(jax.device_put(np.float32(0)))

    def guarded(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            is_own = threading.get_ident() == thread
            given = arguments[0] if is_own and arguments else None
            several = given if isinstance(given, list | tuple) else [given]
            if name in _OF_TREES:
                several = jax.tree.leaves(given)
            found = next((x for x in several if type(x) is kind), None)
            if found is not None and (place := _place_of(sys._getframe(1))):
                shape = f"{found.dtype}{list(found.shape)}"
                raise AssertionError(
                    f"{name} of a {shape} on the device, which waits for it, at {place}. Log the "
                    "value and take it from `on_report`, which comes one report later."
                )
            return read(*arguments, **options)

        return call

    with ExitStack() as restore:
        for owner, name in (*((kind, name) for name in _READS), *_CONVERTERS):
            restore.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, guarded(name, getattr(owner, name)))
        yield


def _place_of(frame: FrameType | None) -> str | None:
    """Return file and line of who reads; None if it is the trainer."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((*_LIBRARIES, *_IN_BETWEEN)):
            break
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_PACKAGE + os.sep):
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class FromEpoch(Callback):
    """Holds guards from the start of an epoch to the end of training.

    Args:
        epoch: Its index. By 1 everything that every epoch needs is compiled.
        guards: `assert_no_retrace`, `assert_no_sync`, or context managers of your own.

    Example:
        >>> callbacks = [FromEpoch(1, assert_no_retrace, assert_no_sync)]
    """

    may_log = False

    def __init__(self, epoch: int, *guards: Callable[[], AbstractContextManager[Any]]) -> None:
        self.epoch = epoch
        self.guards = guards
        self._held = ExitStack()

    def on_train_epoch_start(self, run: Run) -> None:
        """Begin."""
        if run.epoch == self.epoch:
            for guard in self.guards:
                self._held.enter_context(guard())

    def on_train_end(self, run: Run) -> None:
        """Fail if a guard has something to say."""
        self._held.close()

    def teardown(self, run: Run) -> None:
        """Take the guards away after an exception, too."""
        self._held.close()
