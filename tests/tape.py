"""A stand-in for a CUDA graph on the CPU: the operations of a piece of work, on the tensors that it was recorded with."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


def places(tensors):
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}


class Tape(TorchDispatchMode):
    """Takes down what work asks for. As with a graph, recording changes no tensor that was there before, and nobody may read a number."""

    def __init__(self, work):
        super().__init__()
        self.taken, self.before, self.made, self.replays = [], {}, set(), 0
        with self:
            work()
        for tensor, value in self.before.values():
            tensor.copy_(value)
        self.before.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func.overloadpacket.__name__ not in ASKS, f"{func} reads a number, which a graph cannot"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(value)
        for value in kwargs.values():
            if func._schema.name.endswith("out") and isinstance(value, torch.Tensor):
                self._remember(value)
        out = func(*args, **kwargs)
        self.made |= places(out) - places((args, kwargs))
        self.taken.append((func, args, kwargs, out))
        return out

    def _remember(self, tensor):
        at = tensor.untyped_storage().data_ptr()
        if at not in self.made and at not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.before[at] = whole, whole.clone()

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.taken:
            new = func(*args, **kwargs)
            for old, now in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != now.data_ptr():
                    old.copy_(now)
