"""Text from a language model: prefill the prompt in one forward, then one step per token on the states."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .state import ModelState

if TYPE_CHECKING:
    from .causal_lm import CausalLM

__all__ = ["check_finite_logits", "generate", "sample"]


@torch.no_grad()
def generate(
    model: "CausalLM",
    input_ids: Tensor,
    max_new_tokens: int = 100,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    attention_mask: Tensor | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue every row of a batch of prompts.

    Args:
        model: The language model; its training mode is left as it is, dropout-free models do not care.
        input_ids: ``(b, l)`` int64 prompts, ``l >= 1``.
        max_new_tokens: Tokens to add, at least 0.
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        top_k: Keep only the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this, in (0, 1].
        repetition_penalty: Above 1, tokens already in the row become less likely (arXiv:1909.05858, section 4.1).
        attention_mask: ``(b, l)``, nonzero at real tokens; rows of unequal length may be padded on either side.
        eos_token_id: A row is finished once it produced one of these; the others go on.
        pad_token_id: Written after a row's end; the first ``eos_token_id`` by default, else 0.
        generator: Source of randomness for sampling, on the model's device.

    Returns:
        ``(b, l + new)`` int64: the prompts as given, then the new tokens. Stops early when every row is finished.

    Raises:
        ValueError: An argument out of range, a row without a real token, or logits that are not finite.
    """
    _check(model, input_ids, max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    if max_new_tokens == 0:
        return input_ids
    eos = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    pad = pad_token_id if pad_token_id is not None else (eos[0] if eos else 0)
    logits, state = _prefill(model, input_ids, attention_mask, input_ids.shape[1] + max_new_tokens)
    seen = _seen(input_ids, attention_mask, model.cfg.vocab_size) if repetition_penalty != 1.0 else None

    def choose(logits: Tensor, wrong: Tensor) -> Tensor:
        if temperature:  # what is sampled from must be numbers
            logits = logits.masked_fill(wrong[:, None], 0)
        token = sample(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        return token

    new = _decode(model, logits, state, max_new_tokens, choose, eos, pad)
    return torch.cat([input_ids, *new], 1)


def _decode(
    model: "CausalLM",
    logits: Tensor,
    state: ModelState,
    steps: int,
    choose: Callable[[Tensor, Tensor], Tensor],
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
        token = choose(logits, wrong).masked_fill(finished, pad)
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


def sample(
    logits: Tensor,
    seen: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one token per row: penalty, temperature, top-k, top-p, in that order.

    The arguments are those of :func:`generate`, with ``(b, v)`` logits and, as bool, the tokens ``seen`` that the penalty applies to.
    """
    logits = logits.float()
    if seen is not None:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # a token stays while the more likely ones have not yet reached top_p; the first always stays
        drop = torch.empty_like(before, dtype=torch.bool).scatter_(1, index, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


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


def _seen(input_ids: Tensor, attention_mask: Tensor | None, vocab: int) -> Tensor:
    seen = torch.zeros(input_ids.shape[0], vocab, dtype=torch.bool, device=input_ids.device)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    rows, columns = real.nonzero(as_tuple=True)
    seen[rows, input_ids[rows, columns].clamp(max=vocab - 1)] = True
    return seen


def _check(model, input_ids, max_new_tokens, temperature, top_k, top_p, repetition_penalty) -> None:
    shape = f"input_ids: expected shape (b, l) with l >= 1, got {tuple(input_ids.shape)}. Give every prompt at least one token."
    for wrong, message in (
        (input_ids.dim() != 2 or input_ids.shape[1] == 0, shape),
        (max_new_tokens < 0, f"max_new_tokens: {max_new_tokens} is negative."),
        (
            temperature < 0,
            f"temperature: {temperature} is negative. Use 0 for greedy decoding, 1 to sample from the model as it is.",
        ),
        (top_k < 0, f"top_k: {top_k} is negative. Use 0 to keep all tokens."),
        (not 0 < top_p <= 1, f"top_p: {top_p} is not in (0, 1]. Use 1 to keep all tokens."),
        (repetition_penalty <= 0, f"repetition_penalty: {repetition_penalty} is not positive. Use 1 for none."),
    ):
        if wrong:
            raise ValueError(message)
