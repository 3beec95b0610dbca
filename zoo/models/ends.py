"""The ends of rows that are being continued, as the host knows them: by a token, by a text, or by their length."""

from typing import Any

import torch
from torch import Tensor

from ..tokenizer import space_between
from .decoder import Chosen

__all__ = ["Ends"]


class Ends:
    """Gathers what was chosen, and says which rows have ended, and why.

    Args:
        rows: Number of rows.
        ends: Tokens that end a row.
        stops: Texts that do.
        tokenizer: Reads tokens; needed for texts alone, as is
        before: The token that each row goes on from.

    Attributes:
        tokens: The new tokens of each row.
        logprobs: How likely they were, where that was worked out.
        finished: ``(b,)`` bool.
        by_text: ``(b,)`` bool, those that the last look found to be ended by a text.
        reasons: ``"eos"``, ``"stop"`` or ``"length"`` of each row; the last of rows that have not ended, too.
    """

    def __init__(self, rows: int, ends: list[int], stops: list[str], tokenizer: Any, before: list[int]):
        self._ends, self._stops, self._tokenizer, self._before = set(ends), stops, tokenizer, before
        # no text is longer than this many tokens, of which some may be a byte of a letter
        self._window = 4 * max(map(len, stops), default=0)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(rows)]
        self.finished, self.by_text = (torch.zeros(rows, dtype=torch.bool) for _ in range(2))
        self.reasons = ["length"] * rows

    @property
    def counts(self) -> Tensor:
        """New tokens of the rows, ``(b,)`` int64."""
        return torch.tensor([len(row) for row in self.tokens], dtype=torch.long)

    def see(self, found: Chosen, pad: int) -> Chosen:
        """Take in a look, and return it with ``pad`` behind the texts that have ended rows."""
        self.by_text.zero_()
        shown, likely = found.tokens.clone(), found.logprobs.clone()
        for row in (~self.finished).nonzero().flatten().tolist():
            count = int(found.counts[row]) - len(self.tokens[row])
            for i, token in enumerate(shown[row, :count].tolist()):
                self.tokens[row].append(token)
                if self._stops and self._spelled(row):
                    self.by_text[row], self.reasons[row] = True, "stop"
                    count = i + 1
                    shown[row, count:], likely[row, count:] = pad, 0
                    break
            self.logprobs[row] += likely[row, :count].tolist()
            self.finished[row] = bool(found.finished[row]) or bool(self.by_text[row])
            if found.finished[row] and not self.by_text[row] and self.tokens[row][-1] in self._ends:
                self.reasons[row] = "eos"
        return Chosen(shown, likely, self.counts, self.finished.clone())

    def _spelled(self, row: int) -> bool:
        tokens = self.tokens[row]
        text = self._tokenizer.decode(tokens[-self._window :])
        if len(tokens) <= self._window:
            text = space_between(self._tokenizer, self._before[row], tokens[0]) + text
        return any(stop in text for stop in self._stops)
