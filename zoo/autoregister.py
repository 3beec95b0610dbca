"""Make transformers' Auto classes know the zoo once ``hybridzoo`` is imported, without importing transformers or our adapter to it.

transformers looks models up by name in tables, and imports a model's module when it is asked for: nothing of ours is loaded until somebody
opens one of our folders. The tables may be imported long after us, so an import finder waits for the three modules that hold them; what the
finders behind it give is handed on, with one call added after the module has run.
"""

import importlib
import importlib.abc
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_when_loaded"]

_AUTO = "transformers.models.auto."
# the tables, and what is loaded after them, for when they are only half loaded as this is called
_WATCHED = (_AUTO + "auto_mappings", _AUTO + "configuration_auto", _AUTO + "modeling_auto")
_ADAPTER = __package__ + ".hf"
# where transformers looks for the class that it found under the name "hybridzoo"
_ALIAS, _CONFIG = "transformers.models.hybridzoo", "HybridZooConfig"


class _ThenEnter:
    """A loader as it is, of whichever kind, that makes one call more when it has run its module."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        run = getattr(self._loader, name)

        def run_and_enter(module: Any) -> Any:
            if isinstance(module, ModuleType):  # load_module has a name here, and makes the module
                module.__loader__ = self._loader
                if module.__spec__ is not None:
                    module.__spec__.loader = self._loader
            result = run(module)
            _enter()
            return result

        return run_and_enter if name in ("exec_module", "load_module") else run


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _WATCHED:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            # one of the old kind is Python's to adapt or to skip
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenEnter(spec.loader)
                return spec
        return None


def register_when_loaded() -> None:
    """Enter the adapter into transformers' tables, now or when they are first used. Calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _WATCHED:
        if sys.modules.get(name) is not None:
            importlib.import_module(name)  # waits, where another thread is in the middle of it
    _enter()


def _enter() -> None:
    for name in _WATCHED:
        names = getattr(sys.modules.get(name), "CONFIG_MAPPING_NAMES", None)
        if names is None:
            continue
        try:
            names.setdefault("hybridzoo", _CONFIG)
        except (AttributeError, TypeError) as e:
            # transformers must go on importing, whatever it has made of its tables
            warnings.warn(
                f"hybridzoo: {name}.CONFIG_MAPPING_NAMES takes no new name ({type(e).__name__}: {e}), so that transformers' Auto classes "
                f"do not know the zoo. Import {_ADAPTER} to make them.",
                stacklevel=2,
            )
            continue
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
