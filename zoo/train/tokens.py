"""Batches of rows of tokens: what a language model takes of them, and what there is to predict in them."""

from typing import Any

from torch import Tensor

from ...kernels.seq import Seq
from ..models.loss import IGNORE
from .batches import Batch

__all__ = ["model_inputs", "targets"]


def model_inputs(batch: Batch, most: int | None = None) -> dict[str, Any]:
    """Return the arguments of a model for a batch, whose rows hold at most ``most`` documents."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "labels")}
    if (documents := batch.get("documents")) is not None:
        piece = batch["labels"].shape[1] > documents.shape[1]
        lengths, l = (documents >= 0).sum(1), documents.shape[1]
        inputs["seq"] = Seq.from_lengths(lengths, l) if piece else Seq.from_documents(documents, most=most)
    return inputs


def targets(batch: Batch) -> Tensor:
    """The tokens to predict, ``(b, l - 1)`` int64, as the model finds them; of pieces of documents, ``(b, l)``; -100 where is none."""
    following, documents = batch["labels"][:, 1:], batch.get("documents")
    if documents is None or documents.shape == following.shape:
        return following
    outside = (documents[:, 1:] != documents[:, :-1]) | (documents[:, 1:] < 0)
    return following.masked_fill(outside, IGNORE)
