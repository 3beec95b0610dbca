"""The ends of rows that are being continued, as the host knows them: by a token, by a text, or by their length."""

import dataclasses
from typing import Any

import torch

from .decoder import Chosen

__all__ = ["Ends"]


class Ends:
    """Looks at what was chosen, and says which rows have ended, and why.

    Args:
        rows: Number of rows.
        ends: Tokens that end a row.
        stops: Texts that do.
        tokenizer: Reads tokens; needed for texts alone.
        pad: Written behind a text's end.

    Attributes:
        counts: ``(b,)`` int64, the rows' tokens so far.
        finished: ``(b,)`` bool.
        by_text: ``(b,)`` bool, those that the last look found to be ended by a text.
        reasons: ``"eos"``, ``"stop"`` or ``"length"`` of each row; the last of rows that have not ended, too.
    """

    def __init__(self, rows: int, ends: list[int], stops: list[str], tokenizer: Any, pad: int):
        self._ends, self._stops, self._tokenizer, self._pad = set(ends), stops, tokenizer, pad
        # no text is longer than this many tokens, of which some may be a byte of a letter
        self._window = 4 * max(map(len, stops), default=0)
        self._tails: list[list[int]] = [[] for _ in range(rows)]
        self.counts = torch.zeros(rows, dtype=torch.long)
        self.finished, self.by_text = (torch.zeros(rows, dtype=torch.bool) for _ in range(2))
        self.reasons = ["length"] * rows

    def see(self, found: Chosen, done: int) -> Chosen:
        """Take in a look behind ``done`` steps, and return it with padding behind the texts that have ended rows."""
        self.by_text.zero_()
        tokens, logprobs = found.tokens.clone(), found.logprobs.clone()
        for row in (~self.finished).nonzero().flatten().tolist():
            count = int(found.counts[row]) - done
            own = tokens[row, :count].tolist()
            spelled = self._spelled(row, own) if self._stops else None
            if spelled is not None:
                count, self.by_text[row], self.reasons[row] = spelled, True, "stop"
                tokens[row, count:], logprobs[row, count:] = self._pad, 0
            elif bool(found.finished[row]) and own[-1] in self._ends:
                self.reasons[row] = "eos"
            self.counts[row] = done + count
            self.finished[row] = spelled is not None or bool(found.finished[row])
        return dataclasses.replace(
            found, tokens=tokens, logprobs=logprobs, counts=self.counts.clone(), finished=self.finished.clone()
        )

    def _spelled(self, row: int, own: list[int]) -> int | None:
        """The tokens of ``own`` after which a text stands at the end of the row; a text may begin in front of them."""
        tail = self._tails[row]
        for i, token in enumerate(own):
            tail.append(token)
            del tail[: -self._window]
            text = self._tokenizer.decode(tail)
            if any(stop in text for stop in self._stops):
                return i + 1
        return None
