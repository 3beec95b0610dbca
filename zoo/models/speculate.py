"""Speculative decoding: guess what comes next, and let the model read guesses and check them in one forward (arXiv:2211.17192, greedy).

Where a guess goes wrong, the state in front of the forward is still there. Rows go on from that: what was right is read again with the
next guesses, in a forward that takes as long with a few tokens more. Marks behind every guess, to go back to the last right one, would cost
a step each, or a second forward. The smaller model, which guesses by steps, does go back.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .decoder import Chosen, refuse
from .rows import rectangle
from .state import ModelState
from .verify import Verified, Verifier

__all__ = ["DraftModel", "Drafter", "PromptLookup", "Speculator"]


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
    """Lets a smaller model guess, token by token; the steps that read wrong guesses are taken back.

    Args:
        model: A language model of the same vocabulary.
        device: Where it is.
        most: As of :class:`Drafter`.
        more: Tokens that are to follow the first ones, for which there will be room.
    """

    def __init__(self, model: Any, device: torch.device, most: int = 8, more: int = 0):
        self.model, self.device, self.most, self.more = model, device, most, more
        self._read: dict[int, tuple[ModelState, list[int]]] = {}

    def __call__(self, row: int, tokens: Sequence[int], most: int) -> list[int]:
        """As :class:`Drafter`."""
        state, read = self._read.get(row, (None, []))
        if state is None:
            state = self.model.init_state(1, len(tokens) + self.more, device=self.device)
            state.keep(self.most + 1)
        # of what was read, tokens that were accepted come first, then guesses
        pairs = enumerate(zip(read, tokens[:-1], strict=False))
        same = next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(read), len(tokens) - 1))
        state.roll_back(len(read) - same)
        new = torch.tensor([list(tokens[same:])], device=self.device)
        if new.shape[1] <= 2:
            for token in new.unbind(1):
                logits = self.model.step(token, state)
        else:
            out = self.model(new, state=state, return_state=True, logits_to_keep=1)
            state, logits = out.state, out.logits[:, -1]
            state.keep(self.most + 1)
        guesses: list[int] = []
        while True:
            token = logits[:, : self.model.cfg.vocab_size].argmax(-1)
            guesses.append(int(token))
            if len(guesses) == most:
                break
            logits = self.model.step(token, state)
        self._read[row] = state, [*tokens, *guesses[:-1]]
        return guesses


class _Trust:
    """Guesses of a row that are worth checking: about as many as were right lately; after none, one again, ever more rarely."""

    def __init__(self, most: int):
        self.most = self.now = most
        self.rest, self.pause = 0, 2

    def guesses(self) -> int:
        """Return how many to check now."""
        if self.rest:
            self.rest -= 1
            return 0
        return self.now

    def learn(self, guesses: int, right: int) -> None:
        """Take in how many were right."""
        if guesses and right:
            self.now = min(self.most, 2 * self.now) if right == guesses else max(right, self.now // 2)
            self.pause = 2
        elif guesses and self.now > 1:
            self.now //= 2
        elif guesses:
            self.rest, self.pause = self.pause, min(2 * self.pause, 32)


class Speculator:
    """Continues rows by the likeliest tokens, several at a time; has what :class:`~hybridzoo.zoo.models.decoder.Decoder` has for that.

    Args:
        verifier: Reads for the rows, and holds their state. It is best twice as wide as there are guesses: as many tokens may wait to
            be read again.
        logits: Of what follows, ``(b, v)``.
        prompts: The rows' tokens, without padding.
        drafter: Guesses.
        ends: Tokens that end a row.
        pad: Stands in a look where a row has fewer tokens than another.
        steps: The most tokens of a row.

    Attributes:
        how: Words for how steps are taken.
        ahead: As of a :class:`~hybridzoo.zoo.models.decoder.Decoder`: what was accepted is looked at every time.
    """

    ahead = 1

    def __init__(
        self, verifier: Verifier, logits: Tensor, prompts: list[list[int]], drafter: Drafter, ends: list[int], pad: int, steps: int
    ):  # fmt: skip
        self.verifier, self.drafter, self.pad, self.steps, self._ends = verifier, drafter, pad, steps, set(ends)
        self.texts = prompts
        self._begins = [len(row) for row in prompts]
        self._trust = [_Trust(drafter.most) for _ in prompts]
        self._rows = list(range(len(prompts)))  # those that go on, in the order of the state's rows
        self._finished = [False] * len(prompts)
        self._first: Tensor | None = logits
        self._pending: list[list[int]] = [[] for _ in prompts]  # accepted tokens that the state has not read

    @property
    def how(self) -> str:
        """Words for how steps are taken."""
        guesses = f"guesses, {self.drafter.most} at a time, checked by {self.verifier.forwards:,} forwards"
        return f"{self.verifier.how}: {guesses}"

    @property
    def state(self) -> ModelState:
        """The state of the rows that go on."""
        return self.verifier.state

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
        tokens: list[list[int]] = [[] for _ in self._finished]
        logprobs: list[list[float]] = [[] for _ in self._finished]
        if self._first is not None:
            chosen, self._first = self.verifier.chosen(self._first), None
            refuse(chosen.broken)
            for row, (token, logprob) in enumerate(zip(chosen.tokens.tolist(), chosen.logprobs.tolist(), strict=True)):
                tokens[row], logprobs[row] = self._accepted(row, token), logprob
                self._pending[row] = token
            return self._look(tokens, logprobs)
        self._leave_finished()
        guesses = [[] if self._finished[row] else self._guess(row) for row in self._rows]
        found = self._verified(guesses)
        wrong = torch.zeros(len(self._finished), dtype=torch.bool)
        wrong[self._rows] = found.broken
        refuse(wrong)
        for i, row in enumerate(self._rows):
            if self._finished[row]:
                continue
            begin, guess = len(self._pending[row]) - 1, guesses[i]
            choices = found.tokens[i, begin : begin + len(guess) + 1].tolist()
            right = next((j for j, token in enumerate(guess) if token != choices[j]), len(guess))
            self._trust[row].learn(len(guess), right)
            self._pending[row] = choices[right:] if found.whole[i] else self._pending[row] + choices[: right + 1]
            tokens[row] = self._accepted(row, choices[: right + 1])
            logprobs[row] = found.logprobs[i, begin : begin + len(tokens[row])].tolist()
        return self._look(tokens, logprobs)

    def _leave_finished(self) -> None:
        left = [i for i, row in enumerate(self._rows) if not self._finished[row]]
        if len(left) < len(self._rows) and not self.verifier.fixed:
            self.verifier.keep(left)
            self._rows = [self._rows[i] for i in left]

    def _guess(self, row: int) -> list[int]:
        left = self.steps - (len(self.texts[row]) - self._begins[row]) - 1
        most = min(self._trust[row].guesses(), left, self.verifier.width - len(self._pending[row]))
        return self.drafter(row, self.texts[row], most) if most > 0 else []

    def _verified(self, guesses: list[list[int]]) -> Verified:
        known = [[] if self._finished[row] else self._pending[row] for row in self._rows]
        read = [sure + guess for sure, guess in zip(known, guesses, strict=True)]
        counts = (torch.tensor([len(row) for row in rows]) for rows in (known, read))
        return self.verifier(rectangle(read, self.pad), *counts)

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
