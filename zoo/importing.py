"""Mixers in a user's own file or module: imported because the user says so, never because a config does."""

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from . import registry
from .config.plain import first_line

__all__ = ["import_mixers"]

_imported: dict[str, list[str]] = {}  # by module, what each import has registered


def import_mixers(source: str | os.PathLike[str]) -> list[str]:
    """Import a file or module that registers mixers, once; a second call finds it imported.

    A file becomes the module of its name (``mine.py``: ``mine``), and its folder goes to the end of ``sys.path``, so that it finds its
    neighbours, and processes started from this one find it.

    Args:
        source: ``mine.py``, a path to such a file, or a module's name, ``package.mixers``, installed or in the working directory.

    Returns:
        The names under which it has registered mixers.

    Raises:
        ValueError: No such file or module, an exception in it (with its line), a name that belongs to another module, or nothing that
            it registers.
    """
    text = os.fspath(source)
    path = Path(text)
    is_file = path.suffix == ".py" or len(path.parts) != 1 or path.is_file()
    if is_file and not path.is_file():
        raise ValueError(
            f"import {text}: there is no such file in {Path.cwd()}. Pass a Python file, or a module as 'package.mixers'."
        )
    name = path.stem if is_file else text
    if not all(part.isidentifier() for part in name.split(".")) or (is_file and "." in name):
        raise ValueError(f"import {text}: {name!r} is no name for a Python module. Rename it, as in 'my_mixer.py'.")
    if name not in _imported:
        registry.list_mixers()  # plug-ins come first, so that what is new afterwards is this module's
        before = dict(registry._entries)
        try:
            module = _load_file(text, name, path.resolve()) if is_file else _load_module(text)
        except BaseException:
            registry._entries.clear()
            registry._entries.update(before)
            raise
        found = {key for key in registry._entries if key not in before}
        # what the program has imported before is registered already
        found |= {key for key, entry in registry._entries.items() if f"{entry.cls.__module__}.".startswith(f"{name}.")}
        if not found:
            raise ValueError(
                f"import {text}: registers no mixer. Put @hybridzoo.register_mixer('a_name') over the class in {module.__file__}."
            )
        _imported[name] = sorted(found)
    elif is_file:
        _refuse_other(text, name, path.resolve())
    return list(_imported[name])


def _load_file(text: str, name: str, path: Path) -> ModuleType:
    _refuse_other(text, name, path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _reachable(path.parent)
    # before it runs, as the import statement does: dataclasses and pickle look it up there
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise ValueError(f"import {text}: {_place(e, path)}. Correct it there.") from e
    finally:
        if sys.exc_info()[0] is not None:
            del sys.modules[name]
    return module


def _refuse_other(text: str, name: str, path: Path) -> None:
    # another module of that name would be hidden by the file, or hide it from other processes
    try:
        found: Any = sys.modules.get(name) or importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return
    if found is None:
        return
    file = getattr(found, "__file__", getattr(found, "origin", None))
    if file is None or not os.path.exists(file) or not os.path.samefile(file, path):
        raise ValueError(
            f"import {text}: there is another module {name!r} ({file}). Rename the file, as in 'my_{name}.py'."
        )


def _load_module(text: str) -> ModuleType:
    _reachable(Path.cwd())
    try:
        return importlib.import_module(text)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{text}.".startswith(f"{e.name}."):
            raise ValueError(f"import {text}: needs {e.name!r}, which is not installed. Install it.") from e
        raise ValueError(
            f"import {text}: there is no such module, installed or in {Path.cwd()}. Check the name; a file is passed as 'mine.py'."
        ) from e
    except (Exception, SystemExit) as e:
        raise ValueError(f"import {text}: {_place(e, None)}. Correct it there.") from e


def _reachable(folder: Path) -> None:
    # at the end: nothing that is installed is hidden by a file beside the mixer
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _place(e: BaseException, path: Path | None) -> str:
    """Return the place in the file, or in the last one that ran, and what went wrong there."""
    frames = [frame for frame in traceback.extract_tb(e.__traceback__) if "importlib" not in frame.filename]
    places: list[Any] = [(f.filename, f.lineno) for f in frames[1:] if path is None or f.filename == str(path)]
    if isinstance(e, SyntaxError):
        places = [(e.filename, e.lineno)]
    where = "{}, line {}: ".format(*places[-1]) if places else ""
    return f"{where}{type(e).__name__}: {first_line(e)}"
