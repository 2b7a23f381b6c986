"""What stands around the calls of a model's modules, for a trace that asks for it.

First of all their paths in the names of what is traced. Knows models and `jax.named_scope`,
nothing of training. Imports nothing of the package.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import wraps
from typing import Any

import jax
from flax import nnx
from flax.nnx import bridge

SCOPE = "@"
"""What stands around a module's path in the names of `jax.named_scope`."""

_PATH = re.compile(f"{SCOPE}([^{SCOPE}]*){SCOPE}")
_MARK = "_jaxtrainer_path"


def path_in(names: str) -> str | None:
    """Return the path of the innermost module among the names around an operation, or None.

    Args:
        names: As in an equation's `source_info.name_stack`, outer ones in front.

    Example:
        >>> path_in("transpose(jvp(@encoder@))/@encoder/first@")
        'encoder/first'
    """
    found = _PATH.findall(names)
    return found[-1] if found else None


Around = Callable[..., Any]
"""`around(path, fn, module, args, kwargs)`: calls a method of a module, in its own way."""


class WrappedCalls:
    """An adapter whose NNX models have the calls of their modules made by functions of yours.

    They stand around every public method, and `__call__`, of every module that `merge` makes, also
    inside `nnx.remat`, `nnx.scan` and their like, which make modules of their own. A path is that
    of `modules.module_types`, and empty for the model itself.

    Args:
        adapter: The model's `Adapter`.
        arounds: Outer ones in front.
    """

    def __init__(self, adapter: Any, arounds: Sequence[Around]) -> None:
        self.adapter = adapter
        self.arounds = tuple(arounds)
        self._paths: dict[int, str] = {}
        self._alive: list[Any] = []
        self._before: list[tuple[type, str, Any]] = []
        self._depth = 0
        self.types = adapter.types

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def merge(self, params: Any, model_state: Any, *, training: bool) -> Any:
        """See `Adapter.merge`."""
        model = self.adapter.merge(params, model_state, training=training)
        if not self._depth:
            return model
        # An id is a name as long as its object lives.
        self._alive.append(model)
        for path, module in _modules(model):
            self._paths[id(module)] = path
            _mark(module, path)
            self._wrap(type(module))
        return model

    @contextmanager
    def scopes(self) -> Iterator[None]:
        """Undo at the end of the outermost one what `merge` has done to the modules' classes."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                for cls, name, fn in reversed(self._before):
                    setattr(cls, name, fn)
                self._before.clear()
                self._paths.clear()
                self._alive.clear()

    def _wrap(self, module_type: type) -> None:
        done = {(cls, name) for cls, name, _ in self._before}
        for cls in module_type.__mro__:
            if cls in nnx.Module.__mro__:
                continue
            for name, fn in list(vars(cls).items()):
                is_public = name == "__call__" or not name.startswith("_")
                if is_public and _is_method(fn) and (cls, name) not in done:
                    self._before.append((cls, name, fn))
                    setattr(cls, name, self._wrapped(fn))

    def _wrapped(self, fn: Any) -> Any:
        @wraps(fn)
        def wrapped(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = self._paths.get(id(module), getattr(module, _MARK, None))
            if path is None:
                return fn(module, *args, **kwargs)
            call = fn
            for around in reversed(self.arounds):
                call = _inside(around, path, call)
            return call(module, *args, **kwargs)

        return wrapped


class NamedModules(WrappedCalls):
    """An adapter whose NNX models leave the paths of their modules in what is traced.

    A path is that of `modules.module_types`; the model itself has its class name.

    Args:
        adapter: The model's `Adapter`.
    """

    def __init__(self, adapter: Any) -> None:
        inner, others = adapter, ()
        if isinstance(adapter, WrappedCalls):
            inner, others = adapter.adapter, adapter.arounds
        super().__init__(inner, (_named, *others))


def scopes_of(adapter: Any) -> AbstractContextManager[None]:
    """Return the context in which an adapter's models may be called."""
    return adapter.scopes() if isinstance(adapter, WrappedCalls) else nullcontext()


def _named(path: str, fn: Any, module: Any, args: Any, kwargs: Any) -> Any:
    with jax.named_scope(f"{SCOPE}{path or type(module).__name__}{SCOPE}"):
        return fn(module, *args, **kwargs)


def _inside(around: Around, path: str, fn: Any) -> Any:
    @wraps(fn)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return around(path, fn, module, args, kwargs)

    return call


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(model, nnx.Module):
        for path, module in nnx.iter_modules(model):
            yield "/".join(map(str, path)), module


def _mark(module: Any, path: str) -> None:
    # Transforms of NNX make modules anew, with what is no array as it was. A module that refuses
    # attributes is known by its id only, as is Linen's bridge, which takes them for variables.
    if not isinstance(module, bridge.ToNNX):
        with suppress(Exception):
            setattr(module, _MARK, path)


def _is_method(fn: Any) -> bool:
    # `nnx.jit` makes an object of a method.
    return inspect.isfunction(fn) or type(fn).__name__ == "JitWrapped"
