"""What a rank never uses is not loaded when it starts.

Half of a rank's imports, seconds of CPU time, came from four places in DiffSynth and torchvision that load all of
torch._dynamo, torch._inductor, sympy or pandas for something that no Wan pipeline calls. While these modules are
loaded they meet stand-ins; what they would need comes when it is asked for. `install` costs nothing and imports no
torch. Leaves out what a rank does use.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

_FLEX = "torch.nn.attention.flex_attention"
_DYNAMO = "torch._dynamo.utils"


def install() -> None:
    """From here on. Safe to call twice."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _missing(_name: str) -> None:
    """An import of it raises ImportError, for which its importer is prepared."""


def _on_call(name: str) -> ModuleType:
    """A module whose every name is a function that loads the real module when it is called."""
    module = ModuleType(name)

    def attribute(function: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return getattr(importlib.import_module(name), function)(*arguments, **named)

        return call

    module.__getattr__ = attribute  # type: ignore[method-assign]
    return module


# By the module that is loaded: what it imports, and what stands in for that meanwhile.
_STAND_INS: dict[str, dict[str, Callable[[str], ModuleType | None]]] = {
    # Compiles flex attention at once, if there is any. Without, it offers all its other kernels.
    "diffsynth.core.attention.attention": {_FLEX: _missing},
    "diffsynth.models.wan_animate_2_dit": {_FLEX: _on_call},
    "torchvision.ops.roi_align": {"torch._dynamo": _on_call, _DYNAMO: _on_call},
}
# Training data, with pandas. Whoever asks the package for something gets the real one.
_LATER = "diffsynth.core.data"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        wrap = _LOADERS.get(fullname)
        if wrap is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = wrap(spec.loader)
        return spec


class _Wrapped(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module


class _WithStandIns(_Wrapped):
    def exec_module(self, module: ModuleType) -> None:
        with _in_place(_STAND_INS[module.__name__]):
            self._loader.exec_module(module)


class _Later(_Wrapped):
    def exec_module(self, module: ModuleType) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            del module.__getattr__
            self._loader.exec_module(module)
            return getattr(module, name)

        module.__getattr__ = attribute  # type: ignore[method-assign]


@contextlib.contextmanager
def _in_place(stand_ins: dict[str, Callable[[str], ModuleType | None]]) -> Iterator[None]:
    """For modules that are not loaded yet."""
    placed = [name for name in stand_ins if name not in sys.modules]
    for name in placed:
        sys.modules[name] = stand_ins[name](name)  # type: ignore[assignment]  # None: not to be imported
    try:
        yield
    finally:
        for name in placed:
            del sys.modules[name]


_LOADERS: dict[str, Callable[[Any], importlib.abc.Loader]] = {
    **dict.fromkeys(_STAND_INS, _WithStandIns),
    _LATER: _Later,
}
