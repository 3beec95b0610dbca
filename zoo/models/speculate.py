"""Speculative decoding: guess what comes next, and let the model read guesses and check them in one forward (arXiv:2211.17192, greedy).

A recurrent state cannot be cut back to where a guess went wrong. So the state that rows go on from has read accepted tokens alone: those
that came after it are read again with the next guesses, in a forward that takes as long with a few tokens more. Where all were right, the
state behind them is the next one to go on from.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .decoder import Chosen, not_finite, refuse
from .rows import rectangle
from .state import ModelState

__all__ = ["DraftModel", "Drafter", "PromptLookup", "Speculator"]

# accepted tokens that are read again at most, before a forward without guesses takes them into the state
_PENDING = 16


class Drafter(Protocol):
    """Guesses; up to ``most`` at once."""

    most: int

    def __call__(self, row: int, tokens: Sequence[int], most: int) -> list[int]:
        """Guess up to ``most`` tokens that follow a row's ``tokens``, prompt and text so far."""
        ...


class PromptLookup:
    """Guesses that what followed the last tokens before follows them again: the longest match of up to ``longest``, the latest one."""

    def __init__(self, most: int = 8, longest: int = 3):
        self.most, self.longest = most, longest
        # for each row and length: where the tokens behind the last occurrence of each begin, and how many were looked at
        self._seen: dict[int, tuple[list[dict[tuple[int, ...], int]], int]] = {}

    def __call__(self, row: int, tokens: Sequence[int], most: int) -> list[int]:
        """As :class:`Drafter`."""
        found, looked = self._seen.get(row, ([{} for _ in range(self.longest)], 0))
        for end in range(looked + 1, len(tokens)):  # what ends at the last token is what is looked for
            for n in range(1, min(self.longest, end) + 1):
                found[n - 1][tuple(tokens[end - n : end])] = end
        self._seen[row] = found, max(looked, len(tokens) - 1)
        for n in range(min(self.longest, len(tokens)), 0, -1):
            if (at := found[n - 1].get(tuple(tokens[-n:]))) is not None:
                guess = list(tokens[at : at + most])
                while len(guess) < most:  # what is repeated reaches to here: it goes on from the guesses
                    guess.append(guess[len(guess) + at - len(tokens)])
                return guess
        return []


class DraftModel:
    """Lets a smaller model guess, token by token; it reads what was accepted, and guesses on copies of its state."""

    def __init__(self, model: Any, device: torch.device, most: int = 8):
        self.model, self.device, self.most = model, device, most
        self._read: dict[int, tuple[ModelState, int]] = {}

    def __call__(self, row: int, tokens: Sequence[int], most: int) -> list[int]:
        """As :class:`Drafter`."""
        state, done = self._read.get(row, (None, 0))
        new = torch.tensor([tokens[done:]], device=self.device)
        out = self.model(new, state=state, return_state=True, logits_to_keep=1)
        self._read[row] = out.state, len(tokens)
        guesses, state, logits = [], out.state.clone(), out.logits[:, -1]
        for _ in range(most):
            token = logits[:, : self.model.cfg.vocab_size].argmax(-1)
            guesses.append(int(token))
            if len(guesses) < most:
                logits = self.model.step(token, state)
        return guesses


class Speculator:
    """Continues rows by the likeliest tokens, several at a time; has what :class:`~hybridzoo.zoo.models.decoder.Decoder` has for that.

    Args:
        model: A language model.
        state: What the rows have read, with room for all that is to come.
        logits: Of what follows, ``(b, v)``.
        prompts: The rows' tokens, without padding.
        drafter: Guesses.
        ends: Tokens that end a row.
        pad: Stands in a look where a row has fewer tokens than another.
        steps: The most tokens of a row.

    Attributes:
        how: Words for how steps are taken.
        forwards: How often the model was called.
        ahead: As of a :class:`~hybridzoo.zoo.models.decoder.Decoder`: what was accepted is looked at every time.
    """

    ahead = 1

    def __init__(
        self, model: Any, state: ModelState, logits: Tensor, prompts: list[list[int]], drafter: Drafter, ends: list[int], pad: int,
        steps: int,
    ):  # fmt: skip
        self.model, self.state, self.drafter, self.pad, self.steps = model, state, drafter, pad, steps
        self._ends, self._device = set(ends), logits.device
        self.texts, self.forwards = prompts, 0
        self._begins = [len(row) for row in prompts]
        self._pending: list[list[int]] = [[] for _ in prompts]
        self._rows = list(range(len(prompts)))  # those that go on, in the order of the state's rows
        self._finished = [False] * len(prompts)
        self._first: Tensor | None = logits

    @property
    def how(self) -> str:
        """Words for how steps are taken."""
        return f"guesses, {self.drafter.most} at a time, checked by {self.forwards:,} forwards"

    def drop(self, slots: Tensor) -> None:
        """End rows where they are."""
        for row in slots.tolist():
            self._finished[row] = True

    @torch.no_grad()
    def advance(self, steps: int = 1, last: bool = False) -> Chosen:
        """Guess and check once; rows get a token or more.

        Raises:
            ValueError: Logits of a row are not finite.
        """
        self._leave_finished()
        guesses = [self._guess(row) for row in self._rows]
        logits, after = self._checked(guesses)
        wrong = torch.zeros(len(self._finished), dtype=torch.bool)
        wrong[self._rows] = not_finite(logits).any(1).cpu()
        refuse(wrong)
        best = logits.argmax(-1)
        likely = logits.log_softmax(-1).gather(2, best[..., None]).squeeze(2).tolist()
        tokens: list[list[int]] = [[] for _ in self._finished]
        logprobs: list[list[float]] = [[] for _ in self._finished]
        whole = []
        for i, (row, guess, choices) in enumerate(zip(self._rows, guesses, best.tolist(), strict=True)):
            choices = choices[len(choices) - 1 - len(guess) :]
            right = next((j for j, token in enumerate(guess) if token != choices[j]), len(guess))
            tokens[row] = self._accepted(row, choices[: right + 1])
            logprobs[row] = likely[i][len(likely[i]) - 1 - len(guess) :][: len(tokens[row])]
            if right == len(guess):
                whole.append(i)
                self._pending[row] = choices[right:]
            else:
                self._pending[row] += choices[: right + 1]
        if after is not None and whole:
            rows = torch.tensor(whole, device=self._device)
            self.state.put(rows, after.reorder(rows))
        return self._look(tokens, logprobs)

    def _leave_finished(self) -> None:
        left = [i for i, row in enumerate(self._rows) if not self._finished[row]]
        if len(left) < len(self._rows):
            rows = torch.tensor(left, dtype=torch.long, device=self._device)
            self.state, self._rows = self.state.reorder(rows), [self._rows[i] for i in left]
            self._first = None if self._first is None else self._first[rows]

    def _guess(self, row: int) -> list[int]:
        left = self.steps - (len(self.texts[row]) - self._begins[row])
        if self._first is not None or len(self._pending[row]) >= _PENDING:
            return []
        return self.drafter(row, self.texts[row], min(self.drafter.most, left - 1)) if left > 1 else []

    def _checked(self, guesses: list[list[int]]) -> tuple[Tensor, ModelState | None]:
        """The logits behind what is accepted and behind every guess, ``(m, k + 1, v)``, at the right; and the state that has read all."""
        vocab = self.model.cfg.vocab_size
        if self._first is not None:
            logits, self._first = self._first, None
            return logits[:, None, :vocab].float(), None
        read = [self._pending[row] + guess for row, guess in zip(self._rows, guesses, strict=True)]
        ids = rectangle(read, self.pad, left=True).to(self._device)
        mask = rectangle([[1] * len(row) for row in read], 0, left=True)
        self.forwards += 1
        out = self.model(
            ids, None, None if mask.all() else mask.to(self._device), state=self.state, return_state=True,
            logits_to_keep=1 + max(map(len, guesses)),
        )  # fmt: skip
        return out.logits[..., :vocab].float(), out.state

    def _accepted(self, row: int, tokens: list[int]) -> list[int]:
        """Take tokens into a row, up to its end."""
        left = self.steps - (len(self.texts[row]) - self._begins[row])
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        tokens = tokens[: min(left, end)]
        self.texts[row] += tokens
        self._finished[row] = tokens[-1] in self._ends or len(tokens) == left
        return tokens

    def _look(self, tokens: list[list[int]], logprobs: list[list[float]]) -> Chosen:
        return Chosen(
            rectangle(tokens, self.pad),
            rectangle(logprobs, 0.0),
            torch.tensor([len(text) - begin for text, begin in zip(self.texts, self._begins, strict=True)]),
            torch.tensor(self._finished),
        )
