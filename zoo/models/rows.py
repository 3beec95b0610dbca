"""The rows of a batch as a caller describes them: padding, packing, documents."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.seq import Seq, as_tensor
from .state import ModelState

__all__ = ["check_known", "describe_rows", "integers", "number_documents", "rectangle", "several"]


def integers(name: str, ids: Tensor, instead: str = "") -> Tensor:
    """Return token ids of any integer type in one that an embedding takes; an error ends with what could be passed ``instead``."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}. Pass token ids{instead}.")
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.long()


def several(given: Any) -> list[Any]:
    """List what was given as one or as several, of Python, NumPy or torch."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    if plain is None:
        return []
    return list(plain) if isinstance(plain, Iterable) and not isinstance(plain, str | bytes) else [plain]


def check_known(name: str, ids: Tensor, count: int) -> None:
    """Refuse token ids that a table of ``count`` rows has not, which would end a GPU's process.

    Raises:
        ValueError: With the first of them.
    """
    strange = (ids < 0) | (ids >= count)
    if bool(strange.any()):
        raise ValueError(
            f"{name}: holds {ids[strange][0].item()}, and the model knows the ids 0 to {count - 1}. Is it its tokenizer?"
        )


def rectangle(rows: Sequence[list[Any]], fill: int | float, left: bool = False) -> Tensor:
    """Return lists of unequal lengths as a tensor ``(b, l)``, int64 or float32 as ``fill`` is, which stands behind them, or in front."""
    longest = max(map(len, rows), default=0)
    rest = ([fill] * (longest - len(row)) for row in rows)
    dtype = torch.long if isinstance(fill, int) else torch.float32
    whole = [more + row if left else row + more for row, more in zip(rows, rest, strict=True)]
    return torch.tensor(whole, dtype=dtype).view(len(rows), longest)


def describe_rows(
    x: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Any,
    seq_idx: Any,
    seq: Seq | None,
    state: ModelState | None,
) -> Seq | None:
    """Return the description that layers take of the rows of ``x``, (b, l, d); arguments and errors as of :meth:`CausalLM.forward`."""
    b, l = x.shape[:2]
    if state is not None and state.tokens.shape[0] != b:
        raise ValueError(
            f"state: holds {state.tokens.shape[0]} rows, the tokens have {b}. Use state.reorder to select rows."
        )
    packing = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, "seq": seq}
    given = [name for name, value in packing.items() if value is not None]
    if given:
        name = ", ".join(given)
        if len(given) > 1:
            raise ValueError(f"{name}: say the same in two ways. Give one of them.")
        if attention_mask is not None:
            raise ValueError(f"attention_mask, {name}: give one of them; a packed row has no padding.")
        if state is not None and (seq is None or seq.packed):
            raise ValueError(f"state, {name}: a packed row starts every document afresh and cannot continue a state.")
    if seq is not None:
        return _checked(seq, x)
    if cu_seqlens is not None:
        return Seq.from_cu_seqlens(cu_seqlens, b, l, x.device)
    if seq_idx is not None:
        return Seq.from_documents(number_documents(seq_idx, (b, l)), x.device)
    if attention_mask is None:
        return None
    if attention_mask.shape != (b, l):
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)} differs from the tokens' {(b, l)}. Mask this call's tokens only."
        )
    return Seq.from_mask(attention_mask.to(x.device))


def _checked(seq: Seq, x: Tensor) -> Seq:
    if seq.doc.shape != x.shape[:2]:
        raise ValueError(
            f"seq: describes rows of shape {tuple(seq.doc.shape)}, the tokens have {tuple(x.shape[:2])}. Describe this call's tokens."
        )
    if seq.doc.device != x.device:
        raise ValueError(f"seq: is on {seq.doc.device}, the tokens are on {x.device}. Pass device= where you make it.")
    return seq


def number_documents(seq_idx: Any, shape: tuple[int, int]) -> Tensor:
    """Documents counted from 0 along the rows of ``seq_idx``, where a number may come twice; -1 at padding."""
    seq_idx = as_tensor("seq_idx", seq_idx, "(b, l)", "Pass one number per token.")
    if seq_idx.shape != shape:
        raise ValueError(f"seq_idx: shape {tuple(seq_idx.shape)} differs from the tokens' {shape}.")
    padding = seq_idx < 0
    if not torch.compiler.is_compiling() and bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        raise ValueError("seq_idx: has padding (negative numbers) before a token. Padding stands at the end of a row.")
    starts = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long(), (1, 0))
    return starts.cumsum(1).masked_fill(padding, -1)
