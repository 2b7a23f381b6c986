"""The paths of a model's modules in the names of what is traced, for a trace that asks for them.

Knows models and `jax.named_scope`, nothing of training. Imports nothing of the package.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


class NamedModules:
    """An adapter whose NNX models leave the paths of their modules in what is traced.

    A path is that of `modules.module_types`; the model itself has its class name. What a module
    computes stands under it wherever one of its public methods, or `__call__`, was called; also
    inside `nnx.remat`, `nnx.scan` and their like, which make modules of their own.

    Args:
        adapter: The model's `Adapter`.
    """

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._paths: dict[int, str] = {}
        self._alive: list[Any] = []
        self._before: list[tuple[type, str, Any]] = []
        self.types = adapter.types

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def merge(self, params: Any, model_state: Any, *, training: bool) -> Any:
        """See `Adapter.merge`."""
        model = self._adapter.merge(params, model_state, training=training)
        # An id is a name as long as its object lives.
        self._alive.append(model)
        for path, module in _modules(model):
            self._paths[id(module)] = path
            _mark(module, path)
            self._scope(type(module))
        return model

    @contextmanager
    def scopes(self) -> Iterator[None]:
        """Undo at the end what `merge` has done to the modules' classes."""
        try:
            yield
        finally:
            for cls, name, fn in self._before:
                setattr(cls, name, fn)
            self._before.clear()

    def _scope(self, module_type: type) -> None:
        done = {(cls, name) for cls, name, _ in self._before}
        for cls in module_type.__mro__:
            if cls in nnx.Module.__mro__:
                continue
            for name, fn in list(vars(cls).items()):
                is_public = name == "__call__" or not name.startswith("_")
                if is_public and _is_method(fn) and (cls, name) not in done:
                    self._before.append((cls, name, fn))
                    setattr(cls, name, self._scoped(fn))

    def _scoped(self, fn: Any) -> Any:
        @wraps(fn)
        def scoped(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = self._paths.get(id(module)) or getattr(module, _MARK, None)
            if path is None:
                return fn(module, *args, **kwargs)
            with jax.named_scope(f"{SCOPE}{path}{SCOPE}"):
                return fn(module, *args, **kwargs)

        return scoped


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(model, nnx.Module):
        for path, module in nnx.iter_modules(model):
            yield "/".join(map(str, path)) or type(module).__name__, module


def _mark(module: Any, path: str) -> None:
    # Transforms of NNX make modules anew, with what is no array as it was. A module that refuses
    # attributes is known by its id only, as is Linen's bridge, which takes them for variables.
    if not isinstance(module, bridge.ToNNX):
        with suppress(Exception):
            setattr(module, _MARK, path)


def _is_method(fn: Any) -> bool:
    # `nnx.jit` makes an object of a method.
    return inspect.isfunction(fn) or type(fn).__name__ == "JitWrapped"
