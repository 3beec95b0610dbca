"""Rows of a token store as training examples."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .packing import Layout
from .store import TokenStore

__all__ = ["NO_TARGET", "StoredRows"]

NO_TARGET = -100  # the label of what is not predicted


class StoredRows(Dataset):
    """All rows of a layout: ``{"input_ids": (l,), "labels": (l,)}``, and ``"documents": (l,)`` where several stand in a row.

    The empty rest of a row holds separators, which nothing predicts; its document is -1.

    Args:
        store: The tokens.
        layout: Their rows.
        apart: Whether pieces of a row are documents apart from each other.
    """

    def __init__(self, store: TokenStore, layout: Layout, apart: bool):
        self.store, self.layout, self.apart = store, layout, apart

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        store, layout = self.store, self.layout
        pieces = layout.pieces[layout.rows[index] : layout.rows[index + 1]].tolist()
        ids = np.full(layout.length, store.separator, dtype=np.int64)
        used, begins = 0, []
        for begin, end in pieces:
            begins.append(used)
            ids[used : (used := used + end - begin)] = store.tokens[begin:end]
        labels = ids.copy()
        labels[used:] = NO_TARGET
        if store.read_only:
            labels[ids < 0] = NO_TARGET
            ids = np.where(ids < 0, ~ids, ids)
        row = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self.apart:
            labels[begins] = NO_TARGET
            documents = np.full(layout.length, -1, dtype=np.int64)
            documents[:used] = np.repeat(np.arange(len(begins)), np.diff(begins, append=used))
            row["documents"] = torch.from_numpy(documents)
        return row
