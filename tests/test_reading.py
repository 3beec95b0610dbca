"""Tokens that are read at once in few launches leave what a forward leaves, in the rows that go on and in no other: on the CPU, by PyTorch."""

import pytest
import torch
from test_fused_steps import CFG, MIXERS

import hybridzoo as zoo
from hybridzoo.layers import fused
from hybridzoo.layers.reading import Reading
from hybridzoo.zoo.models import block as blocks
from hybridzoo.zoo.models.prefill import prefill

WAYS = {"few": 10**6, "many": 2}  # rows up to which products take norm and residual along


@pytest.fixture(params=WAYS)
def counted(request, monkeypatch):
    """Products by PyTorch operations; counts the mixers that read in few launches."""
    taken, fits = [], fused.fits

    def fit(device, dtype, b, *sizes):
        return fits(device, dtype, b, *sizes) if b < WAYS[request.param] else "too many rows"

    monkeypatch.setenv("HYBRIDZOO_BACKEND", "torch")
    monkeypatch.setattr(fused, "fits", fit)
    for name in ("mixed", "mixed_and_added"):
        function = getattr(blocks, name)
        way = "few" if name == "mixed_and_added" else "many"
        monkeypatch.setattr(blocks, name, lambda *a, f=function, way=way: taken.append(way) or f(*a))
    return request.param, taken


def built(layers, mixers, **more):
    torch.manual_seed(1)
    model = zoo.build(CFG | {"layers": layers, "mixers": mixers} | more, dtype=torch.float64).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@torch.no_grad()
def check(model, lengths=(4, 6, 1, 6), go_on=(True, True, True, False)):
    ids = torch.randint(0, 50, (4, 15))
    # a row that is shorter than others, and one that begins here
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, :5], mask[2] = 0, 0
    state = model(ids[:, :9], attention_mask=mask, state=model.init_state(4, 30)).state
    before, width, rows = state.clone(), 6, torch.tensor(go_on)
    reading = Reading(torch.tensor(lengths), width, {})
    logits = model.read(ids[:, 9:], state, reading)
    assert all(torch.equal(x, y) for x, y in zip(seen(state), seen(before), strict=True))
    state.read_on(reading, rows)
    for row, length in enumerate(lengths):
        own = before.reorder(torch.tensor([row]))
        out = model(ids[row : row + 1, 9 : 9 + length], state=own, return_state=True)
        torch.testing.assert_close(logits[row, :length], out.logits[0], rtol=1e-9, atol=1e-9)
        want = out.state if go_on[row] else own
        got = state.reorder(torch.tensor([row]))
        assert got.tokens.tolist() == want.tokens.tolist()
        # of what they have left behind, all that can be seen of it
        more = ids[row : row + 1, :3]
        for x, y in zip(logits_of(model, more, got), logits_of(model, more, want), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    return state


def seen(state):
    """What of a state there is; not what stands in slots behind a row's end."""
    found = []
    for s in state.layers:
        for part in s if isinstance(s, tuple) else (s,):
            pos = getattr(part, "pos", None)
            for name, t in part.tensors():
                found.append(t.masked_fill((pos < 0)[..., None, None], 0) if name in ("k", "v") else t.clone())
    return [*found, state.tokens]


def logits_of(model, ids, state):
    together = model(ids, state=state.clone(), return_state=True).logits[0]
    return together, torch.cat([model.step(token, state) for token in ids.unbind(1)])


@pytest.mark.parametrize("name", MIXERS)
def test_a_layer_reads_as_a_forward_does(name, counted):
    way, taken = counted
    check(built("x * 2", {"x": MIXERS[name]}))
    # slots that are taken again are no place for what may be wrong
    apart = name == "attention, more"
    assert taken == ([] if apart else [way] * 2)


def test_a_convolution_in_front_of_attention_is_read_along(counted):
    way, taken = counted
    mixer = MIXERS["attention, more"] | {"window": None}
    check(built("x * 2", {"x": mixer}))
    assert taken == [way] * 2


def test_layers_side_by_side_and_those_that_have_no_such_way(counted):
    way, taken = counted
    mixers = {
        "a": MIXERS["mamba2"],
        "b": MIXERS["attention"],
        "c": {"type": "moe", "d_intermediate": 16, "num_experts": 4},
        "d": MIXERS["mamba"] | {"selective": False},
    }
    model = built("a + b c d b", mixers, residual_multiplier=0.6, logits_multiplier=0.4, embedding_multiplier=3)
    check(model)
    assert taken == [way] * 3
    said = model.backbone.steps_taken(model.init_state(1, 20), 6)
    assert said.startswith("2 of 4 blocks in a few launches each; ") and "1 part by part (MoE has no such step)" in said


def test_a_state_of_half_the_precision_is_rounded_as_steps_round_it(counted):
    torch.manual_seed(0)
    model = built("x y", {"x": MIXERS["mamba"], "y": MIXERS["mamba2"]}).float()
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        state = prefill(model, ids[:, :5], None, None, 9, None)[1].kept_in(torch.bfloat16)
        want, reading = state.clone(), Reading(torch.tensor([4, 4]), 4, {})
        model.read(ids[:, 5:], state, reading)
        state.read_on(reading, torch.tensor([True, True]))
        want.take(torch.tensor([True, True]), model(ids[:, 5:], state=want, return_state=True).state)
    for x, y in zip(seen(state), seen(want), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x.double(), y.double(), rtol=2**-7, atol=1e-6)


@torch.no_grad()
def test_keys_beyond_the_last_slot_are_left_out(counted):
    """Guesses may go beyond what a row can still become: they are never right."""
    model = built("x * 2", {"x": MIXERS["attention"]})
    ids = torch.randint(0, 50, (2, 15))
    state = prefill(model, ids[:, :9], None, None, 3, None)[1]
    assert state.layers[0].k.shape[1] == 12
    before, reading = state.clone(), Reading(torch.tensor([6, 3]), 6, {})
    logits = model.read(ids[:, 9:], state, reading)
    state.read_on(reading, torch.tensor([False, True]))
    want = model(ids[:, 9:12], state=before.clone(), return_state=True)
    torch.testing.assert_close(logits[:, :3], want.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.layers[1].k[1], want.state.layers[1].k[1], rtol=1e-9, atol=1e-9)
    assert state.tokens.tolist() == [9, 12] and logits.isfinite().all()
    for x, y in zip(seen(state), seen(before), strict=True):
        assert torch.equal(x[0], y[0])
