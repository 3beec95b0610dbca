"""The checking of guesses: tokens that may be wrong are read in one forward, and a state takes over the rows in which none was.

On a GPU the forward is of one width and recorded as a CUDA graph: rows are padded behind their tokens, what is right is found out on the
device, and the state is written in place, so that the host waits once for what was chosen.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.seq import Seq
from ...layers.moe import MoE
from .decoder import Replayed, how_taken, not_finite
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
        self._ids = torch.zeros(b, width, dtype=torch.long, device=device)
        self._known, self._lengths = (torch.zeros(b, dtype=torch.long, device=device) for _ in range(2))
        self._found: tuple[Tensor, ...] = ()
        self._run = Replayed(self.fixed and device.type == "cuda")

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
        if self.fixed:
            self._ids[:, : ids.shape[1]].copy_(ids)
            self._known.copy_(known)
            self._lengths.copy_(lengths)
            self._run(self._once)
            found = self._found
        elif ids.shape[1] == 1:
            found = self._alone(self.model.step(ids[:, 0].to(self._ids.device), self.state))
        else:
            device, keep = self._ids.device, ids.shape[1] + 1 - max(1, int(known.min()))
            found = self._read(
                ids.to(device), known.to(device), lengths.to(device), keep, bool((lengths < ids.shape[1]).any())
            )
        return Verified(*(t.cpu() for t in found))

    def chosen(self, logits: Tensor) -> Verified:
        """Return what follows where logits, ``(b, v)``, are there already."""
        return Verified(*(t.cpu() for t in self._alone(logits)))

    def _once(self) -> None:
        """Read what is in the buffers, all of it."""
        self._found = self._read(self._ids, self._known, self._lengths, self.width, True)

    def _read(self, ids: Tensor, known: Tensor, lengths: Tensor, keep: int, padded: bool) -> tuple[Tensor, ...]:
        width = ids.shape[1]
        seq = Seq.from_lengths(lengths, width) if padded else None
        out = self.model(ids, state=self.state, return_state=True, seq=seq, logits_to_keep=keep)
        tokens, logprobs, wrong = self._chosen(out.logits)
        # column i says what follows token i
        tokens, logprobs = (F.pad(t, (width - keep, 0)) for t in (tokens, logprobs))
        at = torch.arange(width, device=ids.device)[width - keep :]
        asked = (at >= known[:, None] - 1) & (at < lengths[:, None])
        broken = (wrong & asked).any(1)
        guessed = asked & (at < lengths[:, None] - 1)
        follows = F.pad(ids, (0, 1))[:, width - keep + 1 :]
        whole = ((tokens[:, width - keep :] == follows) | ~guessed).all(1) & (known > 0)
        self.state.take(whole, out.state)
        return tokens, logprobs, whole, broken

    def _alone(self, logits: Tensor) -> tuple[Tensor, ...]:
        tokens, logprobs, wrong = self._chosen(logits[:, None])
        return tokens, logprobs, torch.ones_like(wrong[:, 0]), wrong[:, 0]

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits[..., : self.model.cfg.vocab_size].float()
        best, token = logits.max(-1)
        return token, best - logits.logsumexp(-1), not_finite(logits)


def _gathers(model: Any) -> bool:
    """Tell whether experts, in a graph, would do without the kernel that reads their loads on a GPU."""
    weight = model.some_weight()
    grouped = weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device) >= (9, 0)
    return not grouped and any(isinstance(m, MoE) for m in model.modules())
