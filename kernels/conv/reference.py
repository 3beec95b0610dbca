"""The definition of the causal convolution: a loop over time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import acc_dtype
from .inputs import ConvInputs


def causal_conv1d(i: ConvInputs, silu: bool) -> Tensor:
    """``y_t = bias + sum_j weight[:, k-1-j] x_{t-j}`` over the inputs of t's own document, x (b, l, d), weight (d, k).

    The initial state (b, k-1, d) stands before the row and belongs to its first document; ``doc`` (b, l) names documents.
    """
    acc = acc_dtype(i.x.dtype)
    (b, l, d), k = i.x.shape, i.weight.shape[1]
    before = i.x.new_zeros(b, k - 1, d) if i.initial_state is None else i.initial_state
    row = torch.cat([before.to(acc), i.x.to(acc)], 1).unbind(1)
    docs = None if i.doc is None else torch.cat([i.doc[:, :1].expand(b, k - 1), i.doc], 1).unbind(1)
    taps = i.weight.to(acc).unbind(1)
    ys = []
    for t in range(l):
        y = i.x.new_zeros(b, d, dtype=acc) if i.bias is None else i.bias.to(acc).expand(b, d)
        for j in range(k):
            seen = row[t + j]
            if docs is not None:
                seen = seen.masked_fill((docs[t + j] != docs[t + k - 1])[:, None], 0.0)
            y = y + taps[j] * seen
        ys.append(F.silu(y) if silu else y)
    return torch.stack(ys, 1).to(i.x.dtype) if ys else i.x.clone()
