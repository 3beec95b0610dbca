"""One file of weights that no config describes, as trainings of vision models write and publish them; and typeseg's ``.npz``.

A training's checkpoint is a dict of dicts, and the weights are under ``model``, perhaps once more, averaged, under ``model_ema``.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, nearest, shortened
from .families import FILE_FAMILIES
from .family import FileFamily
from .npz import stored_arrays
from .tensors import Stored, plain_tensors, stored_in, torch_content, unchanged

__all__ = ["WeightFile", "file_in", "opened_file", "recognised"]

ENDINGS = (".pth", ".pt", ".bin", ".safetensors", ".npz")
# in the order in which they are taken where nobody says which; the former is what the projects' own loaders take
_PARTS = ("model", "state_dict", "model_ema", "state_dict_ema")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The weights in a file.

    Attributes:
        tensors: By name, read when they are asked for.
        part: The key that they are under, ``None`` if the file is nothing else.
        parts: The keys under which the file has weights.
    """

    tensors: dict[str, Stored]
    part: str | None = None
    parts: tuple[str, ...] = ()


def file_in(folder: Path) -> Path | None:
    """The one file of weights, ``.pth`` or typeseg's ``mamba_al.npz``, of a folder without any config; or the path, if it is one."""
    if folder.is_file():
        return folder if folder.suffix in ENDINGS else None
    if not folder.is_dir() or any((folder / name).exists() for name in ("config.json", "config.yaml")):
        return None
    files = sorted(folder.glob("*.pth")) or sorted(folder.glob("mamba_al.npz"))
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(files)} files of weights, such as {files[0].name}, and no config. Pass the path of one."
        )
    return files[0] if files else None


@contextlib.contextmanager
def opened_file(file: Path, weights: str | None = None) -> Iterator[WeightFile]:
    """The tensors of one file, of its part ``weights`` if it has several; shapes are read, values as long as the block lasts."""
    if file.suffix not in ENDINGS:
        raise CheckpointError(
            f"{file}: is no folder and no file of weights, which end in {', '.join(ENDINGS)}. Pass one of these."
        )
    with unchanged(file) as handle:
        if file.suffix in (".safetensors", ".npz"):
            if weights is not None:
                raise CheckpointError(f"{file}: has one set of tensors, and no part {weights!r}. Leave weights out.")
            read = stored_arrays if file.suffix == ".npz" else stored_in
            yield WeightFile(dict(read(file, handle)))
            return
        content = torch_content(file, handle, settings=True)
        parts = _parts(content)
        if weights is not None and weights not in parts:
            known = ", ".join(parts) or "one set of tensors, without a name"
            raise CheckpointError(f"{file}: has no weights {weights!r}.{nearest(weights, parts)} It has: {known}.")
        part = weights or next(iter(parts), None)
        tensors = content if part is None else content[part]
        yield WeightFile(dict(plain_tensors(file, handle, tensors)), part, tuple(parts))


def _parts(content: Any) -> list[str]:
    if not isinstance(content, dict):
        return []
    return [name for name in _PARTS if isinstance(content.get(name), dict) and content[name]]


def recognised(tensors: dict[str, Stored], file: Path) -> tuple[FileFamily, dict[str, Stored], list[str]]:
    """The family whose tensors a file holds, these under the family's own names, and the names of others beside them."""
    for family in FILE_FAMILIES.values():
        found = {m[1] for name in tensors if (m := re.fullmatch(rf"(|.*\.)(?:{family.mark})", name))}
        if not found:
            continue
        # a wrapper's name, module. or backbone., stands before all
        prefix = min(found, key=len)
        if len(found) > 1:
            raise CheckpointError(
                f"{file}: holds several models of the family {family.model_type}, below {', '.join(map(repr, sorted(found)))}. "
                "Write one of them to a file of its own."
            )
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return family, own, [name for name in tensors if not name.startswith(prefix)]
    some = ", ".join(shortened(name) for name in list(tensors)[:3])
    raise CheckpointError(
        f"{file}: its {len(tensors)} tensors ({some}, ...) are of no family whose files have no config. Known: "
        f"{', '.join(FILE_FAMILIES)}. For other formats, pass the folder with config.json."
    )
