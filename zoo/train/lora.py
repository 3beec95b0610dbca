"""Adapters of low rank (LoRA, arXiv:2106.09685) through PEFT: what a training adapts, its checkpoints, and the merged model at the end."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...layers.moe import MoE
from ..checkpoint.publish import discard, new_folder
from ..errors import CheckpointError, nearest
from ..hf import HybridZooForCausalLM
from ..models.model import Model
from .options import TrainOptions
from .run_folder import ADAPTER, AGAIN

__all__ = ["adapted", "load_adapter", "lora_config", "save_adapter"]

_EVERYWHERE = "all-linear"
_FILE = "adapter_model.safetensors"


def lora_config(core: Model, options: TrainOptions, source: Any) -> Any:
    """Return PEFT's config of the adapters that the options ask for, ``None`` for none.

    Targets that are not there are a ``ValueError``, and a model without a ``source``: what its weights come from.
    """
    if options.lora is None:
        return None
    if source is None:
        raise ValueError(
            f"train(lora={options.lora}): adapters on a fresh model would leave its random weights as they are. Give the folder of a "
            "trained model, or name one as base."
        )
    from peft import LoraConfig

    modules, parameters = _targets(core, options.lora_targets)
    alpha: Any = options.lora_alpha or 2 * options.lora  # PEFT's word is int; half a number does as well
    return LoraConfig(
        task_type="CAUSAL_LM", r=options.lora, lora_alpha=alpha, lora_dropout=0.0,
        base_model_name_or_path=_name_of(source), target_modules=modules, target_parameters=parameters or None,
    )  # fmt: skip


def adapted(core: Model, config: Any) -> tuple[Any, dict[str, str]]:
    """Put adapters into a model, whose own weights are frozen then; the model as PEFT has it, and what there is to say of it."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    whole = HybridZooForCausalLM.wrap(core)
    whole.name_or_path = config.base_model_name_or_path  # which PEFT compares
    model = get_peft_model(whole, config)
    # numbers, in lists of layers, are no names
    at = sorted(
        {
            [part for part in name.split(".") if part != "base_layer" and not part.isdigit()][-1]
            for name, m in core.named_modules()
            if isinstance(m, LoraLayer)
        }
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters()) - trained
    about = f"LoRA of rank {config.r}, alpha {config.lora_alpha:g}, on {', '.join(at)}: {trained:,} parameters are trained, the others' "
    about += f"{everything:,} stay as they are"
    if any(isinstance(m, MoE) for m in core.modules()) and not config.target_parameters:
        about += "; experts are no linear layers and have none, lora_targets names those that shall (experts.w1)"
    return model, {"adapters": about}


def _name_of(source: Any) -> str:
    """The name, for the adapter's file, of the model that it belongs to: a folder from wherever that is read, or a hub id."""
    if not isinstance(source, str | os.PathLike):
        return str(getattr(getattr(source, "core", source), "source", None) or "")
    return os.path.abspath(source) if os.path.isdir(source) else str(source)


def _targets(core: Model, asked: str) -> tuple[Any, list[str]]:
    """The names of modules and those of parameters, as PEFT wants them."""
    if asked == _EVERYWHERE:
        return _EVERYWHERE, []
    linear = [name for name, m in core.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    tensors = [
        name for name, p in core.named_parameters() if p.dim() >= 2 and name.removesuffix(".weight") not in linear
    ]
    modules: list[str] = []
    parameters: list[str] = []
    for name in dict.fromkeys(part.strip() for part in asked.split(",")):
        for kind, into in ((linear, modules), (tensors, parameters)):
            if any(there == name or there.endswith(f".{name}") for there in kind):
                into.append(name)
                break
        else:
            known = sorted({there.rpartition(".")[2] for there in linear} | {_short(there) for there in tensors})
            raise ValueError(
                f"lora_targets={asked!r}: the model has no linear layer and no matrix {name!r}.{nearest(name, known)} It has "
                f"{', '.join(known)}; or say {_EVERYWHERE}."
            )
    tied = [name for name in modules if name.rpartition(".")[2] in (core.head_name, "embedding")]
    if tied and core.cfg.get("tie_embeddings"):
        raise ValueError(
            f"lora_targets={asked!r}: {tied[0]} shares its weight (tie_embeddings), and an adapter would change one of the two. Leave it "
            "out."
        )
    return modules, parameters


def _short(name: str) -> str:
    """The name of a parameter with that of its module: ``experts.w1``."""
    return ".".join(name.split(".")[-2:])


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Fill the adapters of a model with those of its checkpoint; others are a CheckpointError."""
    from peft import get_peft_model_state_dict

    places = get_peft_model_state_dict(model)
    try:
        stored = load_file(folder / _FILE)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{folder / _FILE}: cannot be read ({e}). {AGAIN}") from e
    shapes = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in (stored, places)]
    if wrong := sorted(name for name in {**stored, **places} if shapes[0].get(name) != shapes[1].get(name)):
        raise CheckpointError(f"{folder / _FILE}: holds other adapters than the model's: {wrong[0]!r} differs. {AGAIN}")
    with torch.no_grad():
        for name, tensor in stored.items():
            places[name].copy_(tensor)


def save_adapter(model: Any, out: Path) -> None:
    """Write the adapters into ``OUT/adapter``, which is whole from the moment that it is there."""
    discard(out / ADAPTER)  # of a call that was ended before it said that all is done
    with new_folder(out / ADAPTER) as aside:
        model.save_pretrained(aside)
