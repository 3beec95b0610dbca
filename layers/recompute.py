"""Tensors that the backward forms again instead of keeping them.

An op that is cheap to repeat says how its output came about (:func:`repeatable`). Of such a tensor, what runs inside :func:`recomputing`
keeps the recipe: the first node of the backward that asks forms the tensor, and the last that needs it lets it go. The graph, and so
every module's call, hook and parameter, is that of the one forward; only values are formed twice, from the very tensors that the forward
read. What became of a tensor in a hook, an adapter or an in-place operation has no recipe, and is kept.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..kernels.derivatives import transformed
from ..kernels.torch_private import saved_tensors_are_handled

__all__ = ["left_alone", "recipe", "recomputing", "repeatable"]


class Recipe:
    """A way to form a tensor again: a function without a random part, and the operands that it had."""

    __slots__ = ("form", "made", "operands", "value", "versions")

    def __init__(self, out: Tensor, form: Callable[..., Tensor], operands: tuple):
        self.form, self.operands = form, operands
        self.versions = [x._version for x in self.tensors()]
        self.made = out._version
        self.value: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The operands that are tensors."""
        return [x for x in self.operands if isinstance(x, Tensor)]

    def changed(self) -> bool:
        """Return whether an operand was modified since."""
        return [x._version for x in self.tensors()] != self.versions

    def tensor(self) -> Tensor:
        """The tensor; kept from the first call on, until the graph lets go of this recipe."""
        if self.value is None:
            if self.changed():
                raise RuntimeError(_CHANGED)
            form, tensors = self.parts()
            self.value = form(tensors)
        return self.value

    def parts(self) -> tuple[Callable[[Sequence[Tensor]], Tensor], list[Tensor]]:
        """Return a function and the tensors that it forms the tensor from, for a node of autograd that saves these itself."""
        form, rest = self.form, [None if isinstance(x, Tensor) else (x,) for x in self.operands]

        def from_tensors(tensors: Sequence[Tensor]) -> Tensor:
            if not _have_memory(tensors):
                raise RuntimeError(_GIVEN_UP)
            others = iter(tensors)
            with torch.no_grad():
                return form(*(next(others) if x is None else x[0] for x in rest))

        return from_tensors, self.tensors()


def _have_memory(tensors: Sequence[Tensor]) -> bool:
    return all(x.untyped_storage().size() for x in tensors)


_GIVEN_UP = (
    "backward: the memory of a parameter was given up after the forward. Shard the whole layer, not parts of it."
)
_CHANGED = (
    "backward: a tensor that the gradient depends on was modified by an inplace operation after the forward. "
    "Change parameters and inputs after the backward, or change a copy."
)


def repeatable(out: Tensor, form: Callable[..., Tensor], *operands: Any) -> Tensor:
    """Give ``out`` back, which an op has just made in one piece, with a recipe if it is part of a graph.

    The recipe, ``form(*operands)``, yields the same bits again, whatever autocast says by then.
    """
    if not torch.compiler.is_compiling() and out.requires_grad and type(out) is Tensor and out.is_contiguous():
        out._recipe = Recipe(out, form, operands)  # type: ignore[attr-defined]
    return out


def recipe(x: Tensor) -> Recipe | None:
    """Find the way to form ``x`` again, for a node that is to keep no tensor that can be; ``None`` where it has to."""
    found = getattr(x, "_recipe", None)
    # nothing on the meta device has an address
    if found is None or not x.untyped_storage().data_ptr() or x._version != found.made or found.changed():
        return None
    # a module that FSDP shards by itself gives up the memory of its weights when it returns
    return found if _have_memory(found.tensors()) else None


class _Recomputing(saved_tensors_hooks):
    def __init__(self) -> None:
        super().__init__(self._keep, _kept)
        self.known: dict[int, tuple[Recipe, Tensor]] = {}

    def __enter__(self) -> Callable[[Tensor], Tensor]:  # type: ignore[override]
        super().__enter__()
        return self._drop

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        # what is kept refers to this object; it must not hold what was to be dropped
        self.known.clear()

    def _drop(self, x: Tensor) -> Tensor:
        found = recipe(x)
        if found is not None:
            # the tensor is held, so that nothing else gets its address meanwhile
            self.known[x.untyped_storage().data_ptr()] = found, x
        return x

    def _keep(self, x: Tensor) -> tuple:
        known, whole = self.known.get(x.untyped_storage().data_ptr(), (None, x))
        if known is None or x.dtype != whole.dtype:
            return x, x._version
        return known, x.shape, x.stride(), x.storage_offset() - whole.storage_offset()


def _kept(what: tuple) -> Tensor:
    source, *rest = what
    if isinstance(source, Recipe):
        return source.tensor().as_strided(*rest)
    # hooks replace autograd's own check
    if source._version != rest[0]:
        raise RuntimeError(_CHANGED)
    return source


def recomputing() -> Any:
    """A context whose value, called with a tensor, gives it back; autograd then keeps its recipe, if it has one, not the tensor.

    It does nothing where autograd keeps nothing, where a compiler decides itself what to recompute, and under somebody else's hooks on
    saved tensors, such as those of activation checkpointing and offloading, which take care of all of them.
    """
    return contextlib.nullcontext(lambda x: x) if left_alone() or saved_tensors_are_handled() else _Recomputing()


def left_alone() -> bool:
    """Return whether autograd keeps nothing, or a compiler or a transform decides what is kept."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled() or transformed() is not None
