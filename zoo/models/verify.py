"""The checking of guesses: tokens that may be wrong are read in one forward, and a state takes over the rows in which none was.

On a GPU the forward is of one width and recorded as a CUDA graph: rows are padded behind their tokens, what is right is found out on the
device, and the state is written in place (:mod:`hybridzoo.layers.reading`), so that the host waits once for what was chosen. Where nothing
is guessed, a step is recorded beside it.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.seq import Seq
from ...layers.moe import MoE
from ...layers.reading import Rates, Reading
from .decoder import Look, Replayed, how_taken
from .state import ModelState

__all__ = ["Verified", "Verifier"]


@dataclasses.dataclass(frozen=True)
class Verified:
    """The answer to some tokens, on the CPU.

    Attributes:
        tokens: ``(b, w)`` int64, the likeliest one behind every token; at the columns in front of a row's last known token, anything.
        logprobs: ``(b, w)`` float32, natural logarithms of their probabilities.
        whole: ``(b,)`` bool, whether all guesses of a row were right: then the state has read its tokens, and else none of them.
        broken: ``(b,)`` bool, whether logits of a row are not finite.
    """

    tokens: Tensor
    logprobs: Tensor
    whole: Tensor
    broken: Tensor


class Verifier:
    """Reads known tokens and guesses behind them.

    Args:
        model: A language model.
        state: What the rows have read, with room for all that is to come; written in place.
        width: The most tokens of a row that are read at once.
        record: Whether a GPU records the forward; by default where it can.

    Attributes:
        fixed: Whether all forwards are of one width and over all rows, as a recorded one is.
        how: Words for how forwards are run.
        forwards: How many there were.

    Raises:
        ValueError: A forward is to be recorded that cannot be.
    """

    def __init__(self, model: Any, state: ModelState, width: int, record: bool | None = None):
        self.model, self.state, self.width, self.forwards = model, state, width, 0
        b, device = state.tokens.shape[0], state.tokens.device
        self.how, self.fixed = how_taken(model, device, record)
        if self.fixed and record is None and _gathers(model):
            self.how, self.fixed = "one operation after the other (experts would copy a matrix for every token)", False
        self._sent = _Sent(b, width, device)
        self._rates: Rates = {}
        # of a step, and of a reading
        self._found: dict[bool, tuple[Tensor, ...]] = {}
        self._looks = {True: Look(), False: Look()}
        records = self.fixed and device.type == "cuda"
        self._run, self._step = Replayed(records), Replayed(records)

    @property
    def blocks(self) -> str:
        """Words for how many of the model's blocks read in a few launches each, and why the others do not."""
        if not self.fixed:
            return "the model is called: there are hooks, or nothing is recorded"
        return self.model.backbone.steps_taken(self.state, self.width)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone, in this order; not where forwards are over all rows."""
        self.state = self.state.reorder(torch.tensor(rows, dtype=torch.long, device=self.state.tokens.device))

    def __call__(self, ids: Tensor, known: Tensor, lengths: Tensor) -> Verified:
        """Read tokens.

        Args:
            ids: ``(b, w)`` int64 on the CPU, a row's known tokens, then guesses, then anything.
            known: ``(b,)`` int64, known tokens of each row; 0 in one that is over.
            lengths: ``(b,)`` int64, known tokens and guesses.
        """
        self.forwards += 1
        one = ids.shape[1] == 1
        if self.fixed:
            self._sent.put(ids, known, lengths)
            # a step is a fraction of a forward; in a row that is over it would go on
            if alone := one and bool((lengths == 1).all()):
                self._step(self._step_once)
            else:
                self._run(self._read_once)
            return Verified(*(t.clone() for t in self._looks[alone](self._found[alone])))
        device = self._sent.ids.device
        if one:
            found = self._alone(self.model.step(ids[:, 0].to(device), self.state))
        else:
            keep, padded = ids.shape[1] + 1 - max(1, int(known.min())), bool((lengths < ids.shape[1]).any())
            found = self._forward(ids.to(device), known.to(device), lengths.to(device), keep, padded)
        return Verified(*(t.cpu() for t in found))

    def chosen(self, logits: Tensor) -> Verified:
        """Return what follows where logits, ``(b, v)``, are there already."""
        return Verified(*(t.cpu() for t in self._alone(logits)))

    def _read_once(self) -> None:
        """Read what is in the buffers, all of it."""
        ids, lengths = self._sent.ids, self._sent.lengths
        reading = Reading(lengths, self.width, self._rates)
        logits = self.model.read(ids, self.state, reading)
        self._found[False] = found = self._judged(logits, ids, self._sent.known, lengths)
        self.state.read_on(reading, found[2])

    def _step_once(self) -> None:
        self._found[True] = self._alone(self.model.step(self._sent.ids[:, 0], self.state))

    def _forward(self, ids: Tensor, known: Tensor, lengths: Tensor, keep: int, padded: bool) -> tuple[Tensor, ...]:
        seq = Seq.from_lengths(lengths, ids.shape[1]) if padded else None
        out = self.model(ids, state=self.state, return_state=True, seq=seq, logits_to_keep=keep)
        found = self._judged(out.logits, ids, known, lengths)
        self.state.take(found[2], out.state)
        return found

    def _judged(self, logits: Tensor, ids: Tensor, known: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Judge guesses by the logits of the last tokens, ``(b, keep, v)``: all that a :class:`Verified` says."""
        keep, width = logits.shape[1], ids.shape[1]
        tokens, logprobs, wrong = self._chosen(logits)
        # column i says what follows token i
        tokens, logprobs = (F.pad(t, (width - keep, 0)) for t in (tokens, logprobs))
        at = torch.arange(width, device=ids.device)[width - keep :]
        asked = (at >= known[:, None] - 1) & (at < lengths[:, None])
        broken = (wrong & asked).any(1)
        guessed = asked & (at < lengths[:, None] - 1)
        follows = F.pad(ids, (0, 1))[:, width - keep + 1 :]
        whole = ((tokens[:, width - keep :] == follows) | ~guessed).all(1) & (known > 0)
        return tokens, logprobs, whole, broken

    def _alone(self, logits: Tensor) -> tuple[Tensor, ...]:
        tokens, logprobs, wrong = self._chosen(logits[:, None])
        return tokens, logprobs, torch.ones_like(wrong[:, 0]), wrong[:, 0]

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits[..., : self.model.cfg.vocab_size].float()
        best, token = logits.max(-1)
        # NaN is the largest of all; -inf may be somebody's way to forbid a token
        return token, -(logits - best[..., None]).exp().sum(-1).log(), ~best.isfinite()


class _Sent:
    """Tokens on the device: they get there at once."""

    def __init__(self, b: int, width: int, device: torch.device):
        self._there = torch.zeros(b * (2 + width), dtype=torch.long, device=device)
        self._here = torch.zeros(self._there.shape, dtype=torch.long, pin_memory=device.type == "cuda")
        self.known, self.lengths, self.ids = self._parts(self._there, b)

    @staticmethod
    def _parts(flat: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor]:
        return flat[:b], flat[b : 2 * b], flat[2 * b :].view(b, -1)

    def put(self, ids: Tensor, known: Tensor, lengths: Tensor) -> None:
        """Send tokens, ``(b, w)``, at most ``width`` of a row; the last ones that were sent have been looked at."""
        mine = self._parts(self._here, len(ids))
        for to, new in zip(mine, (known, lengths, ids), strict=True):
            to[..., : new.shape[-1]] = new
        self._there.copy_(self._here, non_blocking=True)


def _gathers(model: Any) -> bool:
    """Tell whether experts, in a graph, would do without the kernel that reads their loads on a GPU."""
    weight = model.some_weight()
    grouped = weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device) >= (9, 0)
    return not grouped and any(isinstance(m, MoE) for m in model.modules())
