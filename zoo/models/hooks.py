"""Hooks on modules: torch's way to read and change what passes through a model; they run when a module is called.

A token is decoded by ``step``, which calls no block. Where there is a hook, it is decoded by a forward over one token instead, in which
every module is called with what a whole text would give it.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...layers.common import hooked_everywhere

__all__ = ["Hooks", "has_backward_hooks", "has_hooks", "is_hooked"]

# torch's own names for what it calls around every module
_every: Any = nn.modules.module


def has_hooks(module: nn.Module) -> bool:
    """Return whether there are hooks on a module, or on all modules."""
    return bool(module._forward_hooks or module._forward_pre_hooks or has_backward_hooks(module) or hooked_everywhere())


def has_backward_hooks(module: nn.Module) -> bool:
    """Return whether somebody waits for gradients at a module: those of tensors that are arguments and outputs, not parts of such."""
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or _every._global_backward_hooks
        or _every._global_backward_pre_hooks
    )


def is_hooked(module: nn.Module) -> bool:
    """Return whether calling a module is more than the forward of its class.

    Hooks are also how FSDP gathers weights, and a forward of its own is how accelerate moves and casts them.
    """
    return has_hooks(module) or "forward" in module.__dict__


class Hooks:
    """A watch for hooks anywhere in a model, asked for every token.

    torch numbers the hooks of a process: while no number is taken, none has been registered. A module that comes into the model with a
    hook on it, or without a ``step``, is seen by the next look (:meth:`look_again`).
    """

    def __init__(self) -> None:
        self._none_up_to = -1

    def anywhere(self, model: Any) -> bool:
        """Return whether ``model`` has to be called for every token."""
        newest = RemovableHandle.next_id
        if self._none_up_to == newest and not torch.compiler.is_compiling():
            return False
        parts = [part for block in model.backbone.blocks for part in (block, getattr(block, "mixer", None))]
        if any(map(is_hooked, model.modules())) or not all(hasattr(part, "step") for part in parts):
            return True
        self._none_up_to = newest
        return False

    def look_again(self) -> None:
        """Forget what was seen."""
        self._none_up_to = -1
