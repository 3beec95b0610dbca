"""What ``check_mixer`` says of the mixers that a newcomer writes: the first line names the fault, the second the remedy."""

import dataclasses

import pytest
import torch
from torch import nn

import hybridzoo as zoo
from hybridzoo.layers import Mixer, Seq, State, copy_state
from hybridzoo.layers.testing import PROMISES, Case, check_mixer
from hybridzoo.zoo import registry

D = 8


@dataclasses.dataclass
class Sum(State):
    h: torch.Tensor


class Good(Mixer):
    """A decaying sum: each fault below is one line of it written as one would at first."""

    capabilities = frozenset({"state"})

    def __init__(self, d_model: int):
        super().__init__()
        self.rate = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1):
        nn.init.uniform_(self.rate, 0.1, 0.9)

    def init_state(self, batch, max_len=0, device=None, dtype=None):
        dtype = torch.promote_types(dtype or self._dtype, torch.float32)
        return Sum(torch.zeros(batch, self.rate.numel(), device=device or self._device, dtype=dtype))

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        if seq is not None:
            self.require("packing" if seq.packed else "padding")
        h = self.init_state(len(x)).h if state is None else state.h
        ys = []
        for u in x.unbind(1):
            h = self.rate.to(h.dtype) * h + u
            ys.append(h)
        y = torch.stack(ys, 1).to(x.dtype)
        return (y, Sum(h)) if return_state else y


class Doubled(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y = super().forward(x, state, seq, aux)
        return torch.cat([y, y], -1)


class Last(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(x, state, seq, aux)[:, -1]


class AlwaysTuple(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(x, state, seq, aux, return_state=True)


class NoReturn(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        super().forward(x, state, seq, aux, return_state=return_state)


class Short(Good):
    def forward(self, x):
        return super().forward(x)


class InPlace(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        x *= 0.5
        return super().forward(x, state, seq, aux, return_state=return_state)


class Redrawn(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        self.reset_parameters()
        return super().forward(x, state, seq, aux, return_state=return_state)


class Unsaved(Good):
    def __init__(self, d_model: int):
        super().__init__(d_model)
        self.mix = torch.randn(d_model, dtype=torch.float64)

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward((x * self.mix).to(x.dtype), state, seq, aux, return_state=return_state)


class Dropped(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(nn.functional.dropout(x, 0.5), state, seq, aux, return_state=return_state)


class OverBatch(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(x - x.mean(0), state, seq, aux, return_state=return_state)


class OverTokens(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(x - x.mean(1, keepdim=True), state, seq, aux, return_state=return_state)


class Convolved(Good):
    """A convolution padded on both sides, as nn.Conv1d(padding="same") does."""

    def __init__(self, d_model: int):
        super().__init__(d_model)
        self.conv = nn.Conv1d(d_model, d_model, 3, padding="same")

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(self.conv(x.mT).mT, state, seq, aux, return_state=return_state)


class FirstNext(Good):
    """Reads one token ahead."""

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(x.roll(-1, 1), state, seq, aux, return_state=return_state)


class OnlyTensor(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(x, state, seq, aux)


class Empty(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y = super().forward(x, state, seq, aux)
        return (y, ()) if return_state else y


class RawTensor(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y, s = super().forward(x, state, seq, aux, return_state=True)
        return (y, s.h) if return_state else y


class NoState(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y = super().forward(x, state, seq, aux)
        return (y, None) if return_state else y


class Initial(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y = super().forward(x, state, seq, aux)
        return (y, state or self.init_state(len(x))) if return_state else y


class Ignoring(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(x, None, seq, aux, return_state=return_state)


class Overwriting(Good):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y, new = super().forward(x, state, seq, aux, return_state=True)
        if state is not None:
            copy_state(state, new)
        return (y, new) if return_state else y


class Partial(Good):
    """Carries the sum, and not the token that a shift needs."""

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return super().forward(x + before, state, seq, aux, return_state=return_state)


class NoStart(Good):
    def init_state(self, batch, max_len=0, device=None, dtype=None):
        return ()

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        state = Good.init_state(self, len(x)) if state in (None, ()) else state
        return super().forward(x, state, seq, aux, return_state=return_state)


class Still(Good):
    def step(self, x, state):
        return self(x.unsqueeze(1), state).squeeze(1)


class Row(Good):
    def step(self, x, state):
        y, new = self(x.unsqueeze(1), state, return_state=True)
        copy_state(state, new)
        return y


class OtherStep(Good):
    def step(self, x, state):
        state.h.mul_(self.rate).add_(x)
        return state.h * self.rate


class Blind(Good):
    """The capabilities of the base class are declared, and seq is not looked at."""

    capabilities = Mixer.capabilities

    def require(self, capability):
        pass


class Plain(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()
        self.proj = nn.Linear(d_model, d_model)


class NoSize(Good):
    def __init__(self, width: int):
        super().__init__(width)


class Pool(Good):
    """Every output depends on every token, later ones too."""

    capabilities = frozenset({"packing", "padding"})

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        if return_state or state is not None:
            self.require("state")
        if seq is None:
            return x + self.rate * x.mean(1, keepdim=True)
        doc = seq.doc.where(seq.valid, -1)
        same = (doc[:, :, None] == doc[:, None]).to(x.dtype)
        return x + self.rate * (same @ seq.clear(x)) / same.sum(-1, keepdim=True)


class Nearsighted(Pool):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y = super().forward(x, state, seq, aux, return_state=return_state)
        return y if seq is not None else x + self.rate * nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]


class Stencil(Mixer):
    """A convolution over maps, 3 x 3."""

    capabilities = frozenset({"grid"})

    def __init__(self, d_model: int):
        super().__init__()
        self.conv = nn.Conv2d(d_model, d_model, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1):
        self.conv.reset_parameters()

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        if return_state or state is not None:
            self.require("state")
        if seq is not None and (seq.packed or seq.padded):
            self.require("packing" if seq.packed else "padding")
        return self.conv(x.mT.unflatten(2, self.sizes(x, seq)).contiguous()).flatten(2).mT

    def sizes(self, x, seq):
        return self.grid_of(x, seq)

    def reach(self, length, grid=None):
        rows, cols = torch.arange(length) // grid[1], torch.arange(length) % grid[1]
        return ((rows[:, None] - rows).abs() <= 1) & ((cols[:, None] - cols).abs() <= 1)

    def flops(self, seq_len):
        return 2 * self.conv.weight.numel()


class Flat(Stencil):
    def sizes(self, x, seq):
        return 1, x.shape[1]


class Swapped(Stencil):
    def sizes(self, x, seq):
        return self.grid_of(x, seq)[::-1]


class Wide(Stencil):
    def reach(self, length, grid=None):
        return None


class Strict(Good):
    """A mixer of rows that takes the maps' sizes for something else."""

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        if seq is not None and seq.grid is not None:
            return 2 * super().forward(x)
        return super().forward(x, state, seq, aux, return_state=return_state)


FIRST_LINES = {
    Doubled: r"wrong output: forward of (2, 8, 8) gives (2, 8, 16).",
    Last: r"wrong output: forward of (2, 8, 8) gives (2, 8).",
    AlwaysTuple: "wrong output: forward of (2, 8, 8) gives a tuple.",
    NoReturn: "wrong output: forward of (2, 8, 8) gives a NoneType.",
    Short: "forward(x, return_state=True) raises TypeError: Short.forward() got an unexpected keyword argument 'return_state'.",
    InPlace: "changes its input in place.",
    Redrawn: "parameters re-initialised: forward changes rate.",
    Unsaved: "parameters re-initialised: after load_state_dict the output differs by *.",
    Dropped: "not reproducible: the same call twice differs by *.",
    OverBatch: "mixes the rows of the batch: row 0 changes by * when only row 1 does.",
    OverTokens: "not causal: outputs before token 5 change by * when only later tokens do.",
    Convolved: "not causal: outputs before token 5 change by * when only later tokens do.",
    FirstNext: "not causal: outputs before token 5 change by * when only later tokens do.",
    OnlyTensor: "state not returned: forward(x, return_state=True) gives (2, 5, 8).",
    Empty: "state not returned: forward(x, return_state=True) gives (), although outputs depend on earlier tokens.",
    NoState: "state of a wrong kind: forward(x, return_state=True) gives a NoneType as the state.",
    RawTensor: "state of a wrong kind: forward(x, return_state=True) gives (2, 8) as the state.",
    Initial: "state forgotten: the returned state is the same after other tokens.",
    Ignoring: "state ignored: forward gives the same with the state of earlier tokens and without.",
    Overwriting: "changes the state it is given: forward is functional, and only step works in place.",
    Partial: "state wrong: 5 tokens and then 3 differ by * from all 8 at once.",
    NoStart: "no first state: init_state gives a tuple, and forward leaves a Sum.",
    Still: "step does not update the state.",
    Row: "wrong output: step of (2, 8) gives (2, 1, 8).",
    OtherStep: "step disagrees with forward: token 0 differs by *.",
    Blind: "ignores seq: a packed document sees the one before it, which changes it by *.",
    Plain: "is no hybridzoo.Mixer but a Plain.",
    NoSize: "cannot be built: TypeError: NoSize.__init__() got an unexpected keyword argument 'd_model'.",
}


def fault_of(mixer, **options):
    with pytest.raises(AssertionError) as e:
        check_mixer(mixer, d_model=D, **options)
    return str(e.value).splitlines()


@pytest.mark.parametrize("mixer", FIRST_LINES, ids=lambda m: m.__name__)
def test_the_first_line_names_the_fault(mixer):
    first, remedy, promise = fault_of(mixer)
    before, _, after = f"{mixer.__name__}: {FIRST_LINES[mixer]}".partition("*")
    assert first.startswith(before) and first.endswith(after) and len(first) < 140
    assert remedy.endswith(".") and len(remedy) < 200
    assert promise.startswith(f"{mixer.__name__} breaks the promise '")


def test_every_fault_that_is_looked_for_breaks_a_promise_that_exists():
    from hybridzoo.layers.testing.faults import _FAULTS

    assert {p for promises, _ in _FAULTS for p in promises} <= set(PROMISES)


def test_a_fault_is_not_looked_for_where_its_promises_are_skipped():
    assert "padding" in fault_of(Blind, skip={"packing"})[0]
    check_mixer(Blind, d_model=D, skip=set(PROMISES))


@pytest.mark.parametrize("mixer", [Good, Pool, Stencil], ids=lambda m: m.__name__)
def test_the_good_ones_pass(mixer):
    check_mixer(mixer, d_model=D, skip=() if mixer is Stencil else {"compiles"})


@pytest.mark.parametrize(
    ("mixer", "promise", "message"),
    [
        (Nearsighted, "reach", "output 0 does not depend on input 2, and reach says otherwise"),
        (Wide, "reach", "output 0 does not depend on input 2"),
        (Swapped, "reach", "output 0 depends on input 3"),
        (Flat, "grid", "maps of 5 x 3 and of 3 x 5 give the same"),
        (Strict, "grid", "maps of 1 x 1 and rows of the same tokens"),
    ],
)
def test_a_mixer_that_is_not_what_it_declares_is_caught(mixer, promise, message):
    with pytest.raises(AssertionError, match=message):
        PROMISES[promise](Case(mixer, D))
    with pytest.raises(AssertionError, match=f"{mixer.__name__} breaks the promise '{promise}'"):
        check_mixer(mixer, d_model=D, skip=set(PROMISES) - {promise})


def test_a_mixer_of_maps_wants_to_know_their_size():
    with pytest.raises(ValueError, match=r"Stencil: mixes maps, and got rows of 6 tokens. Pass seq=Seq.from_grid"):
        Stencil(D)(torch.randn(2, 6, D))
    with pytest.raises(ValueError, match=r"Stencil: seq describes \(2, 8\) tokens, the input has \(2, 6\)"):
        Stencil(D)(torch.randn(2, 6, D), seq=Seq.from_grid((2, 4), 2, 8))


def test_who_carries_a_state_is_causal_and_others_say_so():
    assert Good(D).can("causal") and "causal" not in Good.capabilities
    assert not Pool(D).can("causal") and Mixer().can("causal") and not Mixer().can("grid")
    with pytest.raises(NotImplementedError, match=r"Pool does not support 'causal' \(it declares: packing, padding\)"):
        Pool(D).require("causal")


@pytest.mark.parametrize("layers", ["mlp pool", "mlp * 2 pool+mlp"])
def test_a_language_model_takes_causal_mixers_only(layers, monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    zoo.register_mixer("pool")(Pool)
    block = "block 2" if "*" in layers else "block 1"
    with pytest.raises(
        zoo.ConfigError, match=rf"mixers.pool \(pool\): {block} .* needs 'causal'. Pool does not support 'causal'"
    ):
        zoo.config({"vocab_size": 8, "d_model": 8, "layers": layers, "mixers": {"pool": {}, "mlp": {}}})
