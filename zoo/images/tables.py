"""Tables of images: what ``datasets`` holds or has saved, and parquet files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config.plain import first_line
from ..errors import SourceError
from ..lazily import needed
from ..terminal import stderr
from .pictures import class_numbers, stamp
from .splits import part_called, parts_called

__all__ = ["TablePictures", "is_table", "pictures_in_table"]

# the columns that are looked for where no type tells
_IMAGES, _LABELS = ("image", "img", "images"), ("label", "labels", "class", "fine_label")


class TablePictures:
    """Pictures in the column of a ``datasets.Dataset``, which maps its file."""

    def __init__(self, table: Any, column: str, labels: np.ndarray, classes: list[str], where: str, numbered: bool):
        self.table, self.column, self.labels, self.classes = table, column, labels, classes
        self.where, self.numbered = where, numbered
        self.about: list[str] = []

    def content(self, number: int) -> bytes:
        """Return the bytes of one; of none, no byte."""
        found = self.table[int(number)][self.column] or {}
        if found.get("bytes") is None and found.get("path"):
            return Path(found["path"]).read_bytes()
        return found.get("bytes") or b""

    def name(self, number: int) -> str:
        """Return its row."""
        return f"{self.where}, row {number}"

    def identity(self) -> tuple[str, list[Any]] | None:
        """Return path, size and time of its files, and what ``datasets`` knows it by."""
        files = [stamp(Path(file["filename"])) for file in self.table.cache_files]
        return (files[0][0], [self.table._fingerprint, *files]) if files else None


def is_table(path: Path) -> bool:
    """Return whether a path is a parquet file, a folder with some, or one that ``datasets`` has saved."""
    if path.is_file():
        return path.suffix.lower() == ".parquet"
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    return saved or bool(_parquet_files(path))


def pictures_in_table(data: Any, split: str, classes: list[str] | None, column: str | None) -> TablePictures:
    """Return the images in a table.

    Args:
        data: A path for which :func:`is_table`, a ``datasets.Dataset``, or several in a mapping by the names of parts.
        split: Which part, where there are some.
        classes: The names that are known already.
        column: That of the images; without it the only one there is.

    Raises:
        SourceError: There is no column of images or of labels, or a table that is damaged.
        ModuleNotFoundError: ``datasets`` is not installed.
    """
    datasets = needed("datasets", "reads tables of images", "'hybridzoo[data,vision]'")
    where = str(data) if isinstance(data, Path) else "data"
    table = _opened(datasets, data, split) if isinstance(data, Path) else data
    if isinstance(table, Mapping):
        table = part_called(table, split, where)
    if not isinstance(table, datasets.Dataset):
        raise ValueError(
            f"data: found {type(data).__name__}, expected a path, the name of a built-in set, a pair of arrays, or a datasets.Dataset."
        )
    if not len(table):
        raise SourceError(f"{where}: is empty. Give at least one image.")
    column = _column(table, column, where, datasets.Image, _IMAGES, "images")
    label = _column(table, None, where, datasets.ClassLabel, _LABELS, "labels")
    numbers, names, numbered = _labels(table, label, where, classes)
    try:
        images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as e:  # as many kinds as there are types of columns
        raise SourceError(
            f"{where}: column {column!r} holds no images ({first_line(e)}). Name the one that does."
        ) from e
    return TablePictures(images, column, numbers, names, where, numbered)


def _opened(datasets: Any, path: Path, split: str) -> Any:
    files = [path] if path.is_file() else _parquet_files(path)
    silent = not stderr().is_terminal and not datasets.are_progress_bars_disabled()
    if silent:
        datasets.disable_progress_bars()
    try:
        if not files:
            return datasets.load_from_disk(str(path))
        chosen = [str(file) for file in _of_part(files, split, path)]
        return datasets.load_dataset("parquet", data_files={"train": chosen}, split="train")
    except SourceError:
        raise
    except Exception as e:  # what is missing or damaged ends in whatever the part that meets it raises
        raise SourceError(f"{path}: cannot be read as a table ({first_line(e)}). Save it again.") from e
    finally:
        if silent:
            datasets.enable_progress_bars()


def _parquet_files(folder: Path) -> list[Path]:
    found = (file for depth in ("*.parquet", "*/*.parquet") for file in folder.glob(depth))
    return sorted(file for file in found if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def _of_part(files: list[Path], split: str, where: Path) -> list[Path]:
    """Return those of some files that are of a part, by the first word of their names or by their folder's; all where none says so."""
    named: dict[str, list[Path]] = {}
    for file in files:
        words = [re.split(r"[^a-z]", file.stem.lower())[0], file.parent.name.lower()]
        word = next((word for word in words if parts_called({word: 0})), "")
        named.setdefault(word, []).append(file)
    return files if set(named) == {""} else part_called(named, split, str(where))


def _column(table: Any, column: str | None, where: str, kind: type, usual: tuple[str, ...], what: str) -> str:
    there = ", ".join(map(repr, table.column_names))
    if column is not None:
        if column not in table.column_names:
            raise SourceError(
                f"{where}: has no column {column!r}; its columns: {there}. Name the one with the {what} (--column)."
            )
        return column
    typed = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    found = typed or [name for name in usual if name in table.column_names][:1]
    best = [name for name in usual if name in found]
    if len(found) == 1 or best:
        return best[0] if best else found[0]
    more = (
        f"several columns of {what}: {', '.join(map(repr, found))}"
        if found
        else f"no column of {what}; its columns: {there}"
    )
    raise SourceError(f"{where}: has {more}. Name one of them {usual[0]!r}, or give it (--column).")


def _labels(table: Any, label: str, where: str, classes: list[str] | None) -> tuple[np.ndarray, list[str], bool]:
    """Return the numbers of the classes, their names, and whether there are numbers only."""
    found = np.array(table.select_columns([label])[:][label])
    names = getattr(table.features[label], "names", None)
    if names and found.dtype.kind in "iu":
        numbers, names = class_numbers(found, where, list(names))
        if classes is None or classes == names:
            return numbers, names, False
        found = np.array(names)[numbers]
    return *class_numbers(found, where, classes), classes is None and found.dtype.kind in "iu"
