"""Next-token cross-entropy that never holds more than a slice of the logits, and forms them once.

The logits of a language model are its largest tensor: 8 x 2048 tokens over 50 280 words are 1.6 GB in bfloat16. They are formed, reduced
and differentiated one slice of tokens at a time, in their own dtype and while the loss is formed: its backward only multiplies.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ...kernels import cross_entropy, seq
from ...kernels.derivatives import plain, transformed
from ...kernels.numerics import add_product, product
from ...kernels.seq import Seq
from ...layers.common import acc_dtype, autocasts, dtype_read, hooked_everywhere, upcast, weight_dtype, why_called
from .block import is_sharded
from .hooks import has_backward_hooks

__all__ = ["IGNORE", "items_of", "next_token_loss", "share_of_items", "shift_labels"]

IGNORE = -100
# Logits per slice. Every slice also reads and writes the gradient of the whole head, so few large ones move fewer bytes.
_SLICE_BYTES = 1 << 28


def shift_labels(labels: Tensor, seq: Seq | None, after: Tensor | None = None) -> Tensor:
    """The target of every position, ``(b, l)``: the label of the next token in its document; -100 at the end of one and at padding.

    ``after``, ``(b, 1)``, are the labels of the tokens that follow the rows, where those are pieces of longer ones.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if seq is not None:
        following = F.pad(seq.doc[:, 1:], (0, 1), value=-1)
        targets = targets.masked_fill((following != seq.doc) | ~seq.valid, IGNORE)
    if after is None:
        return targets
    if seq is None:
        return torch.cat([targets[:, :-1], after], 1)
    last = (seq.lengths - 1).clamp(min=0)[:, None]
    return targets.scatter(1, last, after.where(seq.lengths[:, None] > 0, IGNORE))


def next_token_loss(hidden: Tensor, head: nn.Linear, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy in nats per target, in at least float32; its gradient is known with it, so there is no second derivative.

    Args:
        hidden: ``(b, l, d)``, the output of the final norm.
        head: The projection to ``v`` logits; called as a module, so that hooks and adapters on it count.
        targets: ``(b, l)`` int64, -100 where there is none (:func:`shift_labels`); without any, the loss is 0.
        num_items: Divide by this instead of by the number of targets: the targets of a whole accumulated batch; 0 if it has none.
    """
    hidden, targets, items = hidden.flatten(0, 1), targets.flatten(), items_of(targets, num_items)
    if not is_sharded(head) or torch.compiler.is_compiling():
        hidden, targets = _asked(hidden, targets)
        return _summed(hidden, head, head, targets) / items
    if _hooked_besides(head):  # what others see of a call are its logits, all of them
        return _recomputed(hidden, head, targets, hidden.shape[0]) / items
    return _called_once(hidden, head, lambda h, call: _summed(h, head, call, targets) / items)


def share_of_items(targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """The share that these targets have in the items, in [0, 1]: 1 where they are all, 0 where there are none."""
    return (targets != IGNORE).sum() / items_of(targets, num_items)


def items_of(targets: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    """The number that a summed loss is divided by: the given one, or that of these targets; never 0."""
    # none among none are a loss of 0, and not 0 / 0
    items = (targets != IGNORE).sum() if num_items is None else num_items
    return items + (items == 0)


def _slice_tokens(hidden: Tensor, v: int) -> int:
    """The tokens of a slice: as many as the budget allows, in slices of about one size, whole tiles of a matmul where possible."""
    most = max(1, _SLICE_BYTES // (v * dtype_read(hidden).itemsize))
    tile = 128 if most >= 128 else 1
    most -= most % tile
    slices = max(1, -(-hidden.shape[0] // most))
    even = -(-hidden.shape[0] // slices)
    return max(1, even + -even % tile)


def _called_once(hidden: Tensor, head: nn.Module, loss: Callable[[Tensor, Callable], Tensor]) -> Tensor:
    """The loss formed in the place of the logits of one call of a head that FSDP2 shards.

    Around a call it gathers the weights, and after the call's backward it scatters their gradient: once in a step, and not once for every
    slice. Nor may the last slices' backward take away the weights that the first ones are formed of again, as it did where a group of
    modules is sharded together and torch is 2.11 (*got mixed torch.Tensor and DTensor*).
    """
    own, call, exact = vars(head).get("forward"), head.forward, []

    def instead(h: Tensor) -> Tensor:
        value = loss(h, call)
        exact.append(value.detach())
        return value

    head.forward = instead
    try:
        value = head(hidden)
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    # a policy may round what a module returns
    return value if value.dtype == exact[0].dtype else exact[0] + (value - value.detach())


def _asked(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out tokens without a target where they are the most, on a CPU, which need not be asked for their number."""
    if not (seq.readable(hidden) and seq.readable(targets)) or transformed() is not None:
        return hidden, targets
    asked = (targets != IGNORE).nonzero().squeeze(1)
    return (hidden[asked], targets[asked]) if 0 < 2 * len(asked) <= len(targets) else (hidden, targets)


def _hooked_besides(head: nn.Module) -> bool:
    """Return whether a sharded head has other hooks than the two of FSDP2."""
    around: Any = head
    return (
        len(around._forward_pre_hooks) > 1
        or len(around._forward_hooks) > 1
        or has_backward_hooks(head)
        or hooked_everywhere()
    )


def _summed(hidden: Tensor, head: nn.Linear, call: Callable, targets: Tensor) -> Tensor:
    """The summed loss of a head, whose logits ``call`` gives."""
    # a head whose weight is no matrix of numbers (quantised) says by itself how many logits it gives
    v = getattr(head, "out_features", None) or head.weight.shape[0]
    size = _slice_tokens(hidden, v)
    if _can_differentiate(hidden, head):
        return _differentiated(hidden, head, call, targets, size)
    return _recomputed(hidden, call, targets, size)


def _can_differentiate(hidden: Tensor, head: nn.Module) -> bool:
    """Return whether the head may be differentiated inside a forward.

    Not where it has no weights to differentiate (quantised ones may pass no gradient at all, which is for who asks for it), not while a
    graph is traced or transformed or is to have other derivatives than first ones backwards, not where parts of a head gather their weights
    and scatter their gradients by themselves, and not where a hook waits for the gradient of a weight, which is to see it once.
    """
    if torch.compiler.is_compiling() or plain() or weight_dtype(head) is None:
        return False
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # what is not imported has sharded nothing
    if fsdp and (
        any(isinstance(m, fsdp.FullyShardedDataParallel) for m in head.modules())
        or any(is_sharded(m) for m in head.modules() if m is not head)
    ):
        return False
    tensors = (hidden, *head.parameters())
    return all(type(x) in (Tensor, nn.Parameter) for x in tensors) and not any(x._backward_hooks for x in tensors[1:])


def _recomputed(hidden: Tensor, call: Callable, targets: Tensor, size: int) -> Tensor:
    """The summed loss as autograd sees it; the logits of a slice are dropped after its loss and formed again in the backward."""

    def slice_loss(h: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(call(h), t, ignore_index=IGNORE)[0].sum()

    # transforms know no saved tensors that are formed again
    if hidden.shape[0] <= size or transformed() is not None:
        return slice_loss(hidden, targets)
    total = upcast(hidden.new_zeros(()))
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        total = total + checkpoint(slice_loss, h, t, use_reentrant=False)
    return total


def _differentiated(hidden: Tensor, head: nn.Linear, call: Callable, targets: Tensor, size: int) -> Tensor:
    """The summed loss with its gradients, which are formed slice by slice and kept."""
    total, ghidden, scale = hidden.new_zeros(()), None, 1.0
    parts: Any = _Products(hidden, head) if _is_linear(hidden, head, call) else _Calls(hidden, head, call)
    for h, t, at in zip(hidden.detach().split(size), targets.split(size), itertools.count(0, size), strict=False):
        logits = parts.logits(h)
        scale = _scale(logits.dtype, size)
        with torch.autocast(hidden.device.type, enabled=False) if autocasts(hidden) else nullcontext():
            losses, g = cross_entropy(logits, t, ignore_index=IGNORE, want_gradient=parts.wanted, scale=scale)
            del logits
            total = total + losses.sum()
            if g is None:
                continue
            gh = parts.differentiated(g)
            del g
            if gh is not None:
                if ghidden is None:
                    ghidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
                ghidden[at : at + size] = gh
    leaves, gradients = parts.leaves, parts.gradients
    if ghidden is not None:
        leaves, gradients = [hidden, *leaves], [ghidden, *gradients]
    return _Known.apply(total, scale, gradients, *leaves) if leaves else total


def _is_linear(hidden: Tensor, head: nn.Module, call: Callable) -> bool:
    """Return whether two products are all there is to a head: no adapter, no hook, no mixture of types that ``F.linear`` would refuse."""
    if call is head:
        linear = not hooked_everywhere() and not why_called(head, nn.Linear)
    else:  # inside its call
        linear = getattr(call, "__func__", None) is nn.Linear.forward
    return linear and all(dtype_read(p) == dtype_read(hidden) for p in head.parameters())


class _Products:
    """Slices of a linear head. The gradients of its weight and bias add up in float32 as they come out of the products."""

    def __init__(self, hidden: Tensor, head: nn.Linear):
        trained = torch.is_grad_enabled()
        self.dtype, self.to_hidden = dtype_read(hidden), trained and hidden.requires_grad
        self.weight, self.bias = (None if p is None else p.detach().to(self.dtype) for p in (head.weight, head.bias))
        self.leaves = [p for p in (head.weight, head.bias) if p is not None and trained and p.requires_grad]
        self.wanted = self.to_hidden or bool(self.leaves)
        self.gradients: list[Tensor] = []

    def logits(self, h: Tensor) -> Tensor:
        """Those of a slice (m, d)."""
        self.h = h.to(self.dtype)
        return F.linear(self.h, self.weight, self.bias)

    def differentiated(self, g: Tensor) -> Tensor | None:
        """Add to the leaves' gradients, from that of the slice's logits; that of the slice, where it is wanted."""
        before: Sequence[Tensor | None] = self.gradients or [None] * len(self.leaves)
        self.gradients = [self._sum(p, g, x) for p, x in zip(self.leaves, before, strict=True)]
        return g @ self.weight if self.to_hidden else None

    def _sum(self, p: Tensor, g: Tensor, before: Tensor | None) -> Tensor:
        acc = acc_dtype(self.dtype)
        if p.dim() == 1:
            part = g.sum(0, dtype=acc)
            return part if before is None else before.add_(part)
        return product(g.t(), self.h, acc) if before is None else add_product(before, g.t(), self.h)


class _Calls:
    """Slices of whatever the head is, called as a module and differentiated by autograd.

    Finding the leaves pays: a step of mamba-130m (8 x 2048 tokens, bfloat16, one H200) with a hook on the head takes 49.4 ms of kernels
    and 6.05 GiB, and 55.8 ms and 6.66 GiB where slices are recomputed; with LoRA 53.3 ms and 7.32 GiB, against 62.6 and 7.72.
    """

    def __init__(self, hidden: Tensor, head: nn.Module, call: Callable):
        self.head, self.call, self.to_hidden, self.wanted = head, call, hidden.requires_grad, False
        self.leaves: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.edge: Any = None

    def logits(self, h: Tensor) -> Tensor:
        """As of :class:`_Products`."""
        self.h, first = h.requires_grad_(self.to_hidden), self.edge is None
        # what others do to saved tensors (offloading, recomputation) is not for a graph that ends here
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            logits = self.call(self.h)
        self.wanted = logits.requires_grad
        if self.wanted:
            self.edge = get_gradient_edge(logits)
            self.leaves = _leaves(logits, self.h, self.head) if first else self.leaves
        return logits

    def differentiated(self, g: Tensor) -> Tensor | None:
        """As of :class:`_Products`."""
        inputs = [self.h, *self.leaves] if self.to_hidden else self.leaves
        # in this thread: another would have to be waited for, and may not have a CUDA context yet
        with torch.autograd.set_multithreading_enabled(False):
            found = list(torch.autograd.grad([self.edge], inputs, [g]))
        gh = found.pop(0) if self.to_hidden else None
        before = _addable(self.gradients)
        self.gradients = [x.add_(part) for x, part in zip(before, found, strict=True)] if before else found
        return gh


def _scale(dtype: torch.dtype, tokens: int) -> float:
    """A power of two for the logits' gradient, taken out again in the backward.

    The gradient of the *sum* of the losses has entries up to 1, and every token of a slice may add one to the gradient of a weight. With
    float16, which ends at 65504, they are made to add up to 1024 at most, times an activation; nothing smaller, because probabilities of
    1e-5 have few bits left as it is. bfloat16 has float32's range.
    """
    return 0.5 ** max(0, (tokens - 1).bit_length() - 10) if dtype == torch.float16 else 1.0


def _leaves(logits: Tensor, h: Tensor, head: nn.Module) -> list[Tensor]:
    """The tensors that the logits depend on besides ``h``: trained parameters of the head, and what its hooks brought in."""
    made: dict[Any, list[Tensor]] = {}
    for p in head.parameters():
        if p.grad_fn is not None:  # parameters that a caller has replaced by functions of others
            made.setdefault(p.grad_fn, []).append(p)
    found: list[Tensor] = []
    todo, seen = [logits.grad_fn], set()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            found += made[node]
        elif hasattr(node, "variable"):
            found += [node.variable] if node.variable is not h else []
        else:
            todo += [n for n, _ in node.next_functions]
    return found


def _addable(gradients: list[Tensor]) -> list[Tensor]:
    """The same in at least float32, to be added to in place: two weights may share a gradient, and one may be a number expanded."""
    at = [g.untyped_storage().data_ptr() for g in gradients]
    return [
        g.to(acc_dtype(g.dtype), copy=at.count(x) > 1 or not g.is_contiguous())
        for g, x in zip(gradients, at, strict=True)
    ]


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.scale, ctx.dtypes = scale, [x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gout: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "next_token_loss: its gradient has no gradient (create_graph=True). "
                "Form the loss from out.logits instead, or set HYBRIDZOO_BACKEND=reference."
            )
        results = []
        for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            # of one dimension more than none, or the factor would be rounded to g's dtype first
            factor = (gout / ctx.scale).reshape((1,) * g.dim())
            results.append(torch.mul(g, factor, out=torch.empty_like(g, dtype=dtype)))
        return None, None, None, *results
