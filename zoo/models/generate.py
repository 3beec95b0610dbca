"""Text from a language model: the prompts are read in one forward, or in chunks, then a token is chosen and read at a time."""

import dataclasses
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..options import at_least, called_with, option
from ..sampling_options import SamplingOptions
from .decoder import Chosen, Decoder
from .ends import Ends
from .prefill import last_real, prefill
from .recordings import room_for
from .rows import check_known, integers, rectangle, several
from .sampling import Sampler, uniforms
from .speculate import DraftModel, PromptLookup, Speculator
from .state import ModelState
from .text import padded_vocab
from .verify import Verifier

__all__ = ["GenerateCall", "Generation", "generate", "stream"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCall(SamplingOptions):
    """Arguments of a call of :func:`generate`, and of :func:`stream`."""

    model: Any = option(  # noqa: RUF009  # a field, as the others
        dataclasses.MISSING,
        "The language model; its training mode is left as it is, dropout-free models do not care.",
        kw_only=False,
    )
    input_ids: Any = option(dataclasses.MISSING, "``(b, l)`` int64 prompts, ``l >= 1``.", kw_only=False)  # noqa: RUF009
    max_new_tokens: int | None = option(
        None, "Tokens to add.", unset="100, or what max_length leaves", bound=at_least(0), kw_only=False
    )
    max_length: int | None = option(
        None,
        "Columns of the result, prompts and their padding included.",
        unset="as max_new_tokens says",
        bound=at_least(1),
    )
    n: int = option(1, "Samples of every prompt; more than one need a temperature.", bound=at_least(1))
    attention_mask: Any = option(  # noqa: RUF009
        None,
        "``(b, l)``, nonzero at real tokens; rows of unequal length may be padded on either side.",
        unset="all are",
    )
    eos_token_id: Any = option(  # noqa: RUF009
        None, "A row is finished once it produced this one, or one of these; the others go on.", unset="never"
    )
    pad_token_id: int | None = option(None, "Written after a row's end.", unset="the first eos_token_id, else 0")
    stop: Any = option(  # noqa: RUF009
        None,
        "A text, or several, that end a row whose new tokens spell one; the model's tokenizer reads them.",
        unset="none",
    )
    state: Any = option(  # noqa: RUF009
        None, "What was read before the prompts: ``out.state`` of a call of the model, or a :class:`Generation`'s. It stays as it is.",
        unset="nothing",
    )  # fmt: skip
    assistant: Any = option(  # noqa: RUF009
        None, "Guesses tokens that the model then checks several at a time: a smaller model of the same vocabulary, or ``\"lookup\"``, by "
        "which what followed the last tokens before is taken to follow them again. Greedy alone; the text is the same.", unset="nobody",
    )  # fmt: skip
    draft: int = option(8, "Guesses that are checked at once.", bound=at_least(1))
    prefill_chunk: int | None = option(
        None,
        "Columns of the prompts that are read at once.",
        unset="16,384",
        bound=at_least(1),
    )
    state_dtype: torch.dtype | None = option(  # noqa: RUF009
        None, "In which recurrent states are kept from step to step: ``torch.bfloat16`` halves them, and rounds at every step.",
        unset="float32",
    )  # fmt: skip
    record: bool | None = option(None, "Whether a GPU records a step as a CUDA graph.", unset="where it can")
    details: bool = option(
        False, "Return a :class:`Generation`, with what else there is to know, in place of a tensor."
    )
    return_state: bool = option(
        False, "Let it hold the rows' states, which takes a look at the device after every token."
    )

    def __post_init__(self):
        super().__post_init__()
        ids = self.input_ids
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] == 0:
            given = tuple(ids.shape) if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
            raise ValueError(
                f"input_ids: expected a tensor (b, l) with l >= 1, got {given}. Give every prompt at least one token."
            )
        if self.n > 1 and not self.draws:
            raise ValueError(
                f"generate(n={self.n}): without a temperature all samples are the same. Set it, or leave n out."
            )
        if self.max_length is not None and self.max_new_tokens is not None:
            raise ValueError(
                f"generate(max_new_tokens={self.max_new_tokens}, max_length={self.max_length}): give one of them."
            )
        if self.max_length is not None and self.max_length < ids.shape[1]:
            raise ValueError(
                f"generate(max_length={self.max_length}): the prompts have {ids.shape[1]} columns. Enlarge it."
            )
        self._check_assistant()
        self._check_kinds()

    def _check_kinds(self) -> None:
        mask, state, rows = self.attention_mask, self.state, padded_vocab(self.model.cfg)
        if any(not isinstance(text, str) or not text for text in self.stops):
            raise ValueError(f"generate(stop={self.stop!r}): expected texts that are not empty.")
        if any(not isinstance(token, int) for token in self.ends):
            raise ValueError(f"generate(eos_token_id={self.eos_token_id!r}): expected a token id, or several.")
        if not 0 <= self.pad < rows:
            raise ValueError(
                f"generate(pad_token_id={self.pad}): the model knows the ids 0 to {rows - 1}, and reads it behind a row's end. Give one."
            )
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(
                f"generate(attention_mask=...): expected a tensor (b, l), got a {type(mask).__name__}. Use torch.tensor(mask)."
            )
        if state is not None and not isinstance(state, ModelState):
            raise ValueError(
                f"generate(state=...): expected a ModelState, got a {type(state).__name__}. Give out.state of a call of the model, or "
                "what .state is of a generation with return_state=True."
            )
        if state is not None:
            state.check_made_by(self.model)
        check_known("input_ids", self.input_ids, rows)
        if self.return_state and not self.steps:
            raise ValueError(
                "generate(return_state=True): without a new token there is nothing behind which a state goes on. Ask for one."
            )

    def _check_assistant(self) -> None:
        if self.assistant is None:
            return
        if self.assistant != "lookup" and not (hasattr(self.assistant, "cfg") and "vocab_size" in self.assistant.cfg):
            given = repr(self.assistant) if isinstance(self.assistant, str) else f"a {type(self.assistant).__name__}"
            raise ValueError(f"generate(assistant=...): got {given}, expected a language model, or 'lookup'.")
        default = type(self)(model=self.model, input_ids=self.input_ids)
        others = (
            "temperature",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "logit_bias",
            "return_state",
        )
        for name in (name for name in others if getattr(self, name) != getattr(default, name)):
            raise ValueError(
                f"generate(assistant=..., {name}={getattr(self, name)}): guesses are checked for the likeliest token alone. Leave one out."
            )
        if self.assistant != "lookup" and self.assistant.cfg.vocab_size != self.model.cfg.vocab_size:
            raise ValueError(
                f"generate(assistant=...): has a vocabulary of {self.assistant.cfg.vocab_size}, and the model one of "
                f"{self.model.cfg.vocab_size}. Give one with the same tokens."
            )

    @property
    def steps(self) -> int:
        """The most tokens of a row."""
        if self.max_length is not None:
            return self.max_length - self.input_ids.shape[1]
        return 100 if self.max_new_tokens is None else self.max_new_tokens

    @property
    def ends(self) -> list[int]:
        """The tokens that end a row."""
        given = several(self.eos_token_id)
        return [int(token) if isinstance(token, numbers.Integral) else token for token in given]

    @property
    def stops(self) -> list[str]:
        """The texts that end a row."""
        return several(self.stop)

    @property
    def pad(self) -> int:
        """The token behind a row's end."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        # an end that the model does not have, as some folders say one, ends nothing
        return next((token for token in self.ends if 0 <= token < padded_vocab(self.model.cfg)), 0)


@dataclasses.dataclass
class Generation:
    """The result of a generation, a row for each sample of each prompt.

    Attributes:
        sequences: ``(b * n, l + new)`` int64, prompts and new tokens.
        counts: ``(b * n,)`` int64, tokens that are new, those that ended rows included.
        logprobs: ``(b * n, new)`` float32, natural logarithms of the probabilities that the model gave the new tokens, before any option
            of the choice; 0 behind a row's end.
        reasons: What ended each row: ``"eos"``, ``"stop"`` or ``"length"``.
        state: Where asked for, what the rows have read, all but the last token of each: from there, ``generate(last[:, None], state=...)``
            goes on with the tokens ``last``.
        how: Words for how steps were taken.
        blocks: Words for how many of the model's blocks take a step, or check guesses, in a few launches each, and why the others do not.
    """

    sequences: Tensor
    counts: Tensor
    logprobs: Tensor
    reasons: list[str]
    state: ModelState | None
    how: str
    blocks: str


@called_with(GenerateCall)
def generate(call: GenerateCall) -> Any:
    """Continue every row of a batch of prompts.

    Returns ``(b * n, l + new)`` int64, the samples of a prompt one below the other: the prompts as given, then the new tokens; or, with
    ``details`` or ``return_state``, a :class:`Generation`. It ends early when every row is finished.

    Raises:
        ValueError: An argument out of range, a row without a real token, or logits that are not finite.
    """
    prompts = call.input_ids.repeat_interleave(call.n, 0)
    run = _Run(call, call.details or call.return_state)
    for _ in run.looks():
        pass
    ends = run.ends
    sequences = torch.cat([prompts, rectangle(ends.tokens, call.pad).to(prompts.device)], 1)
    if not call.details and not call.return_state:
        return sequences
    return Generation(
        sequences, ends.counts, rectangle(ends.logprobs, 0.0), ends.reasons, run.kept, run.how, run.blocks
    )


@called_with(GenerateCall)
def stream(call: GenerateCall) -> Iterator[Chosen]:
    """Continue every row of a batch of prompts, and yield what was chosen as it comes: a token at a time on a CPU, up to 16 on a GPU.

    Arguments are those of :func:`generate`. Who stops listening ends it.

    Raises:
        ValueError: As :func:`generate`; what is about the weights, once the first token is asked for.
    """
    return _Run(call).looks()


class _Run:
    """A generation on its way.

    Attributes:
        ends: What ended the rows, so far.
        kept: The rows' states where they ended, if they are to be returned.
        how: Words for how steps are taken.
        blocks: Words for how blocks take them.
    """

    def __init__(self, call: GenerateCall, logprobs: bool = True):
        self.call, self.logprobs = call, logprobs
        self.how = self.blocks = ""
        self.kept: ModelState | None = None
        rows, ids = call.input_ids.shape[0], call.input_ids
        self.sampler = Sampler(SamplingOptions(**call.values()), rows, call.model.cfg.vocab_size, ids.device)
        tokenizer = call.model.tokenizer if call.stops else None
        self.ends = Ends(rows * call.n, call.ends, call.stops, tokenizer, self._before() if call.stops else [])

    def _before(self) -> list[int]:
        ids, mask = self.call.input_ids, self.call.attention_mask
        last = torch.full((len(ids),), -1) if mask is None else last_real(ids, mask.to(ids.device)).cpu()
        return ids.cpu()[torch.arange(len(ids)), last].repeat_interleave(self.call.n).tolist()

    @torch.no_grad()
    def looks(self) -> Iterator[Chosen]:
        """Yield what every few steps have chosen."""
        call, ends = self.call, self.ends
        if not call.steps or not len(ends.finished):
            return
        decoder = self._begun()
        try:
            yield from self._looks(decoder)
        finally:
            if isinstance(decoder, Decoder):
                call.model.recordings.keep(decoder)

    def _looks(self, decoder: Decoder | Speculator) -> Iterator[Chosen]:
        call, ends = self.call, self.ends
        ahead = 1 if call.return_state else decoder.ahead
        left = call.steps
        while left and not ends.finished.all():
            steps, before = min(ahead, left), ends.finished.clone()
            left -= steps
            found = ends.see(decoder.advance(steps, last=call.return_state or not left), call.pad)
            if ends.by_text.any():
                decoder.drop(ends.by_text.nonzero().flatten())
            self._keep(decoder.state, ends.finished & ~before)
            self.how = decoder.how
            yield found

    def _keep(self, state: ModelState, ended: Tensor) -> None:
        if not self.call.return_state or not ended.any():
            return
        rows = ended.nonzero().flatten().to(state.tokens.device)
        if self.kept is None:
            self.kept = state.clone()
        else:
            self.kept.put(rows, state.reorder(rows))

    def _begun(self) -> Decoder | Speculator:
        call, sampler = self.call, self.sampler
        ids = integers("input_ids", call.input_ids)
        model, device, b = call.model, ids.device, ids.shape[0]
        mask = None if call.attention_mask is None else call.attention_mask.to(device)
        # as much room as a recorded step would have, so that both give the same bits
        more = room_for(ids.shape[1] + call.steps) - ids.shape[1]
        logits, state = prefill(model, ids, mask, call.state, more, call.prefill_chunk)
        state = state.kept_in(call.state_dtype)
        if call.assistant is not None:
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
            prompts = [row[kept].tolist() for row, kept in zip(ids, real, strict=True)]
            drafter = (
                PromptLookup(call.draft)
                if call.assistant == "lookup"
                else DraftModel(call.assistant, device, call.draft, call.steps)
            )
            verifier = Verifier(model, state, 2 * call.draft, call.record)
            self.blocks = verifier.blocks if call.details else ""
            return Speculator(verifier, logits, prompts, drafter, call.ends, call.pad, call.steps)
        sampler.read(ids, None if mask is None else mask != 0)
        if call.n > 1:
            rows = torch.arange(b, device=device).repeat_interleave(call.n)
            logits, state = logits[rows], state.reorder(rows)
            sampler.reorder(rows)
        chance = torch.stack([uniforms(call.seed, i, call.steps if call.draws else 0) for i in range(call.n)])
        how = call.ends, call.pad, call.steps, call.record, self.logprobs
        decoder = model.recordings.decoder(model, state, sampler, *how)
        if call.details:
            whole = "the model is called for every token: there are hooks"
            self.blocks = whole if model.hooked() else model.backbone.steps_taken(decoder.state)
        own = None if decoder.state is state else state
        decoder.put(torch.arange(b * call.n, device=device), logits, chance.repeat(b, 1), call.steps, own)
        return decoder
