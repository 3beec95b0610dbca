"""Packages whose names are imported when first asked for, so that none of their modules makes another one's reader wait."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazily(package: str, **homes: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package whose names come from its modules: ``lazily(__name__, build="build")``.

    Args:
        package: The package's ``__name__``.
        homes: For every name, the module of the package that has it.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{homes[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
