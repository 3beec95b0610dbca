"""The state that sequences leave behind in a whole model: one state per residual block, and how many tokens made it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...layers.base import (
    State,
    copy_state,
    each_state,
    map_state,
    nbytes_of,
    paired,
    put_together,
    shapes,
    states_in,
    take_apart,
    tree,
)
from ...layers.reading import Reading
from ..config.stages import pattern_of
from ..errors import CheckpointError
from .marks import Mark, Marks

__all__ = ["ModelState"]


@dataclasses.dataclass(repr=False)
class ModelState:
    """The state of every block after some tokens, as ``out.state`` holds it.

    Attributes:
        layers: One entry per residual block: a mixer's state, a tuple of them (parallel mixers), or ``()``.
        tokens: ``(b,)`` int64, real tokens seen so far by each row.
    """

    layers: tuple[Any, ...]
    tokens: Tensor
    _marks = cast(Marks | None, None)  # no field: marks stay with the state that they were taken of

    def map(self, fn: Callable[[Tensor], Tensor]) -> "ModelState":
        """A new state with ``fn`` applied to every tensor; the batch is the first dimension of each."""
        return ModelState(map_state(self.layers, fn), fn(self.tokens))

    def kept_in(self, dtype: torch.dtype | None) -> "ModelState":
        """The same values with the layers' recurrent states in ``dtype``, in which steps keep them; ``None`` leaves them as they are.

        Raises:
            ValueError: A type that holds no fractions.
        """
        if dtype is None:
            return self
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(
                f"state_dtype: {dtype} cannot hold a state. Use torch.float32, or torch.bfloat16 for half of the bytes."
            )
        return ModelState(each_state(self.layers, lambda state: state.kept_in(dtype)), self.tokens)

    def check_made_by(self, model: Any) -> None:
        """Refuse the state of a model with other layers.

        Raises:
            ValueError: With the first block whose state is another.
        """
        mine, own = (list(map(_kinds, layers)) for layers in (self.layers, model.init_state(0, 1).layers))
        if len(mine) != len(own):
            raise ValueError(
                f"state: is of {len(mine)} blocks, and the model has {len(own)}. Give one that this model has left."
            )
        for i, (a, b) in enumerate(zip(mine, own, strict=True)):
            if a != b:
                raise ValueError(
                    f"state: block {i} has {a}, and the model's leaves {b}. Give one that this model has left."
                )

    @property
    def recurrent_dtype(self) -> torch.dtype | None:
        """The type that recurrent states are kept in; ``None`` where there are none."""
        return next((getattr(s, name).dtype for s in states_in(self.layers) for name in s.recurrent), None)

    def detach(self) -> "ModelState":
        """The same values, cut off from the graph: for truncated backpropagation through time."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> "ModelState":
        """A copy that later steps on this state do not touch."""
        return self.map(torch.Tensor.clone)

    def reorder(self, rows: Tensor) -> "ModelState":
        """The states of the given rows, ``(m,)`` int64, in that order: beam search, or a batch that changes."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def put(self, rows: Tensor, other: "ModelState") -> None:
        """Write another state's rows into the given ones, ``(m,)`` int64, in place; both have room for the same number of tokens."""
        for mine, theirs in paired(self.layers, other.layers):
            mine.put(rows, theirs)
        self.tokens.index_copy_(0, rows, other.tokens)
        if self._marks is not None:
            self._marks.void(rows)

    def take(self, rows: Tensor, other: "ModelState") -> None:
        """Take over another state's values in place where ``rows``, ``(b,)`` bool, is true: rows that it has read on.

        It must be what a forward has made of this one, with room for the same number of tokens: marks stay good, and nobody waits for
        a device.
        """
        for mine, theirs in paired(self.layers, other.layers):
            mine.take(rows, theirs)
        self.tokens.copy_(torch.where(rows, other.tokens, self.tokens))

    def read_on(self, reading: Reading, rows: Tensor) -> None:
        """Be behind the tokens of a :meth:`~hybridzoo.zoo.models.model.Model.read` in the rows where ``rows``, ``(b,)`` bool, is true.

        As :meth:`take`.
        """
        reading.take(rows)
        self.tokens.add_(torch.where(rows, reading.lengths, 0))

    def mark(self) -> Mark:
        """Return a mark to go :meth:`back` to, however many steps later: copies of what recurrent layers keep, of attention the length."""
        return self._own_marks().new(self)

    def back(self, mark: Mark, rows: Tensor | None = None) -> None:
        """Go back to a mark of this state, in place and bit for bit.

        Args:
            mark: As often as you like, until the state has gone back to before it.
            rows: ``(b,)`` bool, the rows that go back; the others stay where they are. By default all.

        Raises:
            ValueError: A mark of another state, or of a way that a row has left.
        """
        self._own_marks().back(self, mark, rows)

    def keep(self, most: int) -> None:
        """Let up to ``most`` of the coming steps (``model.step``) be taken back, by :meth:`roll_back`; each then costs a :meth:`mark`.

        Raises:
            ValueError: ``most`` is negative.
        """
        self._own_marks().keep(most)

    def roll_back(self, steps: int | Tensor) -> None:
        """Take back the last steps in place and bit for bit: a number of them, or of each row its own, ``(b,)`` integers.

        Raises:
            ValueError: More of them than are kept.
        """
        self._own_marks().roll_back(self, steps)

    def _own_marks(self) -> Marks:
        self._marks = self._marks or Marks()
        return self._marks

    def before_step(self) -> None:
        """Make ready for a step; models call it."""
        if self._marks is not None:
            self._marks.before_step(self)

    def piece(self, start: int) -> "ModelState":
        """Return what tokens from number ``start`` on left behind: of attention keys and values, of a recurrent layer its state."""
        return ModelState(_along([self.layers], lambda states: states[0].piece(start)), self.tokens.clone())

    @classmethod
    def joined(cls, pieces: Sequence["ModelState"]) -> "ModelState":
        """The state of a sequence from its pieces, one after the other; it shares no memory with them."""
        layers = _along([piece.layers for piece in pieces], lambda states: type(states[0]).joined(states))
        return cls(layers, pieces[-1].tokens.clone())

    def restarted(self, rows: Tensor) -> "ModelState":
        """A new state in which the rows where ``rows``, ``(b,)`` bool, is true are as before their first token."""
        return ModelState(
            each_state(self.layers, lambda layer: layer.restarted(rows)), self.tokens.masked_fill(rows, 0)
        )

    def save(self, path: str | Path, model: Any = None) -> None:
        """Write the state to a ``.safetensors`` file, whole or not at all; with its ``model``, another one's is told from it when read.

        Raises:
            CheckpointError: It cannot be written there.
        """
        from ..checkpoint.publish import whole_file, why_unwritten

        tensors: dict[str, Tensor] = {"tokens": self.tokens}
        about = [take_apart(layer, f"layers.{i}", tensors) for i, layer in enumerate(self.layers)]
        kept = {name: t.detach().contiguous() for name, t in tensors.items()}
        said = {"format": "hybridzoo state 2", "layers": json.dumps(about)} | ({} if model is None else _named(model))
        path = Path(path)
        try:
            with whole_file(path) as temporary:
                save_file(kept, temporary, metadata=said)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(
                f"{path}: the state cannot be written there ({why_unwritten(e, path.parent)})."
            ) from e

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", model: Any = None) -> "ModelState":
        """Read what :meth:`save` has written.

        Raises:
            CheckpointError: Another file, a state of mixers that are not registered here, or one of another config than the ``model``'s.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = file.metadata() or {}
                if about.get("format") != "hybridzoo state 2":
                    raise CheckpointError(f"{path}: is no saved state of this version. Write one with ModelState.save.")
                if model is not None and "config" in about and about["config"] != _named(model)["config"]:
                    raise CheckpointError(
                        f"{path}: is the state of a model of another config ({about['pattern']}; this one is {_named(model)['pattern']}). "
                        "Load it for that model."
                    )
                # where they begin in the file depends on what it says in front, and bits of sums on where an operand begins
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            layers = tuple(
                put_together(layer, f"layers.{i}", tensors) for i, layer in enumerate(json.loads(about["layers"]))
            )
            return cls(layers, tensors["tokens"])
        except CheckpointError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: cannot be read as a state ({type(e).__name__}: {e}).") from e

    def reserve(self, more: int) -> None:
        """Have room for so many more tokens of every row, in place."""
        for state in states_in(self.layers):
            state.reserve(more)

    def places(self) -> list[int]:
        """The addresses of the layers' tensors."""
        return [t.data_ptr() for state in states_in(self.layers) for _, t in state.tensors()]

    def copy_(self, other: "ModelState") -> None:
        """Take over another state's values in place."""
        copy_state(self.layers, other.layers)
        self.tokens.copy_(other.tokens)
        if self._marks is not None:
            self._marks.void(None)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return nbytes_of(self.layers)

    __repr__ = shapes


def _along(states: Sequence[Any], fn: Callable[[Sequence[State]], State]) -> Any:
    if isinstance(states[0], State):
        return fn(states)
    return tuple(_along(parts, fn) for parts in zip(*states, strict=True))


def _named(model: Any) -> dict[str, str]:
    """The digest of a model's config, and its pattern, for people."""
    plain = OmegaConf.to_container(model.cfg)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return {"config": digest, "pattern": pattern_of(model.cfg)}


tree(ModelState)


def _kinds(layer: Any) -> str:
    """Words for the states of a block: their types, and sizes but for rows and slots."""
    each = (
        f"{type(s).__name__}({', '.join(f'{name} {tuple(t.shape[2:])}' for name, t in s.tensors())})"
        for s in states_in(layer)
    )
    return " + ".join(each) or "no state"
