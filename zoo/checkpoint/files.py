"""The small files of a checkpoint's folder, and where it is. Nothing here runs code from a file."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from ..hub import unreachable
from .publish import GENERATION

__all__ = ["SPECIAL_IDS", "dump", "is_deep", "open_regular", "open_source", "read_json", "read_metadata"]

# what transformers' generate reads; the rest of config.json is about the network, or the library's own
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# weights of other frameworks and of other precisions lie in sub-folders or end otherwise
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.yaml", "*.jinja")
# of config.json and of an index; the largest that are published have 10 MB
_LARGEST_JSON = 64 * 2**20
# Python's reader goes about a thousand levels deep, and whoever copies or writes what it has read, not so far
_DEEPEST_JSON = 64


def open_source(source: Any) -> Path:
    """The folder or file that ``source`` names: itself, or the snapshot of a hub id, downloaded if it is not there yet."""
    folder = Path(source)
    if folder.is_dir() or folder.is_file():
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
            if not any(got.glob("*.bin")):
                got = Path(snapshot_download(source, allow_patterns=[*_SMALL_FILES, "*.pth"], **here))
    except Exception as e:
        reason = why or f"{type(e).__name__}: {(str(e).strip() or 'no reason').splitlines()[0]}"
        raise CheckpointError(
            f"{source}: no such folder, and the hub does not give it ({reason}). "
            "Check the name and the connection, or download it elsewhere and pass the folder."
        ) from e
    return got


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; ``{"__float__": "Infinity"}`` is how transformers writes infinity."""
    with open_regular(file) as f:
        size = os.fstat(f.fileno()).st_size
        if size > _LARGEST_JSON:
            raise CheckpointError(
                f"{file}: has {size} bytes, and no such file needs more than {_LARGEST_JSON}. The file is damaged or hostile."
            )
        text = f.read()
    try:
        content = json.loads(text.decode("utf-8"), object_hook=_infinite)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: is not JSON ({e}). Copy it again.") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected an object. Copy it again.")
    if is_deep(content):
        raise CheckpointError(
            f"{file}: has more than {_DEEPEST_JSON} levels of nesting. The file is damaged or hostile."
        )
    return content


def is_deep(content: Any) -> bool:
    """Tell whether data has more levels of nesting than any file that is meant well."""
    level = [content]
    for _ in range(_DEEPEST_JSON + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return False
        level = [value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def read_metadata(folder: Path) -> dict[str, dict[str, Any]]:
    """The facts that a folder states about text, by file: ids of special tokens, how to generate; a file that says nothing is left out."""
    config, generation = folder / "config.json", folder / GENERATION
    stated = read_json(config) if config.exists() else {}
    found = {config.name: {name: stated[name] for name in SPECIAL_IDS if name in stated}}
    if generation.exists():
        found[GENERATION] = read_json(generation)
    return {name: content for name, content in found.items() if content}


def _infinite(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.get("__float__") in ("Infinity", "-Infinity", "NaN") else value


def dump(content: dict[str, Any], sort: bool = False, tagged: bool = True) -> str:
    """JSON as transformers writes it, infinities included, or with plain ``Infinity``, as Python's own reader and writer have it."""
    return json.dumps(_plain(content) if tagged else content, indent=2, ensure_ascii=False, sort_keys=sort) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


def open_regular(file: Path) -> BinaryIO:
    """A file opened for reading, unbuffered; pipes and devices, which could keep a reader for ever, are refused."""
    fd = -1
    try:
        # without O_NONBLOCK, opening a pipe that nobody writes to would wait
        fd = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if stat.S_ISREG(os.fstat(fd).st_mode):
            handle, fd = open(fd, "rb", buffering=0), -1
            return handle
        raise CheckpointError(f"{file}: is no regular file. Put the file itself in its place.")
    except FileNotFoundError as e:
        raise CheckpointError(f"{file}: no such file. The folder is not complete.") from e
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read ({e.strerror}). Check the file and its permissions.") from e
    finally:
        if fd >= 0:
            os.close(fd)
