"""Counters with which the blocks of a launch find out who is the last of them."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# of each state, by shape: a graph that was recorded goes on with its own while launches of another shape come
_counters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tickets(state: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Counters, zero between launches, that live as long as the state which these change: launches that run at once must not share them."""
    kept = _counters.setdefault(state, {})
    counters = kept.get(shape)
    if counters is None:
        counters = torch.zeros(shape, dtype=torch.int32, device=state.device)
        # what is made while a graph is captured is zero only when the graph runs
        if not (state.is_cuda and torch.cuda.is_current_stream_capturing()):
            kept[shape] = counters
    return counters
