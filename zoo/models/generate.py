"""Text from a language model: prefill the prompt in one forward, then one step per token on the states."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..options import at_least, called_with, option
from ..sampling_options import SamplingOptions
from .sampling import Sampler, uniforms
from .state import ModelState

if TYPE_CHECKING:
    from .causal_lm import CausalLM

__all__ = ["GenerateCall", "check_finite_logits", "generate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCall(SamplingOptions):
    """Arguments of a call of :func:`generate`."""

    model: Any = option(  # noqa: RUF009  # a field, as the others
        None, "The language model; its training mode is left as it is, dropout-free models do not care.", kw_only=False
    )
    input_ids: Any = option(None, "``(b, l)`` int64 prompts, ``l >= 1``.", kw_only=False)  # noqa: RUF009
    max_new_tokens: int = option(100, "Tokens to add.", bound=at_least(0), kw_only=False)
    n: int = option(1, "Samples of every prompt; more than one need a temperature.", bound=at_least(1))
    attention_mask: Any = option(  # noqa: RUF009  # a field, as the others
        None,
        "``(b, l)``, nonzero at real tokens; rows of unequal length may be padded on either side.",
        unset="all are",
    )
    eos_token_id: Any = option(  # noqa: RUF009  # a field, as the others
        None, "A row is finished once it produced this one, or one of these; the others go on.", unset="never"
    )
    pad_token_id: int | None = option(None, "Written after a row's end.", unset="the first eos_token_id, else 0")

    def __post_init__(self):
        super().__post_init__()
        ids = self.input_ids
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(
                f"input_ids: expected shape (b, l) with l >= 1, got {tuple(ids.shape)}. Give every prompt at least one token."
            )
        if self.n > 1 and not self.draws:
            raise ValueError(
                f"generate(n={self.n}): without a temperature all samples are the same. Set it, or leave n out."
            )

    @property
    def ends(self) -> list[int]:
        """The tokens that end a row."""
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


@called_with(GenerateCall)
@torch.no_grad()
def generate(call: GenerateCall) -> Tensor:
    """Continue every row of a batch of prompts.

    Returns ``(b * n, l + new)`` int64, the samples of a prompt one below the other: the prompts as given, then the new tokens. It stops
    early when every row is finished.

    Raises:
        ValueError: An argument out of range, a row without a real token, or logits that are not finite.
    """
    model, input_ids, steps = call.model, call.input_ids, call.max_new_tokens
    b, l = input_ids.shape
    if steps == 0:
        return input_ids.repeat_interleave(call.n, 0)
    sampler = Sampler(call, b, model.cfg.vocab_size, input_ids.device)
    mask = call.attention_mask
    logits, state = _prefill(model, input_ids, mask, l + steps)
    sampler.read(input_ids, None if mask is None else mask.to(input_ids.device) != 0)
    if call.n > 1:
        rows = torch.arange(b, device=input_ids.device).repeat_interleave(call.n)
        input_ids, logits, state = input_ids[rows], logits[rows], state.reorder(rows)
        sampler.reorder(rows)
    chance = torch.stack([uniforms(call.seed, i, steps if call.draws else 0) for i in range(call.n)], 1)
    pad = call.pad_token_id if call.pad_token_id is not None else (call.ends or [0])[0]
    new = _decode(model, logits, state, steps, sampler, chance.repeat(1, b).to(input_ids.device), call.ends, pad)
    return torch.cat([input_ids, *new], 1)


def _decode(
    model: "CausalLM",
    logits: Tensor,
    state: ModelState,
    steps: int,
    sampler: Sampler,
    chance: Tensor,
    eos: list[int],
    pad: int,
) -> list[Tensor]:
    """The tokens of at most so many steps, ``(b, 1)`` each, from the logits of the first."""
    out: list[Tensor] = []
    finished = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    stops = torch.tensor(eos, dtype=torch.long, device=logits.device)
    broken = torch.zeros_like(finished)
    for i in range(steps):
        logits = logits[:, : model.cfg.vocab_size].float()  # rows that only pad the table are never produced
        wrong = _not_finite(logits) & ~finished
        if i == 0 or not logits.is_cuda:
            _refuse(wrong)
        broken |= wrong  # asking a GPU takes time, so it is asked in the end
        if sampler.options.draws:  # what is drawn from must be numbers
            logits = logits.masked_fill(wrong[:, None], 0)
        token = sampler(logits, chance[i] if sampler.options.draws else None).masked_fill(finished, pad)
        out.append(token[:, None])
        if eos:
            finished |= torch.isin(token, stops)
            if bool(finished.all()):
                break
        if i + 1 < steps:
            logits = model.step(token, state)
    _refuse(broken)
    return out


def check_finite_logits(logits: Tensor) -> None:
    """Raise a ``ValueError`` where the best of a row's logits, ``(..., v)``, is no number."""
    _refuse(_not_finite(logits))


def _not_finite(logits: Tensor) -> Tensor:
    # NaN is the largest of all; -inf may be somebody's way to forbid a token
    return ~logits.amax(-1).isfinite()


def _refuse(wrong: Tensor) -> None:
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"logits: those of row {row} are not finite. The weights are damaged (a diverged training run, say), or the numbers too large "
            "for their dtype: load a good checkpoint, or use dtype=torch.float32."
        )


def _prefill(model: "CausalLM", input_ids: Tensor, attention_mask: Tensor | None, max_len: int) -> tuple[Tensor, Any]:
    b, l = input_ids.shape
    state = model.init_state(b, max_len, device=input_ids.device)  # weights may be elsewhere until they are called
    if attention_mask is None:
        out = model(input_ids, state=state, return_state=True, logits_to_keep=1)
        return out.logits[:, -1], out.state
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)} differs from the prompts' {tuple(input_ids.shape)}."
        )
    last = ((attention_mask.to(input_ids.device) != 0) * torch.arange(1, l + 1, device=input_ids.device)).amax(1) - 1
    if bool((last < 0).any()):
        row = int((last < 0).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has no real token. Give every prompt at least one token (the BOS token, say)."
        )
    # of the logits, only those of positions that some row ends at
    ends = last.unique()
    out = model(input_ids, None, attention_mask, state=state, return_state=True, logits_to_keep=ends)
    return out.logits[torch.arange(b, device=last.device), torch.searchsorted(ends, last)], out.state
