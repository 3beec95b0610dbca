"""Documents of any length as streams side by side, for back-propagation through time that is truncated at the end of a row."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..terminal import counted
from .rows import NO_TARGET
from .store import TokenStore

__all__ = ["Lanes"]


class Lanes(Dataset):
    """Rows of consecutive tokens, in such an order that every batch of ``lanes`` of them continues the one before, row by row.

    Documents are laid end to end in an order drawn anew for every pass, and cut into ``lanes`` equal streams; a row holds tokens of one
    document, and what is left of its last row is empty. Item ``step * lanes + lane`` is row ``step`` of a stream; ``len`` items are a pass,
    and the next pass follows behind them. An item is::

        input_ids    (l,) int64, the tokens that are read; no token is in two rows of a document
        labels       (l + 1,) int64, the same and the token after the row, -100 where there is none
        documents    (l,) int64, 0, or -1 where the row is empty
        starts       () bool: a document or the stream begins here, so that no state is to be carried into it
        row          () int64, the number of the row

    Streams of unequal length are made equal by the first row of the next one; with ``once``, there is nothing to predict in it.

    Args:
        store: The tokens.
        length: Tokens per row.
        lanes: Streams: the rows of a batch, times the processes.
        seed: Of the order of documents.
        once: Whether to predict every token once in a pass, as an evaluation does.

    Attributes:
        rows: All rows, by number, without what their place in a stream says of them.
        digest: Of all that follows from the data.
        tokens: In all documents.
        documents: ``None``: a row is one document.
        draws: ``True``: the items of every pass are others, and their numbers go on.
        labelled: ``False``: targets are the tokens that follow.
        about: What there is to say of them, in lines.
        epoch: The pass that a sampler goes through.

    Raises:
        ValueError: There are fewer rows than streams.
    """

    documents: int | None = None
    draws: bool = True
    labelled: bool = False

    def __init__(self, store: TokenStore, length: int, lanes: int, seed: int = 0, once: bool = False):
        self.rows = _Rows(store, length)
        if len(self.rows) < lanes:
            raise ValueError(
                f"data: gives {counted(len(self.rows), 'row')} of {length} tokens, too few for {lanes} streams side by side. Lower "
                "batch_size or length, or give more text."
            )
        self.length, self.lanes, self.seed, self.once, self.epoch = length, lanes, seed, once, 0
        self.digest, self.tokens = f"{store.digest} lanes {lanes} {length}", len(store.tokens)
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None  # a pass as it is laid
        self.steps = -(-len(self.rows) // lanes)
        padding = 1 - self.tokens / (len(self.rows) * length)
        self.about = [
            f"{counted(lanes, 'stream')} of {counted(self.steps, 'row')} of {length:,} tokens, each goes on from the one before; "
            f"{max(0.0, padding):.2%} padding"
        ]

    def __len__(self) -> int:
        return self.steps * self.lanes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, at = divmod(index, len(self))
        step, lane = divmod(at, self.lanes)
        order, ends = self._laid(epoch)
        place, end = (i * len(self.rows) // self.lanes for i in (lane, lane + 1))
        place = place + step
        again, place = place >= end, place % len(self.rows)
        nth = int(np.searchsorted(ends, place, side="right"))
        row = self.rows.ends[order[nth]] - (ends[nth] - place)
        begins = step == 0 or place == (ends[nth - 1] if nth else 0)
        item = self.rows[int(row)]
        if again and self.once:
            item["labels"] = torch.full_like(item["labels"], NO_TARGET)
        return item | {"starts": torch.tensor(bool(begins)), "row": torch.tensor(int(row))}

    def set_epoch(self, epoch: int) -> None:
        """Note which pass begins."""
        self.epoch = epoch

    def _laid(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents in the order of a pass, and the rows up to the end of each."""
        if self._last is None or self._last[0] != epoch:
            drawn_by = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.rows.ends), generator=drawn_by).numpy()
            self._last = epoch, order, np.cumsum(np.diff(self.rows.ends, prepend=0)[order])
        return self._last[1:]


class _Rows(Dataset):
    """Rows of the documents of a store, in their order; each begins behind the last token that the one before has read."""

    def __init__(self, store: TokenStore, length: int):
        self.store, self.length = store, length
        # the last token of a document is a target, and need not be read
        sizes = np.diff(store.starts)
        self.ends = np.cumsum(np.maximum(1, -(-(sizes - 1) // length)))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        store, length = self.store, self.length
        document = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[document - 1]) if document else 0
        begin = int(store.starts[document]) + (number - first) * length
        found = store.tokens[begin : min(begin + length + 1, int(store.starts[document + 1]))].astype(np.int64)
        ids = np.full(length + 1, store.separator, dtype=np.int64)
        labels = np.full(length + 1, NO_TARGET, dtype=np.int64)
        ids[: len(found)] = np.where(found < 0, ~found, found)
        labels[: len(found)] = np.where(found < 0, NO_TARGET, found)
        documents = np.where(np.arange(length) < len(found), 0, -1)
        parts = {"input_ids": ids[:-1], "labels": labels, "documents": documents}
        return {name: torch.from_numpy(part) for name, part in parts.items()}
