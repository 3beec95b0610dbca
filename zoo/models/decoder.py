"""The loop of decoding: rows that are continued token by token, each in a slot of one state.

A step chooses a token for every slot and reads it. It is the same sequence of operations on the same memory every time: a GPU records it
once as a CUDA graph and replays it, with the bits that it has without. Nobody waits for the device but to look at what was chosen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.step.choose import Slots, choose_token
from .sampling import Sampler
from .state import ModelState

__all__ = ["AHEAD", "Chosen", "Decoder", "Look", "Replayed", "how_taken", "not_finite", "refuse"]

# steps that a GPU takes before somebody looks; on a CPU looking costs nothing
AHEAD = 16
# kinds of devices that record
_RECORD = ("cuda",)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The choices of some steps, on the CPU.

    Attributes:
        tokens: ``(b, m)`` int64; where a slot's row had ended before, what stands for padding.
        logprobs: ``(b, m)`` float32, natural logarithms of the probabilities that the model gave them, before any option; 0 for padding.
        counts: ``(b,)`` int64, tokens that the rows have by now.
        finished: ``(b,)`` bool, whether a row has ended, or its slot is free.
    """

    tokens: Tensor
    logprobs: Tensor
    counts: Tensor
    finished: Tensor


class Decoder:
    """Slots in which rows are continued.

    Args:
        model: A language model.
        state: Of as many rows as there are slots, with room for all that is to come; decoded on in place.
        sampler: Chooses, for as many rows.
        ends: Tokens that end a row.
        pad: What is read and written in a slot whose row has ended.
        steps: The most tokens that a row can ask for.
        record: Whether a GPU records its step; by default where it can.
        logprobs: Whether it is worked out how likely the tokens were; a pass over all logits.

    Attributes:
        how: Words for how steps are taken.
        ahead: Steps to take before what they chose is looked at.
        form: What a generation has to have in common with the one that it was made for to be served, too; ``None`` if no other may be.

    Raises:
        ValueError: A step is to be recorded that cannot be.
    """

    def __init__(
        self,
        model: Any,
        state: ModelState,
        sampler: Sampler,
        ends: list[int],
        pad: int,
        steps: int,
        record: bool | None = None,
        logprobs: bool = True,
    ):
        self.model, self.state, self.sampler, self.pad = model, state, sampler, pad
        b, device, vocab = state.tokens.shape[0], state.tokens.device, model.cfg.vocab_size
        # rows begin where 16 bytes can be read at once
        self._logits = torch.zeros(b, -(-vocab // 4) * 4, device=device)[:, :vocab]
        self._chance = torch.zeros(b, steps if sampler.options.draws else 0, dtype=torch.float64, device=device)
        self._count, self._limit, column, token = (torch.zeros(b, dtype=torch.long, device=device) for _ in range(4))
        self._finished, self._broken = (torch.full((b,), value, device=device) for value in (True, False))
        self._logprobs = torch.zeros(b, AHEAD, device=device)
        self._slots = Slots(
            torch.full((b, AHEAD), pad, dtype=torch.long, device=device),
            self._logprobs if logprobs else None,
            column,
            self._count,
            self._limit,
            self._finished,
            self._broken,
            token,
            torch.tensor(ends, dtype=torch.long, device=device),
        )
        self.how, self._records = how_taken(model, device, record)
        if self._records:  # a step that is recorded cannot add any
            state.reserve(steps)
        self.ahead = AHEAD if device.type == "cuda" else 1
        self.form: Any = None
        self._run = Replayed(self._records)
        self._look = Look()
        self._unread = False

    @property
    def recorded(self) -> bool:
        """Tell whether there is a step to be replayed."""
        return self._run.recorded

    def begin(self, model: Any, sampler: Sampler) -> None:
        """Serve anew, with all slots free; what was recorded stays, for a model and a sampler of the same form."""
        self.model, self._unread = model, False
        self.sampler.copy_(sampler)
        self._finished.fill_(True)

    def put(self, slots: Tensor, logits: Tensor, chance: Tensor, limit: int, state: ModelState | None = None) -> None:
        """Begin with rows.

        Args:
            slots: Where, ``(m,)`` int64.
            logits: Of what follows the rows, ``(m, v)``.
            chance: ``(m, steps)`` float64 of :func:`~hybridzoo.zoo.models.sampling.uniforms`, or of no steps where it decides nothing.
            limit: Tokens after which a row ends, at least 1.
            state: What they have read, of ``m`` rows; by default the slots' states are theirs already.

        Raises:
            ValueError: Logits that are not finite.
        """
        slots = slots.to(self._count.device)
        logits = logits[:, : self._logits.shape[1]].float()
        refuse(not_finite(logits))
        if state is not None:
            before = self.state.places()
            self.state.put(slots, state)
            if self.state.places() != before:  # it has grown: what was recorded works on memory that is left
                self._run, self.form = Replayed(self._records), None
        self._logits[slots] = logits
        self._chance[slots, : chance.shape[1]] = chance.to(self._chance.device)
        self._count[slots], self._limit[slots] = 0, limit
        self._finished[slots], self._broken[slots] = False, False

    def drop(self, slots: Tensor) -> None:
        """End rows where they are; their slots are free."""
        self._finished[slots.to(self._finished.device)] = True

    @torch.no_grad()
    def advance(self, steps: int, last: bool = False) -> Chosen:
        """Take some steps, at most :data:`AHEAD`; what the last one of ``last`` ones chose is not read before there are more.

        Raises:
            ValueError: Logits of a row that has not ended are not finite.
        """
        if self._unread:
            self._read()
        self._slots.column.zero_()
        for _ in range(steps - last):
            self._run(self._once)
        if last:
            self._choose()
        self._unread = last
        there = self._slots.tokens, self._logprobs, self._count, self._finished, self._broken
        tokens, logprobs, counts, finished, broken = self._look(there)
        refuse(broken)
        return Chosen(tokens[:, :steps].clone(), logprobs[:, :steps].clone(), counts.clone(), finished.clone())

    def _once(self) -> None:
        self._choose()
        self._read()

    def _choose(self) -> None:
        token = None
        if self.sampler.options.draws:
            # what is drawn from must be numbers
            logits = self._logits.masked_fill(not_finite(self._logits)[:, None], 0)
            at = self._count.clamp(max=self._chance.shape[1] - 1)
            token = self.sampler(logits, self._chance.gather(1, at[:, None]).squeeze(1))
        elif not self.sampler.plain:
            token = self.sampler(self._logits)
        choose_token(self._logits, self._slots, self.pad, token)

    def _read(self) -> None:
        self._logits.copy_(self.model.step(self._slots.token, self.state)[:, : self._logits.shape[1]])


class Look:
    """Copies on the CPU of the same tensors, again and again, overwritten by the next ones; the device is waited for once."""

    def __init__(self) -> None:
        self._here: tuple[Tensor, ...] | None = None

    def __call__(self, there: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Look at tensors, all of one device."""
        device = there[0].device
        on_gpu = device.type == "cuda"
        if self._here is None:
            self._here = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=on_gpu) for t in there)
        for mine, theirs in zip(self._here, there, strict=True):
            mine.copy_(theirs, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream(device).synchronize()
        return self._here


class Replayed:
    """The same work on the same memory, again and again: where a GPU records it, from the third time on as a CUDA graph.

    Args:
        records: Whether it does.
    """

    def __init__(self, records: bool):
        self._records, self._times = records, 0
        self._graph: Any = None

    @property
    def recorded(self) -> bool:
        """Tell whether there is a graph to be replayed."""
        return self._graph is not None

    def __call__(self, work: Callable[[], None]) -> None:
        """Do the work; it is not kept, so that who owns it goes when nobody else needs it."""
        if self._graph is None and self._records and self._times == 2:
            # what libraries prepare at a first call is there; capturing runs nothing
            self._graph = _recorded(work)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._times += 1
            work()


def not_finite(logits: Tensor) -> Tensor:
    """Find the rows of logits, ``(..., v)``, whose best is no number."""
    # NaN is the largest of all; -inf may be somebody's way to forbid a token
    return ~logits.amax(-1).isfinite()


def refuse(wrong: Tensor) -> None:
    """Raise a ``ValueError`` that names the first row that is ``wrong``, ``(b,)`` bool."""
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"logits: those of row {row} are not finite. The weights are damaged (a diverged training run, say), or the numbers too large "
            "for their dtype: load a good checkpoint, or use dtype=torch.float32."
        )


def _recorded(work: Callable[[], None]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def how_taken(model: Any, device: torch.device, record: bool | None) -> tuple[str, bool]:
    """Say how steps are taken on a device, and whether they are recorded, for which ``record`` may ask.

    Raises:
        ValueError: They are to be recorded and cannot be.
    """
    reason = ""
    if device.type not in _RECORD:
        reason = f"a {device.type} records nothing"
    elif model.hooked():
        reason = "modules have hooks, or a step of their own is missing"
    elif any(p.device != device for p in model.parameters()):
        reason = "weights are not on the device"
    if record and reason:
        raise ValueError(f"generate(record=True): {reason}. Leave it out.")
    if record is False or reason:
        return f"one operation after the other ({reason or 'as asked'})", False
    return "recorded as a CUDA graph", True
