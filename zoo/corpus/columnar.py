"""Documents in a column: parquet files, and folders that ``datasets`` has saved."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config.plain import first_line
from ..errors import SourceError
from ..lazily import needed
from .piece import Piece

__all__ = ["dataset_folder", "read_dataset", "read_parquet"]

_ROWS = 1024  # that are in memory at once


def read_parquet(file: Path, column: str) -> Iterator[Piece]:
    """Read a document a row, one row group after the other."""
    pa = _library("pyarrow")
    from pyarrow import parquet

    try:
        table, size = parquet.ParquetFile(file), file.stat().st_size
        kind = _kind(table.schema_arrow, column, str(file))
        batches = table.iter_batches(batch_size=_ROWS, columns=[column])
        rows = table.metadata.num_rows
        yield from _read((batch.column(0) for batch in batches), f"{file}, row", column, kind, size / max(1, rows))
    # it tells what is damaged as a ValueError or an OSError of its own
    except (pa.ArrowException, OSError) as e:
        raise SourceError(f"{file}: is not a whole parquet file ({first_line(e)}). Copy or write it again.") from e


def dataset_folder(folder: Path) -> Path | None:
    """Return the folder of a split that ``Dataset.save_to_disk`` wrote, in that of a ``DatasetDict`` its ``train``; ``None`` for others.

    Raises:
        ValueError: Splits, and none called ``train``.
    """
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return folder
    if not (folder / "dataset_dict.json").is_file():
        return None
    splits = sorted(f.parent.name for f in folder.glob("*/state.json"))
    if "train" not in splits:
        named = ", ".join(splits) or "none"
        hint = f" Name the folder of one: {folder / splits[0]}" if splits else ""
        raise SourceError(f"{folder}: is a dataset with no split 'train'; its splits: {named}.{hint}")
    return folder / "train"


def read_dataset(folder: Path, column: str) -> Iterator[Piece]:
    """Read a document a row of what ``Dataset.save_to_disk`` wrote."""
    _library("datasets")
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(folder))
        schema, rows = data.features.arrow_schema, len(data)
    # what is missing or damaged ends in whatever the part that meets it raises
    except Exception as e:
        raise SourceError(f"{folder}: cannot be read as a dataset ({first_line(e)}). Save it again.") from e
    kind = _kind(schema, column, str(folder))
    size = sum(f.stat().st_size for f in folder.glob("*.arrow"))
    tables = data.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS)
    chunks = (chunk for table in tables for chunk in table.column(0).chunks)
    yield from _read(chunks, f"{folder}, row", column, kind, size / max(1, rows))


def _library(name: str) -> Any:
    return needed(name, "reads this data", "'hybridzoo[data]'")


def _kind(schema: Any, column: str, where: str) -> str:
    import pyarrow as pa

    if column not in schema.names:
        named = ", ".join(map(repr, schema.names[:8])) or "none"
        raise SourceError(
            f"{where}: has no column {column!r}; its columns: {named}. Name the one with the text (--column)."
        )
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(test(kind) for test in lists) and pa.types.is_integer(kind.value_type):
        return "ids"
    raise SourceError(f"{where}: column {column!r} holds {kind}, which is neither text nor lists of token ids.")


def _read(arrays: Iterable[Any], where: str, column: str, kind: str, bytes_per_row: float) -> Iterator[Piece]:
    number = 0
    for array in arrays:
        if array.null_count:
            row = number + array.is_null().to_pylist().index(True) + 1
            raise SourceError(f"{where} {row}: {column!r} is empty (null). Leave such rows out.")
        for content in array.to_pylist() if kind == "text" else _lists(array, where, column, number):
            number += 1
            yield Piece(f"{where} {number}", content, True, int(number * bytes_per_row))


def _lists(array: Any, where: str, column: str, number: int) -> Iterator[np.ndarray]:
    values = array.flatten()
    if values.null_count:
        row = next(i for i, ids in enumerate(array.to_pylist(), number + 1) if None in ids)
        raise SourceError(f"{where} {row}: {column!r} holds an empty id (null). Token ids are integers.")
    sizes = array.value_lengths().to_numpy(zero_copy_only=False)
    return iter(np.split(values.to_numpy(zero_copy_only=False), np.cumsum(sizes)[:-1]))
