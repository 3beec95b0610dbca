"""Weights of which every process holds a part: their checkpoints, and the whole model that comes of them.

A checkpoint's tensors are in its folder ``sharded``, as torch's distributed checkpoints are (DCP): every process writes its part, and as
many or as few as like may read them.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from ..errors import CheckpointError
from ..models.build import build
from .feed import Feed
from .lora import adapted
from .run_folder import AGAIN, SHARDED

__all__ = ["gathered", "load_shards", "read_shards", "weights_of"]

# of what the description of a checkpoint is made, besides names of torch's types of numbers
_DESCRIBED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "StorageMeta"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Return the weights that are trained, by name, each process its part; frozen ones are where they came from."""
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


def load_shards(model: nn.Module, folder: Path) -> None:
    """Fill a model, sharded or not, with the weights of a checkpoint that several processes have written."""
    weights = weights_of(model)
    read_shards(weights, folder, without="optimizer.")
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def gathered(model: Any, adapters: Any, feed: Feed) -> Any:
    """Return the Trainer's model, whole and in memory, in the first process; in the others what they have. All have to call it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank():
        return model
    core = build(model.core.cfg)
    for name in ("source", "metadata", "family"):
        setattr(core, name, getattr(model.core, name))
    whole = adapted(core, adapters)[0] if adapters else feed.adapter(core)
    whole.load_state_dict(state)
    return whole


def read_shards(tensors: dict[str, Any], folder: Path, prefix: str = "", without: str | None = None) -> None:
    """Fill tensors from a checkpoint, every process its part.

    They must be all that are there under names that begin with ``prefix``, and not with ``without``; otherwise, that is a CheckpointError.
    """
    place = folder / SHARDED
    there = {name: shape for name, shape in _described(place).items() if name.startswith(prefix)}
    if without:
        there = {name: shape for name, shape in there.items() if not name.startswith(without)}
    sizes = {name: tuple(t.shape) for name, t in tensors.items()}
    if wrong := sorted(name for name in {**there, **sizes} if there.get(name) != sizes.get(name)):
        raise CheckpointError(
            f"{place}: holds another training's tensors: {wrong[0]!r} is {there.get(wrong[0], 'missing')} there, and "
            f"{sizes.get(wrong[0], 'missing')} in the model. {AGAIN}"
        )
    dcp.load(tensors, checkpoint_id=place, no_dist=not dist.is_initialized())


def _described(place: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors. Its description is a pickle, of which torch would run whatever stands there."""
    file = place / ".metadata"
    try:
        with file.open("rb") as f:
            found = _Description(f).load().state_dict_metadata
        return {name: tuple(_as_tensor(file, name, about).size) for name, about in found.items()}
    except (OSError, AttributeError, EOFError, pickle.UnpicklingError) as e:
        raise CheckpointError(f"{file}: cannot be read ({e}). {AGAIN}") from e


def _as_tensor(file: Path, name: str, about: Any) -> TensorStorageMetadata:
    if not isinstance(about, TensorStorageMetadata):
        raise CheckpointError(f"{file}: {name!r} is no tensor, and reading it could run code. {AGAIN}")
    return about


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIBED.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
