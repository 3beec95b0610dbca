"""Decoders whose step a GPU has recorded, kept from one generation to the next: recording one takes as long as dozens of steps.

A recorded step works on memory of its own (states, logits, what the sampler remembers) and reads the weights where they lie. A generation
of the same form copies its rows' states in and replays it; nothing is replayed once the weights lie elsewhere.
"""

import os
from typing import Any

import torch

from ...kernels.derivatives import ENV
from ...kernels.gpu.operands import eager
from ...layers.state import states_in
from .decoder import Decoder, how_taken
from .sampling import Sampler
from .state import ModelState

__all__ = ["Recordings", "room_for"]

# of those that wait; a state of more bytes belongs to a generation that takes long enough without
_MOST, _BYTES = 4, 2**30
# what modules keep beside tensors that may decide about a step
_PLAIN = (bool, int, float, str, tuple, torch.dtype, type(None))


def room_for(tokens: int) -> int:
    """Places for keys and values of so many tokens, an eighth more at most from 512 on: generations of nearly equal length share a step."""
    step = max(64, 2 ** max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


class Recordings:
    """Decoders of one model that wait for rows; a copy of the model begins without."""

    def __init__(self) -> None:
        self._waiting: dict[Any, Decoder] = {}
        self._weights: Any = None

    def __deepcopy__(self, memo: Any) -> "Recordings":
        return Recordings()

    def __reduce__(self) -> Any:
        return Recordings, ()

    def clear(self) -> None:
        """Let go of all, and of the memory that they hold."""
        self._waiting.clear()

    def __len__(self) -> int:
        return len(self._waiting)

    def decoder(
        self, model: Any, state: ModelState, sampler: Sampler, ends: list[int], pad: int, steps: int, record: bool | None, logprobs: bool
    ) -> Decoder:  # fmt: skip
        """Return a decoder, as :class:`Decoder` makes one of these; where it records, with slots of its own, which may have served before.

        Then the rows' states are to be put into it.
        """
        b, device = state.tokens.shape[0], state.tokens.device
        weights = _lie(model) if how_taken(model, device, record)[1] else None
        if weights is None:
            return Decoder(model, state, sampler, ends, pad, steps, record, logprobs)
        if weights != self._weights:
            self._waiting.clear()
            self._weights = weights
        room, steps = room_for(int(state.tokens.amax()) + steps), room_for(steps)
        slots = b, room, device, None, state.recurrent_dtype
        options = {**sampler.options.values(), "seed": 0}
        chance = steps if sampler.options.draws else 0
        form = (repr(options), *ends, pad, chance, logprobs, device, _layout(model, slots), _around())
        found = self._waiting.pop(form, None)
        if found is None:
            found = Decoder(model, model.init_state(*slots), sampler, ends, pad, steps, record, logprobs)
        else:
            found.begin(model, sampler)
        found.form = form
        return found

    def keep(self, decoder: Decoder) -> None:
        """Let a decoder wait whose rows have ended, if it has recorded a step; those go that have waited longest and are too many."""
        if decoder.form is None or not decoder.recorded:
            return
        decoder.model = None  # which goes when its last user lets go of it
        self._waiting[decoder.form] = decoder
        while len(self._waiting) > _MOST or sum(d.state.nbytes for d in self._waiting.values()) > _BYTES:
            del self._waiting[next(iter(self._waiting))]


def _layout(model: Any, slots: tuple) -> tuple:
    b, room, _, *rest = slots
    state = model.init_state(b, room, "meta", *rest)
    return tuple((t.shape, t.dtype) for mine in states_in(state.layers) for _, t in mine.tensors())


def _around() -> tuple:
    """The settings of the process that decide about the operations which are recorded."""
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_inference_mode_enabled()
    exact = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return *autocast, *exact, os.environ.get(ENV)


def _lie(model: Any) -> list[Any] | None:
    """All that a step reads of a model and where; ``None`` where modules of others may have more to say, which nobody here knows of."""
    ours, found = (__name__.partition(".")[0], "torch.nn"), []
    for module in model.modules():
        if not type(module).__module__.startswith(ours):
            return None
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if not all(map(eager, tensors)):
            return None
        found += [type(module), *(value for value in vars(module).values() if isinstance(value, _PLAIN))]
        found += [(t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in tensors]
    return found
