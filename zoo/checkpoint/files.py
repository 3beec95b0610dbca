"""Files of a checkpoint folder: where the tensors lie, read one at a time, and written so that no half folder is ever seen.

Nothing here runs code from a file: safetensors hold none, and ``.bin`` files go through ``torch.load(weights_only=True)``.
"""

import contextlib
import json
import pickle
import re
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import SourceError
from ..hub import unreachable

__all__ = [
    "CheckpointError",
    "Stored",
    "check_new",
    "new_folder",
    "open_source",
    "read_json",
    "read_metadata",
    "stored_tensors",
    "write_whole",
]

# what transformers' generate reads; the rest of config.json is about the network, or the library's own
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# weights of other frameworks and of other precisions lie in sub-folders or end otherwise
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.yaml", "*.jinja")


class CheckpointError(SourceError):
    """A folder that does not hold a whole, matching model: which file, what is wrong with it, and the remedy."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape is known, its values are read when ``read`` is called."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def open_source(source: Any) -> Path:
    """The folder that ``source`` names: itself, or the snapshot of a hub id, downloaded if it is not there yet.

    Raises:
        CheckpointError: There is no such folder, or the hub cannot give it.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{folder}: no such folder. Pass a folder that zoo.save, save_pretrained or mamba-ssm has written, or a hub id "
            "such as 'state-spaces/mamba-130m'; to build an untrained model from a config name, use zoo.build."
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise CheckpointError(
            f"{source}: no such folder, and hub ids need huggingface_hub. Run: pip install 'hybridzoo[hf]'."
        ) from e
    why = unreachable()
    here: dict[str, Any] = {"local_files_only": why is not None, "ignore_patterns": "*/*"}
    # the remote's errors are of many unrelated classes: no such repository, no permission, no space
    try:
        got = Path(snapshot_download(source, allow_patterns=[*_SMALL_FILES, "*.safetensors"], **here))
        if not any(got.glob("*.safetensors")):
            got = Path(snapshot_download(source, allow_patterns=[*_SMALL_FILES, "*.bin"], **here))
    except Exception as e:
        reason = why or f"{type(e).__name__}: {(str(e).strip() or 'no reason').splitlines()[0]}"
        raise CheckpointError(
            f"{source}: no such folder, and the hub does not give it ({reason}). "
            "Check the name and the connection, or download it elsewhere and pass the folder."
        ) from e
    return got


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; ``{"__float__": "Infinity"}`` is how transformers writes infinity."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_hook=_infinite)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read ({e.strerror}). The folder is not complete.") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: is not JSON ({e}). Copy it again.") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected an object. Copy it again.")
    return content


def read_metadata(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder says about text, by file: ids of special tokens, how to generate; a file that says nothing is left out."""
    config, generation = folder / "config.json", folder / GENERATION
    stated = read_json(config) if config.exists() else {}
    found = {config.name: {name: stated[name] for name in SPECIAL_IDS if name in stated}}
    if generation.exists():
        found[GENERATION] = read_json(generation)
    return {name: content for name, content in found.items() if content}


def _infinite(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.get("__float__") in ("Infinity", "-Infinity", "NaN") else value


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name, in one file or in shards; shapes are read, values are not.

    Raises:
        CheckpointError: A file is missing or damaged, an index points outside the folder, or a name occurs twice.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(folder):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file. The folder is not complete.")
        for name, stored in _safetensors(file) if file.suffix == ".safetensors" else _torch_file(file):
            if name in found:
                raise CheckpointError(f"{file}: tensor {name!r} is also in {found[name].file.name}. Remove one file.")
            found[name] = stored
    return found


def _weight_files(folder: Path) -> list[Path]:
    for single in _SINGLE:
        if (folder / single).exists():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if not index.exists():
            continue
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index}: is not an index (weight_map names no files). Copy it again.")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            # a hub snapshot links to its blobs, so the name decides and not where the link leads
            if file.name in ("", ".", "..") or file != folder / file.name:
                raise CheckpointError(
                    f"{index}: names {str(file.relative_to(folder) if file.is_relative_to(folder) else file)!r} outside the "
                    "folder. The index is damaged or hostile."
                )
            if file.suffix != Path(single).suffix:
                raise CheckpointError(
                    f"{index}: names {file.name!r}, which is no {Path(single).suffix} file. Copy it again."
                )
        return files
    raise CheckpointError(
        f"{folder / _SINGLE[0]}: no such file, nor {_SINGLE[1]}, nor an index of shards. The folder is not complete."
    )


def _safetensors(file: Path) -> Iterator[tuple[str, Stored]]:
    def read(name: str) -> Tensor:
        with _damage(file), safe_open(file, framework="pt") as f:
            return f.get_tensor(name)

    with _damage(file), safe_open(file, framework="pt") as f:
        shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    for name, shape in shapes.items():
        yield name, Stored(file, shape, lambda name=name: read(name))  # type: ignore[misc]


def _torch_file(file: Path) -> Iterator[tuple[str, Stored]]:
    with _damage(file):
        # files of before torch 1.6 are no zip archives and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected a dict of tensors by name.")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: {name!r} is a {type(tensor).__name__}, expected a tensor.")
        yield name, Stored(file, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{file}: is damaged, or wants to run code, which is refused ({str(e).splitlines()[0]}). "
            "Get the weights as safetensors."
        ) from e
    except Exception as e:
        # torch.load meets a cut or a flipped bit with any exception there is
        if isinstance(e, CheckpointError | torch.OutOfMemoryError):
            raise
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: is damaged ({reason}). Copy it again.") from e


def write_whole(path: Path, text: str) -> None:
    """Write a file so that no half of it is ever seen, with the rights that the umask leaves; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not of tempfile, whose files are for their owner alone
    temporary = path.parent / f".writing-{uuid.uuid4().hex}"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(folder: Path) -> None:
    """Raise a :class:`CheckpointError` if ``folder`` exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already. Choose a new folder, or empty this one.")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place to write in, which becomes ``folder`` when the block ends well and vanishes when it does not.

    Raises:
        CheckpointError: ``folder`` exists and is not empty.
    """
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are for the owner alone
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
