"""Names on a command line, looked for before anything heavy is imported: the standard library is all this needs."""

import difflib
import os
import re
from pathlib import Path

from .config.shipped import list_models

__all__ = ["HUB_ID", "check_model", "check_there", "near_path", "option_pairs"]

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def check_model(name: str, *, hub: bool = True) -> None:
    """Raise a ``ValueError`` if a model's name is a typo; it names the nearest. What the model holds is for others to judge.

    Where a hub id will do, one that differs in a letter or two from a path that is there is taken for that path, except in its digits:
    ``mamba-370m`` is no slip of ``mamba-130m``.
    """
    if not name:
        raise ValueError("model: the name is empty. `zoo list` prints the shipped ones; a saved folder works too.")
    if name in list_models() or os.path.exists(name):
        return
    is_yaml = name.endswith((".yaml", ".yml"))
    near = near_path(Path(name))
    is_slip = near and re.findall(r"\d+", near) == re.findall(r"\d+", name)
    if hub and not is_yaml and not is_slip and HUB_ID.fullmatch(name):
        return
    if is_yaml or len(Path(name).parts) != 1:
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(f"model: there is no file or folder {name!r} in {Path.cwd()}.{hint} Check the path.")
    names = list_models()
    near = next(iter(difflib.get_close_matches(name, names, n=1)), near)
    hint = f" Did you mean {near!r}?" if near else ""
    families = ", ".join(sorted({n.rsplit("-", 1)[0] for n in names}))
    raise ValueError(f"model: unknown model {name!r}.{hint} Families: {families}. `zoo list` prints every name.")


def check_there(path: Path, remedy: str) -> None:
    """Raise a ``FileNotFoundError`` if nothing is at a path; it names what is nearly called so, and says what to give."""
    if not os.path.exists(path):
        hint = f" Did you mean {near!r}?" if (near := near_path(path)) else ""
        raise FileNotFoundError(f"{path}: no such file or folder.{hint} {remedy}")


def option_pairs(arguments: list[str]) -> list[tuple[str, str]]:
    """Options of another program and their values, written ``--a b`` or ``--a=b``."""
    parts = [argument.partition("=") for argument in arguments]
    following = [*arguments[1:], ""]
    return [(key, value if equals else after) for (key, equals, value), after in zip(parts, following, strict=True)]


def near_path(path: Path) -> str | None:
    """The path that is there and nearly called so: the first part that is not there is the one that was mistyped."""
    wrong = path
    while wrong.parent != wrong and not os.path.exists(wrong.parent):
        wrong = wrong.parent
    if not os.path.isdir(wrong.parent):
        return None
    close = difflib.get_close_matches(wrong.name, os.listdir(wrong.parent), n=1, cutoff=0.7)
    found = wrong.parent / close[0] / path.relative_to(wrong) if close else None
    return str(found) if found is not None and os.path.exists(found) else None
