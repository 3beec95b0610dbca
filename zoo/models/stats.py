"""The costs of a model, block by block, before anything is allocated: the numbers behind ``zoo show``.

The model itself is built on the meta device and asked, so what is printed is what runs.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from ..config.stages import pattern_of
from .build import build
from .model import Model

__all__ = ["Row", "Stats", "numbers", "stats"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One residual block, or one of ``embedding``, ``norm_f`` and ``lm_head``.

    Attributes:
        index: Of the residual block; ``None`` for the other three.
        token: What stands there: the pattern's token, or the name of the part.
        params: Parameters that no earlier row has; 0 for weights that are shared with one.
        active_params: Those of ``params`` that one token passes through: of a mixture of experts, the chosen ones.
        flops: Forward FLOPs per token, or per image, 2 per multiply-add; norms are not counted.
        state_bytes: What one sequence leaves behind here.
    """

    index: int | None
    token: str
    params: int
    active_params: int
    flops: int
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class Stats:
    """A model's rows and their sums.

    Attributes:
        layers: The pattern; of several stages, with bars between them.
        unit: What FLOPs are per: ``"token"`` or ``"image"``.
        seq_len: Tokens per sequence, for which FLOPs and state are stated; of images, their height and width in pixels.
        rows: Embedding, blocks, what stands between stages, final norm and head, in this order.
        params: Parameters, tied and shared ones counted once.
        active_params: Parameters that one token passes through, embedding table included, as in "12B active".
        flops: Forward FLOPs per token or image; training takes three times as many.
        dtype: Of the weights, as a text: ``"bfloat16"``. Parameters that must be float32 are, whatever it says.
        weight_bytes: What the weights take up, tied and shared ones counted once.
        state_bytes: What one sequence leaves behind.
        attention_of_mixers: Attention's share of the sequence mixers, in [0, 1]; ``None`` if there are none.
        attention_of_blocks: Attention's share of all residual blocks. Papers state either.
    """

    layers: str
    unit: str
    seq_len: int
    rows: list[Row]
    params: int
    active_params: int
    flops: int
    dtype: str
    weight_bytes: int
    state_bytes: int
    attention_of_mixers: float | None
    attention_of_blocks: float


def stats(source: Any, seq_len: int | None = None, dtype: torch.dtype | None = None) -> Stats:
    """Count a model's parameters, FLOPs and state.

    Args:
        source: A model, or whatever ``zoo.build`` takes: a name, a path, a config.
        seq_len: Tokens per sequence, at least 1, 2048 by default; of images, their height and width, by default the config's.
        dtype: Of weights and attention's state, float32 unless given; ignored for a model, which has one.

    Raises:
        ValueError: ``seq_len`` is not positive.
        ConfigError: ``source`` is no valid config.
    """
    if seq_len is not None and seq_len < 1:
        raise ValueError(f"seq_len: is {seq_len}. Use 1 or more tokens.")
    model = source if isinstance(source, Model) else build(source, device="meta", dtype=dtype)
    size, blocks = model.usual_size if seq_len is None else seq_len, model.backbone.blocks
    rows = _rows(model, size)
    attention = sum(any(getattr(m, "attends", False) for m in block.modules()) for block in blocks)
    mixers = sum(block.mixer.mixes_tokens for block in blocks)
    return Stats(
        layers=pattern_of(model.cfg),
        unit=model.unit,
        seq_len=size,
        rows=rows,
        **{key: sum(getattr(row, key) for row in rows) for key in ("params", "active_params", "flops", "state_bytes")},
        dtype=str(model.some_weight().dtype).removeprefix("torch."),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        attention_of_mixers=attention / mixers if mixers else None,
        attention_of_blocks=attention / len(model.specs),
    )


def _rows(model: Model, size: int) -> list[Row]:
    seen: set[int] = set()
    between = model.between_flops(size)
    rows = [_row(None, "embedding", model.backbone.embedding, seen, model.embedding_flops(size))]
    for spec, block, flops in zip(model.specs, model.backbone.blocks, model.block_flops(size), strict=True):
        if (i := model.backbone.begins.get(spec.index)) is not None:
            rows.append(_row(None, "downsample", model.backbone.downsample[i], seen, between[i]))
        state_bytes = 0 if model.unit == "image" else block.mixer.state_bytes(size)
        rows.append(_row(spec.index, spec.token, block, seen, flops, state_bytes))
    rows.append(_row(None, "norm_f", model.backbone.norm_f, seen))
    rows.append(_row(None, model.head_name, model.head, seen, model.head_flops(size)))
    return rows


def numbers(source: Any) -> dict[str, Any]:
    """Count a model for ``zoo list``, as ``configs/numbers.json`` keeps it: the state is that of 1,024 tokens."""
    model = source if isinstance(source, Model) else build(source, device="meta")
    found = stats(model, 1024 if model.unit == "token" else None)
    kept = ("params", "active_params", "state_bytes")
    return {key: getattr(found, key) for key in kept} | {"pattern": found.layers}


def _row(index: int | None, token: str, module: nn.Module, seen: set[int], flops: int = 0, state_bytes: int = 0) -> Row:
    new = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
    idle = 0
    for part in module.modules():
        active: Any = getattr(part, "active_parameters", None)
        if active is not None and any(id(p) in new for p in part.parameters()):
            idle += sum(p.numel() for p in part.parameters()) - active
    seen.update(new)
    params = sum(new.values())
    return Row(index, token, params, params - idle, flops, state_bytes)
