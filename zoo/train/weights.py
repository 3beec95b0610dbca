"""Weights of a checkpoint of a training, back into the model that it is of."""

from pathlib import Path
from typing import Any

import torch

from ..checkpoint.tensors import stored_tensors
from ..errors import CheckpointError
from .lora import load_adapter
from .run_folder import AGAIN, SHARDED

__all__ = ["load_weights"]


def load_weights(trained: Any, folder: Path) -> None:
    """Fill the Trainer's model with the weights of its checkpoint; tensors of other names, shapes or types are a CheckpointError."""
    if (folder / SHARDED).exists():
        from .sharding import load_shards  # which takes long to import

        return load_shards(trained, folder)
    if hasattr(trained, "peft_config"):
        return load_adapter(trained, folder)
    model = trained.core
    with stored_tensors(folder) as stored, torch.no_grad():
        places = dict(model.named_parameters(remove_duplicate=False))
        filled = {id(places[name]) for name in stored if name in places}
        lacking = (name for name, p in model.named_parameters() if id(p) not in filled)
        if wrong := sorted(set(stored) - set(places)) + sorted(lacking):
            raise CheckpointError(
                f"{folder}: holds the weights of another model: {wrong[0]!r} is in one of them alone. {AGAIN}"
            )
        for name, tensor in stored.items():
            value, place = tensor.read(), places[name]
            if value.shape != place.shape or value.dtype != place.dtype:
                raise CheckpointError(
                    f"{tensor.file}: {name!r} is {value.dtype} of shape {tuple(value.shape)}, the model's {place.dtype} of shape "
                    f"{tuple(place.shape)}. {AGAIN}"
                )
            place.copy_(value)
