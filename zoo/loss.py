"""Next-token cross-entropy that never holds more than a slice of the logits.

The logits of a language model are its largest tensor: 8 x 2048 tokens over 50 280 words are 3.3 GB in fp32. They are formed, reduced
and differentiated one slice of tokens at a time.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.seq import Seq
from ..layers.common import acc_dtype, upcast

__all__ = ["IGNORE", "next_token_loss", "shift_labels"]

IGNORE = -100
# Logits per slice: 256 MB in fp32. Every slice also reads and writes the gradient of the whole head, so few large ones move fewer bytes.
_SLICE_ELEMENTS = 1 << 26


def shift_labels(labels: Tensor, seq: Seq | None) -> Tensor:
    """The target of every position: the next token's label, where that token belongs to the same document.

    Args:
        labels: ``(b, l)`` int64 aligned with the input tokens (not shifted), -100 where no loss is wanted; in ``seq``'s order.
        seq: Padding or packing of the rows.

    Returns:
        ``(b, l)`` int64 with -100 at the end of every document and at padding.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if seq is not None:
        following = F.pad(seq.doc[:, 1:], (0, 1), value=-1)
        targets = targets.masked_fill((following != seq.doc) | ~seq.valid, IGNORE)
    return targets


def next_token_loss(hidden: Tensor, head: nn.Linear, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy in nats per target.

    Args:
        hidden: ``(b, l, d)``, the output of the final norm.
        head: The projection to ``v`` logits; called as a module, so that hooks and adapters on it count.
        targets: ``(b, l)`` int64, -100 where there is none (:func:`shift_labels`).
        num_items: Divide by this instead of by the number of targets: the targets of a whole accumulated batch.

    Returns:
        A scalar in at least float32; 0 when there is no target.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    size = max(1, _SLICE_ELEMENTS // head.weight.shape[0])

    def slice_loss(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        # a GPU reads 16-bit logits once and writes float32: no copy of them in between
        log_probs = F.log_softmax(logits, -1, dtype=acc_dtype(logits.dtype))
        return F.nll_loss(log_probs, t, ignore_index=IGNORE, reduction="sum")

    total = upcast(hidden.new_zeros(()))
    if hidden.shape[0] <= size:
        total = total + slice_loss(hidden, targets)
    else:
        for h, t in zip(hidden.split(size), targets.split(size), strict=True):
            # the logits of a slice are dropped after its loss and formed again in the backward
            total = total + checkpoint(slice_loss, h, t, use_reentrant=False)
    items = (targets != IGNORE).sum().clamp(min=1) if num_items is None else num_items
    return total / items
