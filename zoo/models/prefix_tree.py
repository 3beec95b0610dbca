"""States by token prefix, so that what several texts have in common is read once."""

import dataclasses
import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import integers
from .state import ModelState

__all__ = ["Prefix", "PrefixTree"]


@dataclasses.dataclass
class Prefix:
    """A text that was read.

    Attributes:
        logits: ``(1, v)`` of what follows.
        state: What it has left behind, of one row; the caller's own, to step on or to give to ``model.generate(..., state=...)``.
        reused: How many of its tokens did not have to be read.
    """

    logits: Tensor
    state: ModelState
    reused: int


@dataclasses.dataclass(eq=False)
class _Node:
    """A chunk of a text behind another: what it has left behind, and the logits behind it."""

    parent: "_Node | None"
    tokens: tuple[int, ...] = ()
    piece: ModelState | None = None
    logits: Tensor | None = None
    nbytes: int = 0
    used: int = 0
    children: dict[tuple[int, ...], "_Node"] = dataclasses.field(default_factory=dict)


class PrefixTree:
    """Keeps the states of texts that a model has read, and reads of the next text what is new.

    Texts are read in chunks of the same length from their beginning, and the rest in one piece: logits and states are those of a tree
    that has kept nothing, to the bit, whatever was read and thrown away before. A chunk keeps a recurrent layer's state, and of attention
    the keys and values of its own tokens. Threads may share a tree; they read one after the other.

    Args:
        model: A language model; after its weights have changed, :meth:`clear`.
        max_bytes: The most that states and logits take up. Chunks that were used least recently go first, the last ones of a text before
            those in front of them.
        chunk: Tokens of a chunk. Up to one less are read again for every text.

    Attributes:
        nbytes: What is taken up.

    Raises:
        ValueError: ``max_bytes`` is negative, or ``chunk`` not positive.
    """

    def __init__(self, model: Any, max_bytes: int = 2**30, chunk: int = 64):
        if max_bytes < 0:
            raise ValueError(
                f"PrefixTree(max_bytes={max_bytes}): is negative. Give the bytes that states may take up, 2**30 say."
            )
        if chunk < 1:
            raise ValueError(f"PrefixTree(chunk={chunk}): is below 1. Give the tokens of a chunk, 64 say.")
        self.model, self.max_bytes, self.chunk, self.nbytes = model, max_bytes, chunk, 0
        self._root, self._clock = _Node(None), itertools.count(1)
        self._nodes: set[_Node] = set()
        self._lock = threading.Lock()  # what one thread reads behind another may be thrown away by a third

    def __len__(self) -> int:
        """Return the number of chunks that are kept."""
        return len(self._nodes)

    @torch.no_grad()
    def read(self, tokens: Iterable[int] | Tensor) -> Prefix:
        """Read a text, ``(l,)`` with ``l >= 1``.

        Raises:
            ValueError: No tokens, another shape, or numbers that are no integers.
        """
        ids = torch.as_tensor(list(tokens) if not isinstance(tokens, Tensor) else tokens).cpu()
        if ids.dim() != 1 or not len(ids):
            raise ValueError(
                f"PrefixTree.read: expected tokens (l,) with l >= 1, got {tuple(ids.shape)}. Give one text at a time."
            )
        with self._lock:
            return self._read(integers("tokens", ids).long())

    def _read(self, ids: Tensor) -> Prefix:
        whole = len(ids) // self.chunk
        chunks = [tuple(ids[i * self.chunk : (i + 1) * self.chunk].tolist()) for i in range(whole)]
        path = self._known(chunks)
        reused = len(path) * self.chunk
        state = ModelState.joined([node.piece for node in path if node.piece is not None]) if path else None
        logits = path[-1].logits if path else None
        parent, passing = (path[-1] if path else self._root), list(path)
        for i in range(len(path), whole):
            logits, state = self._forward(chunks[i], state)
            parent = self._keep(parent, chunks[i], state.piece(i * self.chunk), logits)
            passing.append(parent)
        if rest := ids[whole * self.chunk :].tolist():
            logits, state = self._forward(rest, state)
        for node in reversed(passing):  # what stands in front is needed by what follows
            node.used = next(self._clock)
        self._make_room()
        assert logits is not None and state is not None
        return Prefix(logits.clone(), state, reused)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._root, self.nbytes = _Node(None), 0
            self._nodes.clear()

    def _known(self, chunks: Sequence[tuple[int, ...]]) -> list[_Node]:
        path, node = [], self._root
        for chunk in chunks:
            if (found := node.children.get(chunk)) is None:
                break
            path.append(node := found)
        return path

    def _forward(self, tokens: Sequence[int], state: ModelState | None) -> tuple[Tensor, ModelState]:
        device = self.model.backbone.embedding.weight.device
        out = self.model(torch.tensor([tokens], device=device), state=state, return_state=True, logits_to_keep=1)
        return out.logits[:, -1], out.state

    def _keep(self, parent: _Node, tokens: tuple[int, ...], piece: ModelState, logits: Tensor) -> _Node:
        size = piece.nbytes + logits.numel() * logits.element_size()
        node = parent.children[tokens] = _Node(parent, tokens, piece.clone(), logits.clone(), size)
        self._nodes.add(node)
        self.nbytes += size
        return node

    def _make_room(self) -> None:
        while self.nbytes > self.max_bytes:
            # an end of the tree, as what stands behind a chunk is of no use without it
            oldest = min((node for node in self._nodes if not node.children), key=lambda node: node.used)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.tokens]
            self._nodes.remove(oldest)
            self.nbytes -= oldest.nbytes
