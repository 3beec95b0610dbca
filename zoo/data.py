"""Documents and rows under the name that callers know; :mod:`.train.data` has them."""

from .train.data import Rows, fingerprint, mix, pack, read_documents, rows_from, rows_with_targets, topics

__all__ = ["Rows", "fingerprint", "mix", "pack", "read_documents", "rows_from", "rows_with_targets", "topics"]
