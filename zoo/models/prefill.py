"""The reading of prompts: in one forward, or in chunks that leave a state each."""

from typing import Any

import torch
from torch import Tensor

from .state import ModelState

__all__ = ["last_real", "prefill"]

# columns that are read at once: of half as many a small model's kernels take less time than the host takes to launch them
_LONG = 16384


def prefill(
    model: Any, input_ids: Tensor, mask: Tensor | None, state: ModelState | None, more: int, chunk: int | None
) -> tuple[Tensor, ModelState]:
    """Read prompts.

    Args:
        model: A language model.
        input_ids: ``(b, l)`` int64.
        mask: ``(b, l)``, nonzero at real tokens; ``None`` where all are.
        state: What was read before; ``None`` for nothing.
        more: Tokens that are to follow, for which there will be room.
        chunk: Columns that are read at once; ``None`` to choose.

    Returns:
        The logits behind each row's last real token, ``(b, v)``, and the state there.

    Raises:
        ValueError: A mask of another shape, a row without a real token, or a state of another number of rows.
    """
    b, l = input_ids.shape
    chunk = chunk or _LONG
    last = None if mask is None else last_real(input_ids, mask)
    begins = state is None
    if state is not None and state.tokens.shape[0] != b:
        raise ValueError(
            f"state: is of {state.tokens.shape[0]} rows, and there are {b} prompts. Use state.reorder(rows)."
        )
    logits = None
    for start in range(0, l, chunk):
        at = slice(start, min(start + chunk, l))
        ids, tokens = input_ids[:, at], None if mask is None else mask[:, at]
        # of the logits, only those of positions that some row ends at: without a mask nobody has to ask the device for these
        ends: Any = 1
        if last is not None:
            here = ((last >= at.start) & (last < at.stop)).nonzero().squeeze(1)
            ends = (last[here] - start).unique() if len(here) else 1
        out = model(ids, None, tokens, state=state, return_state=True, logits_to_keep=ends)
        state = out.state
        if begins and not start:
            # a layer that begins without a state reads none, and has as much room behind as one that was made with it
            state.reserve(l - at.stop + more)
        if last is None:
            logits = out.logits[:, 0]
        elif len(here):
            logits = out.logits.new_empty(b, out.logits.shape[-1]) if logits is None else logits
            logits[here] = out.logits[here, torch.searchsorted(ends, last[here] - start)]
    assert logits is not None and state is not None
    return logits, state


def last_real(input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the column of each row's last real token, ``(b,)`` int64; errors are those of :func:`prefill` about the mask."""
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)} differs from the prompts' {tuple(input_ids.shape)}."
        )
    last = ((mask != 0) * torch.arange(1, mask.shape[1] + 1, device=input_ids.device)).amax(1) - 1
    if bool((last < 0).any()):
        row = int((last < 0).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has no real token. Give every prompt at least one token (the BOS token, say)."
        )
    return last
