"""The choice of a token from logits, in tensors of fixed shapes: a step on a GPU can be recorded with it.

Chance is drawn before the first step, from a generator of the row's own: what a row becomes follows from its seed and its prompt, whatever
stands beside it in the batch and wherever it is computed.
"""

import hashlib

import torch
from torch import Tensor

from ..sampling_options import SamplingOptions

__all__ = ["Sampler", "uniforms"]


def uniforms(seed: int, sample: int, steps: int) -> Tensor:
    """Return the chance that decides a row's tokens: ``(steps,)`` float64 in [0, 1), for sample number ``sample`` of a seed."""
    digest = hashlib.sha256(f"{seed} {sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(steps, dtype=torch.float64, generator=generator)


class Sampler:
    """Chooses a token for every row, and remembers what was chosen as far as penalties need it.

    Args:
        options: Of the choice.
        rows: Number of rows, ``b``.
        vocab: Ids that can be chosen, ``v``.
        device: Where logits are.

    Attributes:
        seen: ``(b, v)`` bool, the tokens of prompt and text; ``None`` without a repetition penalty.
        counts: ``(b, v)`` int32, how often each was chosen; ``None`` without the other penalties.

    Raises:
        ValueError: A bias for an id outside the vocabulary, or one that forbids every token.
    """

    def __init__(self, options: SamplingOptions, rows: int, vocab: int, device: torch.device):
        self.options = options
        counted = options.frequency_penalty or options.presence_penalty
        self.counts = torch.zeros(rows, vocab, dtype=torch.int32, device=device) if counted else None
        penalised = options.repetition_penalty != 1
        self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device) if penalised else None
        self.bias = self._biases(vocab).to(device) if options.logit_bias else None

    @property
    def plain(self) -> bool:
        """Tell whether the likeliest token is chosen, whatever was chosen before."""
        return not self.options.draws and self.seen is None and self.counts is None and self.bias is None

    def _biases(self, vocab: int) -> Tensor:
        bias = torch.zeros(vocab)
        for token, value in (self.options.logit_bias or {}).items():
            if token >= vocab:
                raise ValueError(
                    f"generate(logit_bias={{{token}: {value}}}): the vocabulary has the ids 0 to {vocab - 1}."
                )
            bias[token] = value
        if not bias.isfinite().any():
            raise ValueError(f"generate(logit_bias=...): forbids all {vocab} tokens. Leave one.")
        return bias

    def read(self, input_ids: Tensor, real: Tensor | None = None) -> None:
        """Note the prompts, ``(b, l)`` int64, of which ``real``, ``(b, l)`` bool, are no padding."""
        if self.seen is not None:
            once = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
            found = torch.zeros_like(self.seen, dtype=torch.int32)
            found.scatter_add_(1, input_ids.clamp(max=found.shape[1] - 1), once.int())
            self.seen |= found > 0

    def forget(self, rows: Tensor) -> None:
        """Begin anew in the given rows, ``(m,)`` int64."""
        for kept in (self.seen, self.counts):
            if kept is not None:
                kept.index_fill_(0, rows, 0)

    def reorder(self, rows: Tensor) -> None:
        """Go on with the given rows, ``(m,)`` int64, in that order."""
        self.seen = None if self.seen is None else self.seen[rows]
        self.counts = None if self.counts is None else self.counts[rows]

    def copy_(self, other: "Sampler") -> None:
        """Remember what another one of the same options and rows does, in the same memory as before."""
        for mine, theirs in ((self.seen, other.seen), (self.counts, other.counts)):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)

    def __call__(self, logits: Tensor, chance: Tensor | None = None) -> Tensor:
        """Choose from ``(b, v)`` logits, where chance decides by ``chance``, ``(b,)`` float64 in [0, 1): ``(b,)`` int64."""
        logits = self._penalised(logits.float())
        token = logits.argmax(-1) if chance is None else _drawn(self._warped(logits), chance)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, token[:, None], torch.ones_like(token[:, None], dtype=torch.int32))
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        options = self.options
        if self.bias is not None:
            logits = logits + self.bias
        if self.seen is not None:
            by = options.repetition_penalty
            logits = torch.where(self.seen, torch.where(logits > 0, logits / by, logits * by), logits)
        if self.counts is not None:
            logits = logits - options.frequency_penalty * self.counts - options.presence_penalty * (self.counts > 0)
        return logits

    def _warped(self, logits: Tensor) -> Tensor:
        options = self.options
        logits = logits / options.temperature
        if 0 < options.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(options.top_k).values[:, -1:], -torch.inf)
        if options.top_p < 1:
            ordered, index = logits.sort(descending=True)
            # a token stays while the likelier ones have not yet reached top_p; the first always stays
            logits = _without(logits, _before(ordered.softmax(-1)) >= options.top_p, index)
        if options.min_p > 0:
            share = logits.softmax(-1)
            logits = logits.masked_fill(share < options.min_p * share.amax(-1, keepdim=True), -torch.inf)
        if options.typical_p < 1:
            logits = self._typical(logits)
        return logits

    def _typical(self, logits: Tensor) -> Tensor:
        surprise = -logits.log_softmax(-1)
        share = (-surprise).exp()
        expected = (share * surprise.nan_to_num(posinf=0)).sum(-1, keepdim=True)
        index = (surprise - expected).abs().sort(stable=True).indices
        return _without(logits, _before(share.gather(1, index)) >= self.options.typical_p, index)


def _before(share: Tensor) -> Tensor:
    """The probability of all that stand in front, in their order."""
    return share.cumsum(-1) - share


def _without(logits: Tensor, drop: Tensor, index: Tensor) -> Tensor:
    return logits.masked_fill(torch.empty_like(drop).scatter_(1, index, drop), -torch.inf)


def _drawn(logits: Tensor, chance: Tensor) -> Tensor:
    # in float64, where the sum over a large vocabulary still tells neighbours apart
    reached = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(reached, chance[:, None] * reached[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logits.shape[-1] - 1)
