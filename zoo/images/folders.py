"""Folders of class folders, ``root/cat/x.png``, and those with parts in front of them, ``root/train/cat/x.png``."""

import os
from pathlib import Path

from ..errors import SourceError, nearest
from ..terminal import counted
from .decode import SUFFIXES
from .pictures import FilePictures
from .splits import part_called, parts_called

__all__ = ["images_in", "pictures_in_folder"]


def pictures_in_folder(root: Path, split: str = "train", classes: list[str] | None = None) -> FilePictures:
    """Return the images in the class folders of a folder, in the order of their names.

    Hidden files are nobody's images, nor is what lies in the folder of a run; inside a class, folders may be nested.

    Args:
        root: The folder. Where it holds ``train`` and ``val`` or ``test`` and nothing else, the classes are in those.
        split: ``train``, ``val`` or ``test``: which of them. A missing ``val`` is the ``test`` that is there, and the reverse.
        classes: The names that are known already, in the order of their numbers; without them they are those of the folders.

    Raises:
        SourceError: There is no image, no class, one class only, or one that is empty or unknown.
    """
    root = _part_of(root, split)
    folders = _visible_folders(root)
    if not folders:
        raise SourceError(
            f"{root}: has no class folders. Put the images of each class into a folder of its name: {root}/cat/1.png."
        )
    if classes is None and len(folders) == 1:
        raise SourceError(
            f"{root}: has one class only, {folders[0].name!r}. To tell images apart takes two folders or more."
        )
    names = classes or [folder.name for folder in folders]
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        if folder.name not in names:
            hint = nearest(folder.name, names) or f" Known: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            raise SourceError(f"{folder}: is of a class that the model does not know (labels).{hint}")
        if not (found := images_in(folder)):
            raise SourceError(
                f"{folder}: holds no image (a file that ends in {', '.join(SUFFIXES)}). Put some there, or remove the folder."
            )
        files += found
        labels += [names.index(folder.name)] * len(found)
    loose = sum(_is_image(file.name) and file.is_file() for file in root.iterdir())
    about = [f"{counted(loose, 'image')} directly in {root}, in no class, left out"] if loose else []
    return FilePictures(files, labels, names, about)


def _part_of(root: Path, split: str) -> Path:
    there = {folder.name: folder for folder in _visible_folders(root)}
    found = parts_called(there)
    return part_called(there, split, str(root)) if "train" in found and len(found) == len(there) else root


def _visible_folders(root: Path) -> list[Path]:
    found = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted((folder for folder in found if not (folder / ".train.lock").exists()), key=lambda folder: folder.name)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def images_in(folder: Path) -> list[Path]:
    """Return the images below a folder, those behind links included, in the order of their paths."""
    found: list[Path] = []
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        # a link to a folder above would be gone through for ever
        folders[:] = [name for name in folders if not name.startswith(".") and _is_new(os.path.join(place, name), seen)]
        found += [Path(place, name) for name in files if _is_image(name)]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _is_new(folder: str, seen: set[str]) -> bool:
    real = os.path.realpath(folder)
    is_new = real not in seen
    seen.add(real)
    return is_new


def _raise(error: OSError) -> None:
    raise error
