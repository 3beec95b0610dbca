"""Rows of tokens for a training, from files, standard input or a table."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..corpus.documents import read_npy
from ..corpus.lanes import Lanes
from ..corpus.packing import layout_of
from ..corpus.places import STANDARD_INPUT, check_path
from ..corpus.rows import StoredRows
from ..corpus.standard_input import OtherInput, tokens_of_input
from ..corpus.store import TokenStore
from ..corpus.tokenized import Tokenizing, tokens_at
from ..digests import digest_rows
from ..models.model import Model
from ..terminal import counted
from .data import Rows, rows_with_targets
from .labelled import LabelledRows, labelled_rows
from .options import TrainOptions
from .run_folder import AGAIN, LOG, DifferentRun

__all__ = ["Examples", "examples_from", "lanes_from", "tokens_from"]


class Examples(Dataset):
    """The rows that hold something to predict, each with its number.

    Attributes:
        rows: All rows, by number.
        chosen: The numbers of those that are read, ``(n,)``.
        length: Tokens per row.
        digest: Of their tokens and their length; the packing is an option of its own.
        documents: The most documents in a row, an empty rest counted as one; ``None`` where each row is one, with no ``"documents"``.
        tokens: In all rows, without what fills them up.
        about: What there is to say of them, in lines.
        labelled: Whether labels were given, and are not the next tokens: answers are then right or wrong.
        in_order: Whether they are read as they stand, since they are made when they are asked for.
        epoch: How often they were gone through.
    """

    def __init__(
        self, rows: Rows | StoredRows | LabelledRows, chosen: Sequence[int] | np.ndarray, length: int, digest: str, tokens: int,
        documents: int | None = None, about: Sequence[str] = (),
    ):  # fmt: skip
        self.rows, self.chosen, self.length, self.digest = rows, chosen, length, digest
        self.tokens, self.documents, self.about = tokens, documents, list(about)
        self.labelled = isinstance(rows, LabelledRows)
        self.in_order = self.labelled and isinstance(chosen, range)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(self.chosen[index])
        return self.rows[number] | {"row": torch.tensor(number)}

    def __getitems__(self, indices: list[int]) -> Any:
        # of rows with labels a batch, which is made faster at once than row by row
        if not isinstance(self.rows, LabelledRows):
            return [self[index] for index in indices]
        numbers = np.asarray([self.chosen[index] for index in indices])
        return self.rows.batch(numbers) | {"row": torch.from_numpy(numbers)}

    def set_epoch(self, epoch: int) -> None:
        """Note which pass begins."""
        self.epoch = epoch


def examples_from(data: Any, model: Model, options: TrainOptions, out: Path | None = None) -> Examples:
    """Return the examples in some data for a model.

    Args:
        data: A path, ``-`` for standard input, or a table ``(n, l)`` of token ids, ``~id`` for those that are only read; or labelled
            rows, as :func:`~hybridzoo.zoo.train.labelled.labelled_rows` takes them.
        model: Its tokenizer and its vocabulary count.
        options: Of the training; length, packing and column count.
        out: The run's folder, where tokens are kept that can be kept nowhere else.

    Raises:
        ValueError: What cannot be read, or does not fit the model.
    """
    if (found := labelled_rows(data, model.cfg.vocab_size)) is not None:
        rows, chosen = found
        return Examples(rows, chosen, rows.length, rows.digest, len(rows) * rows.length)
    if isinstance(data, str | os.PathLike):
        if Path(data).suffix.lower() != ".npy" or (table := read_npy(check_path(data))).ndim != 2:
            return _packed(data, model, options, out)
        if options.length not in (None, table.shape[1]):
            raise ValueError(
                f"{data}: holds rows of {table.shape[1]} tokens, asked for {options.length}. Ask for that, or give a flat file."
            )
    else:
        table = np.asarray(data)
    return _of_table(table, model)


def lanes_from(
    data: Any,
    model: Model,
    options: TrainOptions,
    lanes: int,
    seed: int = 0,
    out: Path | None = None,
    once: bool = False,
) -> Lanes:
    """Return a path or standard input as ``lanes`` streams side by side, for a model that carries its state from row to row."""
    if not isinstance(data, str | os.PathLike):
        raise ValueError(
            "data: rows of a table do not continue each other. Give a path, to carry a state along its documents."
        )
    store, about = tokens_from(data, model, options, out)
    streams = Lanes(store, _length(model, options), lanes, seed, once)
    streams.about = about + streams.about
    return streams


def tokens_from(data: Any, model: Model, options: TrainOptions, out: Path | None) -> tuple[TokenStore, list[str]]:
    """Return the tokens of a path or of standard input, for a model, and what there is to say of them."""
    how = Tokenizing(model.tokenizer, model.cfg.vocab_size, options.column)
    if str(data) != STANDARD_INPUT:
        store, about = tokens_at(check_path(data), how, out)
    elif out is None:
        raise ValueError("data: standard input needs a run's folder, which keeps what was read.")
    else:
        try:
            store, about = tokens_of_input(how, out, not (options.resume and (out / LOG).exists()))
        except OtherInput as e:
            raise DifferentRun(f"{e} {AGAIN}") from e
    if (found := store.beyond(how.vocab_size)) is not None:
        raise ValueError(
            f"data: token id {found[0]}, in document {found[1]:,} of {data}, is outside the model's vocabulary of {how.vocab_size}. Set "
            f"vocab_size, to at least {max(store.high, ~store.low) + 1}, or name the tokenizer that belongs to the model (it is "
            f"{model.cfg.tokenizer})."
        )
    left_out = f", {store.skipped:,} without a token left out" if store.skipped else ""
    tokens = f"{len(store.tokens):,} tokens ({store.tokens.dtype})"
    return store, [f"{counted(store.documents, 'document')}{left_out}; {tokens}, {about[0]}"] if about else []


def _packed(data: Any, model: Model, options: TrainOptions, out: Path | None) -> Examples:
    store, about = tokens_from(data, model, options, out)
    length = _length(model, options)
    layout, apart = layout_of(store, length, options.packing), options.packing == "documents"
    padding = 1 - len(store.tokens) / (len(layout) * length)
    how = {"documents": f"documents, at most {layout.most} in one", "stream": "a stream", "padded": "one document each"}
    about.append(f"{counted(len(layout), 'row')} of {length:,} tokens, {how[options.packing]}; {padding:.2%} padding")
    digest = f"{store.digest} {length}"
    rows = StoredRows(store, layout, apart)
    return Examples(rows, layout.chosen, length, digest, len(store.tokens), layout.most if apart else None, about)


def _length(model: Model, options: TrainOptions) -> int:
    return options.length or min(512, model.cfg.max_length or 512)


def _of_table(table: np.ndarray, model: Model) -> Examples:
    if table.ndim != 2 or table.dtype.kind not in "iu" or table.shape[0] == 0 or table.shape[1] < 2:
        raise ValueError(
            f"data: expected a path, or a table (n, l) of integers with l >= 2, got {table.dtype} of shape {table.shape}. "
            "Use hybridzoo.zoo.train.data.pack to make one."
        )
    if (highest := max(int(table.max()), ~int(table.min()))) >= model.cfg.vocab_size:
        raise ValueError(
            f"data: token id {highest} is outside the model's vocabulary of {model.cfg.vocab_size}. Set vocab_size, or "
            f"tokenize with the config's tokenizer ({model.cfg.tokenizer})."
        )
    chosen = rows_with_targets(table)
    if not len(chosen):
        raise ValueError("data: no row holds anything to predict; ids below 0 stand for tokens that are only read.")
    return Examples(Rows(table), chosen, table.shape[1], digest_rows(table), table.size)
