"""Make transformers' Auto classes know the zoo, without importing transformers, or our adapter to it, for everybody.

transformers looks models up by name in tables, and imports a model's module when it is asked for. The adapter is entered there as one more
name, as soon as the tables exist: nothing of ours is loaded until somebody opens one of our folders.

``import hybridzoo`` does this, and so does ``import torch`` where the package is installed, through torch's entry-point group (see
pyproject.toml): programs that know nothing of the zoo, such as ``lm_eval --model hf``, read our folders without running code out of them.
"""

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_when_loaded"]

_AUTO = "transformers.models.auto."
# the tables, and what is loaded after them, for when they are only half loaded as this is called: they import torch themselves
_WATCHED = (_AUTO + "auto_mappings", _AUTO + "configuration_auto", _AUTO + "modeling_auto")
_ADAPTER = __package__ + ".hf"
# where transformers looks for the class that it found under the name "hybridzoo"
_ALIAS, _CONFIG = "transformers.models.hybridzoo", "HybridZooConfig"


class _LoaderThenEnter(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _enter()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _LoaderThenEnter(spec.loader)
                return spec
        return None


def register_when_loaded() -> None:
    """Enter the adapter into transformers' tables, now or when they are first used. Calling it again changes nothing."""
    _enter()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter() -> None:
    for name in _WATCHED:
        names = getattr(sys.modules.get(name), "CONFIG_MAPPING_NAMES", None)
        if names is None:
            continue
        names.setdefault("hybridzoo", _CONFIG)
        if _ALIAS not in sys.modules:
            alias = ModuleType(
                _ALIAS, "The transformers adapter of hybridzoo, under the name that transformers looks for."
            )
            alias.__getattr__ = _from_adapter  # type: ignore[method-assign]
            sys.modules[_ALIAS] = alias


def _from_adapter(name: str) -> Any:
    # this name only: tools that look through sys.modules ask every module for attributes it may not have
    if name != _CONFIG:
        raise AttributeError(f"module {_ALIAS!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ADAPTER), name)
