"""Names that are imported when first asked for, so that no module makes another one's reader wait, and packages that are optional."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(
    package: str, extras: Mapping[str, str] | None = None, **homes: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package whose names come from its modules, some with ``extras`` of hybridzoo.

    Every name is given its module: ``build="zoo.models.build"``, or ``config="zoo.config.resolve:load_config"`` where it has another name
    there; ``layers="layers"`` is the module itself.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, _, attribute = homes[name].partition(":")
        try:
            value: Any = importlib.import_module(f".{home}", package)
            value = value if home == name else getattr(value, attribute or name)
        except ModuleNotFoundError as e:
            if extras is None or name not in extras or (e.name or "").startswith(package):
                raise
            raise ModuleNotFoundError(
                f"{package}.{name} needs {e.name}. Install it with: pip install 'hybridzoo[{extras[name]}]'",
                name=e.name,
            ) from e
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *homes})


def needed(module: str, does: str, install: str) -> Any:
    """Return a module of an optional package; without the package, raise a ModuleNotFoundError that says what to install.

    Args:
        module: Its dotted name.
        does: What it is for, as in "reads this data".
        install: Its name for pip.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        package = module.split(".")[0]
        if (e.name or "").split(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"No module named {package!r}, which {does}. Install it with: pip install {install}", name=package
        ) from e
