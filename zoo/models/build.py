"""From a config name to a model, and from a model to its optimiser groups."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config.resolve import resolve
from ..config.schema import SCHEMAS, WORDS
from ..device import pick_device
from ..errors import ConfigError, nearest
from .model import Model
from .tasks import task_of

__all__ = ["build", "param_groups"]


def build(
    config: Any,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> Any:
    """Build an untrained model.

    Args:
        config: A name from ``zoo.list_models()``, a path to a YAML file, or a config (``zoo.config(...)``, a dict, a ``DictConfig``).
        overrides: Dotlist changes, such as ``["d_model=256", "mixers.mamba.d_state=8"]``, or a mapping of keys, dotted or nested.
        device: Where the weights are created, the CPU by default; ``"meta"`` allocates nothing.
        dtype: Of the weights; parameters that must stay float32 do.
        **changes: Keys of the config, applied last: ``d_model=256``.

    Returns:
        The model, in training mode, of its task's class: a :class:`~hybridzoo.zoo.models.causal_lm.CausalLM`, say.

    Raises:
        ConfigError: The config is not valid; nothing has been allocated then.
        ValueError: The device is not there.
    """
    keys = dict.fromkeys(field.name for schema in SCHEMAS.values() for field in dataclasses.fields(schema))
    arguments = ["overrides", "device", "dtype", *keys]
    for key in changes:
        if key not in arguments:
            near = nearest(WORDS.get(key, key), arguments)
            raise ConfigError(
                f"{key}: is neither an argument of zoo.build nor a key of configs.{near} Known: {', '.join(arguments)}."
            )
    resolved = resolve(config, overrides, changes)
    return task_of(resolved.config)(
        resolved, device=None if device is None else pick_device(device, meta=True), dtype=dtype
    )


def param_groups(
    model: nn.Module, weight_decay: float = 0.1, layer_decay: float | None = None, lr: float | None = None
) -> list[dict[str, Any]]:
    """Split the parameters for an optimiser: those that weight decay may touch, and the rest.

    Matrices decay. Vectors (norms, biases) do not, nor what a module names in ``no_decay_parameters`` (decay rates, step biases, or
    learned positions).

    Args:
        model: A model, or any module that contains mixers.
        weight_decay: Of the first group.
        layer_decay: What the learning rate of a layer is multiplied by for every layer behind it (BEiT, arXiv:2106.08254): the head's is
            the rate itself, and the embedding's or the stem's the lowest. A block that mixes tokens begins a layer; channel mixers are of
            the layer of the block before them, and what makes a map smaller of the one in front of it.
        lr: The head's rate, for groups that say theirs.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``; with ``layer_decay`` two groups for
        each layer, the head's first, with an ``lr_scale``, and where ``lr`` is given that times it as ``lr``.

    Raises:
        ValueError: ``layer_decay`` for a module that is no model of the zoo.
    """
    exempt = {
        id(p)
        for part in model.modules()
        if (exempted := getattr(part, "no_decay_parameters", ()))
        for name, p in part.named_parameters()
        if name in exempted
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 and id(p) not in exempt]
    rest = [p for p in trained if p.dim() < 2 or id(p) in exempt]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0},
    ]  # fmt: skip
    return groups if layer_decay is None else _by_layer(model, groups, layer_decay, lr)


def _by_layer(
    model: nn.Module, groups: list[dict[str, Any]], layer_decay: float, lr: float | None
) -> list[dict[str, Any]]:
    core: Any = getattr(model, "core", model)
    if not isinstance(core, Model):
        raise ValueError(f"param_groups(layer_decay=...): {type(core).__name__} is no model of the zoo. Leave it out.")
    layer_of = {id(p): 0 for p in core.backbone.embedding.parameters()}
    depth = 0
    for i, block in enumerate(core.backbone.blocks):
        if i in core.backbone.begins:
            smaller = core.backbone.downsample[core.backbone.begins[i]]
            layer_of |= {id(p): depth for p in smaller.parameters()}
        depth = max(1, depth + block.mixer.mixes_tokens)
        for p in block.parameters():
            layer_of.setdefault(id(p), depth)
    found = []
    for layer in range(depth + 1, -1, -1):
        scale = layer_decay ** (depth + 1 - layer)
        rate = {"lr_scale": scale} | ({} if lr is None else {"lr": lr * scale})
        for group in groups:
            if params := [p for p in group["params"] if layer_of.get(id(p), depth + 1) == layer]:
                found.append(group | {"params": params} | rate)
    return found
