"""The stored tensors of a folder: one file after the other, one tensor after the other.

Every file is opened once, and its header and its values come from that one opening, so that a model is never made of two saves. Nothing
here runs code from a file: safetensors hold none, and ``.bin`` files go through ``torch.load(weights_only=True)``. What a small file may
ask for is bounded by its size: every tensor lies in the file, and no two share a place (in a ``.bin`` file, a few may).
"""

import contextlib
import functools
import io
import json
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError, shortened
from .files import open_regular, read_json

__all__ = [
    "READABLE",
    "Stored",
    "check_one_set",
    "check_state_file",
    "damaged",
    "plain_tensors",
    "stored_in",
    "stored_tensors",
    "torch_content",
    "unchanged",
]

SINGLE = ("model.safetensors", "pytorch_model.bin")
# a tensor takes about 120 bytes of a safetensors header, and 300 of a pickle
_LARGEST_HEADER = 16 * 2**20
# tied heads and shared blocks are several names of one place; no model has more names than this for each number
_MOST_NAMES = 8
READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
# all that a pickle of plain tensors names; the classes of storages come with it
_PLAIN = frozenset({
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
    "torch Size", "torch.serialization _get_layout",
})  # fmt: skip

# and of the states of optimisers and random generators, which NumPy's is one of
_STATES = _PLAIN | {
    f"{module} {name}"
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.dtypes")
    for name in ("_reconstruct", "ndarray", "dtype", "UInt32DType")
} | {"_codecs encode", "collections defaultdict", "builtins dict", "__builtin__ dict"}  # fmt: skip

# a training's checkpoint may have settings, of which nothing is read: their classes stay away, and a dict stands for them
_SETTINGS: list[Any] = [(OrderedDict, "argparse.Namespace"), (OrderedDict, "yacs.config.CfgNode")]
_MAKES_OBJECTS = frozenset("STACK_GLOBAL INST OBJ NEWOBJ NEWOBJ_EX EXT1 EXT2 EXT4".split())
_TRAINING = _STATES | {"argparse Namespace", "yacs.config CfgNode", "NEWOBJ"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape and the kind of its numbers are known, its values are read when ``read`` is called."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a text if torch has no such numbers
    read: Callable[[], Tensor]  # gives a contiguous one with memory of its own


@contextlib.contextmanager
def stored_tensors(folder: Path) -> Iterator[dict[str, Stored]]:
    """Every tensor of a folder by name, in one file or in shards; shapes are read, values as long as the block lasts.

    At its end, files that were written to meanwhile are refused.
    """
    found: dict[str, Stored] = {}
    with contextlib.ExitStack() as files:
        for file in _weight_files(folder):
            handle = files.enter_context(unchanged(file))
            read = stored_in if file.suffix == ".safetensors" else _torch_file
            for name, stored in read(file, handle):
                if name in found:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is also in {found[name].file.name}. Remove one file."
                    )
                found[name] = stored
        yield found


@contextlib.contextmanager
def unchanged(file: Path) -> Iterator[BinaryIO]:
    """A file opened for reading; at the end of the block, one that was written to meanwhile is refused."""
    with open_regular(file) as handle:
        before = _version(handle)
        yield handle
        if _version(handle) != before:
            raise CheckpointError(f"{file}: was written to while it was read. Load it again when that is done.")


def _version(handle: BinaryIO) -> tuple[int, int]:
    s = os.fstat(handle.fileno())
    return s.st_size, s.st_mtime_ns


def check_one_set(folder: Path) -> None:
    """Refuse weights in one file beside an index of others, of which every reader takes the former, whichever is newer."""
    single, index = folder / SINGLE[0], folder / f"{SINGLE[0]}.index.json"
    if single.exists() and index.exists() and (others := set(_indexed(index, single)) - {single}):
        raise CheckpointError(
            f"{index}: names {min(others).name!r} beside {single.name}, and one folder is one model. Remove those that are older."
        )


def _weight_files(folder: Path) -> list[Path]:
    for single in (folder / name for name in SINGLE):
        if single.exists():
            return [single]
        index = single.with_name(f"{single.name}.index.json")
        if index.exists():
            return _indexed(index, single)
    raise CheckpointError(
        f"{folder / SINGLE[0]}: no such file, nor {SINGLE[1]}, nor an index of shards. The folder is not complete."
    )


def _indexed(index: Path, single: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: is not an index (weight_map names no files). Copy it again.")
    for name in (distinct := sorted(set(names.values()))):
        # a hub snapshot links to its blobs, so the name decides and not where the link leads
        if name in ("", ".", "..") or not name.isprintable() or set(name) & {"/", "\\"} or len(name.encode()) > 255:
            raise CheckpointError(
                f"{index}: names {shortened(name)} as a file, which no file of the folder is called. The index is damaged or hostile."
            )
        if Path(name).suffix != single.suffix:
            raise CheckpointError(f"{index}: names {name!r}, which is no {single.suffix} file. Copy it again.")
    return [index.parent / name for name in distinct]


def stored_in(file: Path, handle: BinaryIO) -> Iterator[tuple[str, Stored]]:
    """The tensors of one safetensors file: 8 bytes with the length of the header, the header as JSON, the numbers of all without gaps."""
    size = os.fstat(handle.fileno()).st_size
    n = int.from_bytes(handle.read(8), "little")
    if size < 8 or n > size - 8:
        raise damaged(file, f"has {size} bytes, too few for its header")
    if n > _LARGEST_HEADER:
        raise damaged(file, f"its header has {n} bytes, more than {_LARGEST_HEADER}")
    text = bytearray(n)
    _fill(handle, 8, memoryview(text), file)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = sorted(
            (*_numbers(e["data_offsets"]), name, str(e["dtype"]), tuple(_numbers(e["shape"])))
            for name, e in header.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise damaged(file, f"no header of safetensors: {e}") from e
    at = 0
    for begin, end, name, kind, shape in entries:
        dtype = _KINDS.get(kind, repr(kind))
        size_fits = not isinstance(dtype, torch.dtype) or end - begin == math.prod(shape) * dtype.itemsize
        if begin != at or end < at or not size_fits:
            raise damaged(file, f"tensor {name!r} of shape {shape} is said to lie at {begin} to {end}")
        at = end
        yield name, Stored(file, shape, dtype, functools.partial(_values, file, handle, 8 + n + begin, shape, dtype))
    if at != size - 8 - n:
        raise damaged(file, f"its tensors take {at} bytes, and {size - 8 - n} are there")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) != len(pairs):
        raise ValueError("a name twice")
    return content


def _numbers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise ValueError(f"{repr(values)[:40]} is no list of sizes")
    return values


def _values(file: Path, handle: BinaryIO, at: int, shape: tuple[int, ...], dtype: torch.dtype | str) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise damaged(file, f"numbers of kind {dtype}")
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        place: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        _fill(handle, at, memoryview(place), file)
    return tensor


def _fill(handle: BinaryIO, at: int, place: memoryview, file: Path) -> None:
    handle.seek(at)
    while len(place):
        try:
            n = handle.readinto(place)  # type: ignore[attr-defined]
        except OSError as e:
            raise CheckpointError(f"{file}: cannot be read ({e.strerror}).") from e
        if not n:
            raise CheckpointError(f"{file}: was cut while it was read. Load it again when it is whole.")
        place = place[n:]


def _torch_file(file: Path, handle: BinaryIO) -> Iterator[tuple[str, Stored]]:
    return plain_tensors(file, handle, torch_content(file, handle))


def torch_content(file: Path, handle: BinaryIO, settings: bool = False) -> Any:
    """The content of a file of ``torch.save``: tensors alone, or with ``settings`` a training's checkpoint, which is data too."""
    with _damage(file), torch.serialization.safe_globals(_SETTINGS if settings else []):
        # files of before torch 1.6 are no zip archives and cannot be mapped
        zipped = zipfile.is_zipfile(handle)
        _check_pickles(file, handle, zipped, _TRAINING if settings else _PLAIN)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    if not os.path.samestat(os.stat(file), os.fstat(handle.fileno())):
        raise CheckpointError(f"{file}: was replaced while it was read. Load it again when that is done.")
    return content


def plain_tensors(file: Path, handle: BinaryIO, content: Any) -> Iterator[tuple[str, Stored]]:
    """The tensors of a dict from a file of torch's, each known to be plain numbers that lie in the file."""
    size, total = os.fstat(handle.fileno()).st_size, 0
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected a dict of tensors by name.")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: {name!r} is a {type(tensor).__name__}, expected a tensor.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or _overlaps(tensor):
            raise CheckpointError(
                f"{file}: tensor {name!r} is not plain numbers in the file ({tensor.layout}, strides {tensor.stride()}). "
                "Save it dense and contiguous."
            )
        total += tensor.nbytes
        if tensor.nbytes > size or total > _MOST_NAMES * size:
            raise CheckpointError(
                f"{file}: its tensors up to {name!r} take {total} bytes, and it has {size}; at most {_MOST_NAMES} times that is "
                "read. Save it without names that share a place."
            )
        own = lambda tensor=tensor: tensor.clone(memory_format=torch.contiguous_format)  # noqa: E731
        yield name, Stored(file, tuple(tensor.shape), tensor.dtype, own)


def _overlaps(tensor: Tensor) -> bool:
    """Tell that several elements lie in one place, as after ``expand``."""
    span = 1
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1 and stride < span:
            return True
        span += (n - 1) * stride
    return False


def check_state_file(file: Path) -> None:
    """Refuse a file of a training's state (``torch.save``) that is damaged, could run code or take more memory than its size."""
    with open_regular(file) as handle, _damage(file):
        size, zipped = os.fstat(handle.fileno()).st_size, zipfile.is_zipfile(handle)
        _check_pickles(file, handle, zipped, _STATES)
        if file.name != "optimizer.pt":
            return
        level = [torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)]
    total = 0
    while level:
        for tensor in (value for value in level if isinstance(value, Tensor)):
            total += tensor.nbytes
            if tensor.layout != torch.strided or _overlaps(tensor) or total > _MOST_NAMES * size:
                raise CheckpointError(f"{file}: holds tensors of more numbers than the file. It is damaged or hostile.")
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list | tuple)]
        level = [value for values in inner for value in values]


def _check_pickles(file: Path, handle: BinaryIO, zipped: bool, allowed: frozenset[str]) -> None:
    """Refuse what could run code or take memory, before torch looks at it: only what plain tensors need is let through."""
    if not zipped:
        handle.seek(0)
        # magic number, version, system, the tensors, the names of their storages; then the numbers
        buffered = io.BufferedReader(handle, 2**16)  # type: ignore[type-var]
        for _ in range(5):
            _check_names(file, buffered, allowed)
        buffered.detach()
        return
    with zipfile.ZipFile(handle) as archive:
        members = archive.infolist()
        size, total = os.fstat(handle.fileno()).st_size, sum(member.file_size for member in members)
        packed = next((member.filename for member in members if member.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None or total > size:
            what = f"{packed!r} is compressed" if packed else f"its parts take {total} bytes, and it has {size}"
            raise CheckpointError(
                f"{file}: is no file that torch.save has written ({what}). Get the weights as safetensors."
            )
        for member in members:
            if member.filename.endswith(".pkl"):
                _check_names(file, io.BytesIO(archive.read(member)), allowed)


def _check_names(file: Path, stream: Any, allowed: frozenset[str]) -> None:
    start = stream.tell()
    for op, arg, at in pickletools.genops(stream):
        if at is not None and at - start > _LARGEST_HEADER:
            raise damaged(file, f"its description of tensors has more than {_LARGEST_HEADER} bytes")
        if op.name == "GLOBAL":
            module, _, name = str(arg).partition(" ")
            if arg in allowed or (module in ("torch", "torch.storage") and _names_numbers(name)):
                continue
        elif op.name in allowed or op.name not in _MAKES_OBJECTS:
            continue
        raise CheckpointError(
            f"{file}: is damaged, or wants to run code, which is refused ({shortened(str(arg or op.name))}: plain tensors need none). "
            "Get the weights as safetensors."
        )


def _names_numbers(name: str) -> bool:
    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)


def damaged(file: Path, reason: str) -> CheckpointError:
    """An error about what a file holds, to be raised."""
    return CheckpointError(f"{file}: is damaged ({reason}). Copy it again.")


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
        raise damaged(file, reason) from e
