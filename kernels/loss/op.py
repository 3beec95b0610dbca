"""The cross-entropy of rows of logits, and its gradient in the same call."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import Backend, choose, register
from ..numerics import acc_dtype
from . import cuda

# elements of a group of rows that the operations pass over while it is in the cache
_GROUP = {"cpu": 1 << 20, "cuda": 1 << 26}


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    want_gradient: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The cost of every row's target, ``logsumexp(logits) - logits[target]``, and its gradient.

    Args:
        logits: ``(m, v)``; -inf stands for a word that cannot come.
        targets: ``(m,)`` int64 from 0 to v - 1.
        ignore_index: Rows with this target have loss and gradient zero, whatever their logits are.
        want_gradient: Whether the gradient is formed; the losses then carry no graph. Without it they are differentiable.
        scale: A factor of the gradient.
        backend: ``"cuda"``, or ``"torch"`` for PyTorch operations; chosen automatically if absent.

    Returns:
        The losses ``(m,)`` in at least float32, and ``scale * (softmax(logits) - onehot(targets))`` as ``(m, v)`` in the logits' dtype, or
        ``None``. Sums are formed in at least float32. A target beyond the words raises IndexError on a CPU; on a GPU, where nothing waits
        for the answer, its loss and gradient are NaN (``"torch"``: the device-side assertion of ``F.nll_loss``).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
        BackendError: The backend asked for cannot do this call.
    """
    where = "cross_entropy"
    checks.floating(where, "logits", logits, 2, "(m, v)")
    checks.floats(where, logits=logits)
    checks.shape(where, "targets", targets, logits.shape[:1], "(m,)")
    checks.same_device(where, "logits", logits=logits, targets=targets)
    if targets.dtype != torch.int64:
        raise ValueError(f"{where}: targets has dtype {targets.dtype}, expected int64. Pass targets.long().")
    if logits.shape[1] == 0:
        raise ValueError(
            f"{where}: logits has shape {tuple(logits.shape)}, which leaves no word to choose. Use v >= 1."
        )
    subclass = type(logits).__name__ if type(logits) not in (Tensor, torch.nn.Parameter) else None
    chosen = choose(where, backend=backend, device=logits.device.type, dtype=logits.dtype, subclass=subclass)
    return chosen.run(logits.detach() if want_gradient else logits, targets, ignore_index, want_gradient, scale)


def _cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, want_gradient: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    acc = acc_dtype(logits.dtype)
    if not want_gradient:
        # a GPU reads 16-bit logits once and writes float32: no copy of them in between
        log_probs = F.log_softmax(logits, -1, dtype=acc)
        return F.nll_loss(log_probs, targets, ignore_index=ignore_index, reduction="none"), None
    losses, gradient = logits.new_empty(logits.shape[0], dtype=acc), torch.empty_like(logits)
    size = max(1, _GROUP.get(logits.device.type, _GROUP["cuda"]) // logits.shape[1])
    for x, t, loss, out in zip(*(m.split(size) for m in (logits, targets, losses, gradient)), strict=True):
        # the factor that all exponentials have in common shows in the largest: one exponential per logit, and no logarithm
        p = torch.softmax(x, -1, dtype=acc, out=out if x.dtype == acc else None)
        ignored = t == ignore_index
        # nll_loss refuses targets that are not there
        below = x.amax(-1).to(acc) + F.nll_loss(x, t, ignore_index=ignore_index, reduction="none")
        loss.copy_(below - p.amax(-1).log()).masked_fill_(ignored, 0.0)
        at = t.masked_fill(ignored, 0)[:, None]
        p.scatter_(1, at, p.gather(1, at) - 1)
        if scale != 1:
            p.mul_(scale)
        p.masked_fill_(ignored[:, None], 0.0)
        if p is not out:
            out.copy_(p)
    return losses, gradient


register(
    "cross_entropy",
    Backend("cuda", "our kernel, compiled at first use", cuda.refuse, cuda.cross_entropy),
    Backend("torch", "PyTorch operations", run=_cross_entropy, plain=True),
)
