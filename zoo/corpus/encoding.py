"""Many texts to tokens at a time, as training's documents are encoded one by one."""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..tokenizer import BUILT_IN, AsciiTokenizer, ByteTokenizer, appends_end, document_encoder
from .piece import Piece

__all__ = ["Encode", "batch_encoder", "identity_of"]

Encode = Callable[[Sequence[Piece]], list[np.ndarray]]


def batch_encoder(tokenizer: Any) -> Encode:
    """Return the function that gives the token ids of pieces: those of :func:`document_encoder`, and of a document in parts the same."""
    if isinstance(tokenizer, ByteTokenizer | AsciiTokenizer):
        return lambda pieces: [
            np.frombuffer(tokenizer.in_bytes(piece.content), dtype=np.uint8) if isinstance(piece.content, str) else piece.content
            for piece in pieces
        ]  # fmt: skip
    one, _ = document_encoder(tokenizer)  # says what is wrong with a tokenizer that cannot encode
    end = -1 if appends_end(tokenizer) else None
    # its threads are wanted, and said to be: it would warn of every process that reads rows later
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    def encode_all(texts: list[str], whole: bool) -> list[Any]:
        try:
            return tokenizer(
                texts, add_special_tokens=whole, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )["input_ids"]
        except Exception:
            # the text that it cannot encode is found, and named, one by one
            return [one(text) if whole else tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def encode(pieces: Sequence[Piece]) -> list[np.ndarray]:
        ids: list[Any] = [piece.content for piece in pieces]
        for whole in (True, False):
            at = [i for i, piece in enumerate(pieces) if isinstance(piece.content, str) and piece.begins is whole]
            for i, found in zip(at, encode_all([ids[i] for i in at], whole) if at else [], strict=True):
                # of a document in parts, the end is appended to the first, which is not its last
                ids[i] = found[:end] if whole else found
        return [np.asarray(part, dtype=np.int64) if isinstance(part, list) else part for part in ids]

    return encode


def identity_of(tokenizer: Any) -> str:
    """Return what tells a tokenizer from those that encode otherwise, whatever its name is and wherever its files are."""
    for name, cls in BUILT_IN.items():
        if isinstance(tokenizer, cls):
            return name
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
    else:
        content = repr((sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.init_kwargs.items()))))
    about = (type(tokenizer).__name__, content, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return hashlib.sha256(repr(about).encode()).hexdigest()
