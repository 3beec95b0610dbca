"""The definition of the causal convolution: a loop over time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, doc: Tensor | None, silu: bool
) -> Tensor:
    """``y_t = bias + sum_j weight[:, k-1-j] x_{t-j}`` over the inputs of t's own document, x (b, l, d), weight (d, k).

    ``initial_state`` (b, k-1, d) stands before the row and belongs to its first document; ``doc`` (b, l) names documents.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    b, l, d = x.shape
    k = weight.shape[1]
    before = x.new_zeros(b, k - 1, d) if initial_state is None else initial_state
    row = torch.cat([before.to(acc), x.to(acc)], 1).unbind(1)
    docs = None if doc is None else torch.cat([doc[:, :1].expand(b, k - 1), doc], 1).unbind(1)
    taps = weight.to(acc).unbind(1)
    ys = []
    for t in range(l):
        y = x.new_zeros(b, d, dtype=acc) if bias is None else bias.to(acc).expand(b, d)
        for j in range(k):
            seen = (
                row[t + j] if docs is None else row[t + j].masked_fill((docs[t + j] != docs[t + k - 1])[:, None], 0.0)
            )
            y = y + taps[j] * seen
        ys.append(F.silu(y) if silu else y)
    return torch.stack(ys, 1).to(x.dtype) if ys else x.clone()
