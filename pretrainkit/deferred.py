"""Packages of which a small part is used and whose `__init__` loads a thousand modules more: the part without the rest.

Comes in: the name of such a package. Goes out: a module in `sys.modules` whose submodules can be imported, and whose
own code runs when something of its own is first asked for. Guarantee: whoever uses the package in any other way gets
the whole of it, the same objects included; only the time of loading moves.

`import lightning` and `import litgpt` load transformers, scipy, matplotlib, pandas and scikit-learn by way of
torchmetrics: most of a short run's start (docs/performance.md, "Training"). Training needs none of them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

_lock = threading.RLock()
_running: list[ModuleType] = []


class _Deferred(ModuleType):
    """A module whose code has not run yet."""

    def __getattr__(self, name: str) -> Any:
        # Python asks here for what the module lacks. Submodules are the import system's business.
        if name == "__version__":
            return importlib.metadata.version(self.__name__)
        paths = self.__dict__.get("__path__")
        if name.startswith("__") or (paths and PathFinder.find_spec(f"{self.__name__}.{name}", paths)):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _run(self, name)
        return getattr(self, name)


def _run(module: ModuleType, wanted: str) -> None:
    """Run a deferred module's own code, once."""
    with _lock:  # another thread may be at it
        if type(module) is ModuleType:
            return
        if module in _running:  # its own code asks, before it has got that far
            raise AttributeError(f"partially initialized module {module.__name__!r} has no attribute {wanted!r}")
        deferred: Any = module
        _running.append(module)
        try:
            deferred.__spec__.loader.exec_module(module)
            deferred.__class__ = ModuleType
        finally:
            _running.remove(module)


def defer(*names: str) -> None:
    """Let these packages' own code wait until it is needed; what is loaded already stays as it is.

    Raises:
        ModuleNotFoundError: A package is not installed.

    Example:
        >>> defer("lightning")
        >>> from lightning.fabric import Fabric  # lightning.pytorch is not loaded
    """
    for name in names:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        module = importlib.util.module_from_spec(spec)
        module.__class__ = _Deferred
        sys.modules[name] = module


def defer_functions(module_name: str, *functions: str) -> None:
    """The same for a module of which others import functions by name: each loads the module when it is called."""
    if module_name in sys.modules:
        return
    defer(module_name)
    module = sys.modules[module_name]
    for name in functions:
        setattr(module, name, _forward(module, name))


def _forward(module: ModuleType, name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        _run(module, name)
        return getattr(module, name)(*args, **kwargs)

    return forward


@contextlib.contextmanager
def compiler_aside() -> Iterator[None]:
    """Let what is imported in this block name `torch._dynamo.OptimizedModule` without loading PyTorch's compiler.

    Lightning Fabric imports that class to recognise compiled modules; there are none before the compiler is loaded.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    stand_in = ModuleType(name)
    stand_in.__dict__["OptimizedModule"] = _CompiledModule
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


class _IsCompiled(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        compiler = sys.modules.get("torch._dynamo")
        return compiler is not None and isinstance(instance, compiler.OptimizedModule)


class _CompiledModule(metaclass=_IsCompiled):
    """Has the instances of `torch._dynamo.OptimizedModule`."""
