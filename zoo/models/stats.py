"""The costs of a model, block by block, before anything is allocated: the numbers behind ``zoo show``.

The model itself is built on the meta device and asked, so what is printed is what runs.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

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
        flops: Forward FLOPs per token, 2 per multiply-add; norms are not counted.
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
        layers: The pattern.
        seq_len: Tokens per sequence, for which FLOPs and state are stated.
        rows: Embedding, blocks, final norm and head, in this order.
        params: Parameters, tied and shared ones counted once.
        active_params: Parameters that one token passes through, embedding table included, as in "12B active".
        flops: Forward FLOPs per token; training takes three times as many.
        dtype: Of the weights, as a text: ``"bfloat16"``. Parameters that must be float32 are, whatever it says.
        weight_bytes: What the weights take up, tied and shared ones counted once.
        state_bytes: What one sequence leaves behind.
        attention_of_mixers: Attention's share of the sequence mixers, in [0, 1]; ``None`` if there are none.
        attention_of_blocks: Attention's share of all residual blocks. Papers state either.
    """

    layers: str
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


def stats(source: Any, seq_len: int = 2048, dtype: torch.dtype | None = None) -> Stats:
    """Count a model's parameters, FLOPs and state.

    Args:
        source: A model, or whatever ``zoo.build`` takes: a name, a path, a config.
        seq_len: Tokens per sequence, at least 1.
        dtype: Of weights and attention's state, float32 unless given; ignored for a model, which has one.

    Raises:
        ValueError: ``seq_len`` is not positive.
        ConfigError: ``source`` is no valid config.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len: is {seq_len}. Use 1 or more tokens.")
    model = source if isinstance(source, Model) else build(source, device="meta", dtype=dtype)
    seen: set[int] = set()
    rows = [_row(None, "embedding", model.backbone.embedding, seen)]
    for spec, block in zip(model.specs, model.backbone.blocks, strict=True):
        state_bytes = block.mixer.state_bytes(seq_len)
        rows.append(_row(spec.index, spec.token, block, seen, block.flops(seq_len), state_bytes))
    rows.append(_row(None, "norm_f", model.backbone.norm_f, seen))
    rows.append(_row(None, model.head_name, model.head, seen, model.head_flops(seq_len)))

    attention = sum(any(getattr(m, "attends", False) for m in block.modules()) for block in model.backbone.blocks)
    # what mixes tokens leaves a state behind; channel mixers leave none
    mixers = sum(row.state_bytes > 0 for row in rows)
    return Stats(
        layers=model.cfg.layers,
        seq_len=seq_len,
        rows=rows,
        **{key: sum(getattr(row, key) for row in rows) for key in ("params", "active_params", "flops", "state_bytes")},
        dtype=str(model.some_weight().dtype).removeprefix("torch."),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        attention_of_mixers=attention / mixers if mixers else None,
        attention_of_blocks=attention / len(model.specs),
    )


def numbers(source: Any) -> dict[str, Any]:
    """Count a model for ``zoo list``, as ``configs/lm/numbers.json`` keeps it: the state is that of 1,024 tokens."""
    found = stats(source, 1024)
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
