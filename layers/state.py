"""The state of a layer: what a sequence leaves behind in it, as a dataclass of tensors, batch first; and tuples of states."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "State",
    "copy_state",
    "each_state",
    "map_state",
    "nbytes_of",
    "paired",
    "put_together",
    "shapes",
    "states_in",
    "take_apart",
    "tree",
]


def tree(cls: type) -> None:
    """Let torch find the tensors in instances of a dataclass: data-parallel wrappers, transforms, export (``torch.utils._pytree``).

    What wraps a model puts hooks on the tensors of its outputs and inputs; those that it does not find are without, in silence.
    """

    def flatten(x: Any) -> tuple[list[Any], Any]:
        values = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        kinds = Tensor | tuple | list | dict
        inside = [name for name, v in values.items() if isinstance(v, kinds) or dataclasses.is_dataclass(v)]
        return [values.pop(name) for name in inside], (inside, values)

    def unflatten(children: Iterable[Any], context: Any) -> Any:
        # without __init__: transforms put other things than tensors in their places for a while
        inside, values = context
        x: Any = object.__new__(cls)
        for name, value in (*values.items(), *zip(inside, children, strict=True)):
            object.__setattr__(x, name, value)
        return x

    pytree.register_pytree_node(cls, flatten, unflatten)


def shapes(x: Any) -> str:
    """Describe an output or a state in a few words: shapes and dtypes, and no numbers."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}"
    if dataclasses.is_dataclass(x):
        parts = (f"{f.name}={shapes(getattr(x, f.name))}" for f in dataclasses.fields(x) if not f.name.startswith("_"))
        return f"{type(x).__name__}({', '.join(parts)})"
    if isinstance(x, tuple | list) and len(x) > 2:
        return f"{type(x).__name__} of {len(x)}: {shapes(x[0])}, ..."
    return repr(x)


@dataclasses.dataclass
class State:
    """Everything that a sequence leaves behind in one layer. Subclasses are dataclasses of tensors, batch first.

    Attributes:
        recurrent: The fields that sum up all tokens so far, each step rounding what the one before has left; float32 unless a caller
            asks for less (:meth:`kept_in`).
    """

    kinds: ClassVar[dict[str, type["State"]]] = {}  # all of them by name, for who reads one from a file
    recurrent: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            # a dataclass would write its own, with megabytes of numbers
            cls.__repr__ = shapes  # type: ignore[method-assign]
        tree(cls)
        State.kinds[cls.__name__] = cls

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its field's name."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A new state with ``fn`` applied to every tensor."""
        return dataclasses.replace(self, **{name: fn(value) for name, value in self.tensors()})

    def kept_in(self, dtype: torch.dtype) -> Self:
        """The same state, with what is :attr:`recurrent` in ``dtype``; steps compute in float32 still, and round what they write."""
        return dataclasses.replace(self, **{name: getattr(self, name).to(dtype) for name in self.recurrent})

    def restarted(self, rows: Tensor) -> Self:
        """A new state in which the rows where ``rows``, ``(b,)`` bool, is true are as before their first token: here, zero."""
        return self.map(lambda t: t.masked_fill(rows.view(-1, *(1,) * (t.dim() - 1)), 0))

    def copy_(self, other: Self) -> None:
        """Take over another state's values in place; tensors of another shape are replaced."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.shape == theirs.shape:
                mine.copy_(theirs)
            else:
                setattr(self, field.name, theirs)

    def put(self, rows: Tensor, other: Self) -> None:
        """Write another state's rows into the given ones, ``(m,)`` int64, in place, rounded to this one's types."""
        for name, mine in self.tensors():
            mine.index_copy_(0, rows, getattr(other, name).to(mine.dtype))

    def take(self, rows: Tensor, other: Self) -> None:
        """Take over another state's values in place, in the rows where ``rows``, ``(b,)`` bool, is true; nobody waits for a device."""
        for name, mine in self.tensors():
            mine.copy_(_rows_of(rows, getattr(other, name), mine))

    def mark(self) -> "State":
        """Return what :meth:`back` needs to go back to here, however many steps later; here, a copy: what was overwritten is gone."""
        return self.map(Tensor.clone)

    def back(self, mark: "State", rows: Tensor | None = None) -> None:
        """Be again as at a mark, in place and bit for bit, in all rows or where ``rows``, ``(b,)`` bool, is true; the mark stays good."""
        for name, theirs in mark.tensors():
            mine = getattr(self, name)
            if mine.shape != theirs.shape:
                setattr(self, name, theirs.clone())
            else:
                mine.copy_(theirs if rows is None else _rows_of(rows, theirs, mine))

    def reserve(self, more: int) -> None:
        """Have room for so many more tokens of every row, in place; here, a state is of one size."""

    def piece(self, start: int) -> Self:
        """Return what tokens from number ``start`` on have left behind, for :meth:`joined`; here, all: they went into one state."""
        return self

    @classmethod
    def joined(cls, pieces: Sequence[Self]) -> Self:
        """The state of a sequence from its pieces, one after the other; it shares no memory with them."""
        return pieces[-1].map(lambda t: t.clone())


def _rows_of(rows: Tensor, theirs: Tensor, mine: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *(1,) * (mine.dim() - 1)), theirs.to(mine.dtype), mine)


def each_state(state: Any, fn: Callable[[State], Any]) -> Any:
    """Apply ``fn`` to a state, or to every one in tuples."""
    return fn(state) if isinstance(state, State) else tuple(each_state(s, fn) for s in state)


def map_state(state: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``fn`` to every tensor of a state, a tuple of states, or ``()``: ``map_state(s, lambda t: t[rows])`` reorders a batch."""
    return each_state(state, lambda s: s.map(fn))


def states_in(state: Any) -> Iterator[State]:
    """A state, or all in tuples."""
    if isinstance(state, State):
        yield state
    else:
        for s in state:
            yield from states_in(s)


def paired(a: Any, b: Any) -> Iterator[tuple[State, State]]:
    """The states of two that are built alike, through tuples."""
    yield from zip(states_in(a), states_in(b), strict=True)


def copy_state(into: Any, source: Any) -> None:
    """Write ``source`` into ``into`` in place, through tuples."""
    for mine, theirs in paired(into, source):
        mine.copy_(theirs)


def nbytes_of(state: Any) -> int:
    """Bytes held by a state, a tuple of states, or ``()``."""
    return sum(t.numel() * t.element_size() for s in states_in(state) for _, t in s.tensors())


def take_apart(state: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The structure of a state as JSON has words for it; its tensors go into ``tensors``, under names that begin with ``name``."""
    if not isinstance(state, State):
        return [take_apart(s, f"{name}.{i}", tensors) for i, s in enumerate(state)]
    plain = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            tensors[f"{name}.{field.name}"] = value
        else:
            plain[field.name] = value
    return {"kind": type(state).__name__, "plain": plain}


def put_together(about: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The state that :func:`take_apart` has taken apart."""
    if isinstance(about, list):
        return tuple(put_together(part, f"{name}.{i}", tensors) for i, part in enumerate(about))
    kind = State.kinds[about["kind"]]
    fields = {field.name for field in dataclasses.fields(kind)} - about["plain"].keys()
    return kind(**about["plain"], **{field: tensors[f"{name}.{field}"] for field in fields})
