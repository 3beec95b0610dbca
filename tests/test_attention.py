"""Attention against transformers' layers and a plain einsum, and what it promises beyond the mixer contract."""

import math

import pytest
import torch

from hybridzoo.kernels import Seq
from hybridzoo.layers import Attention, attend
from hybridzoo.layers.base import copy_state, map_state
from hybridzoo.layers.rope import rotate

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}


def worst(a, b):
    return (a - b).abs().max().item() / b.abs().max().item()


def copy_into(theirs, ours):
    sizes = [ours.nheads * ours.headdim] + 2 * [ours.nheads_kv * ours.headdim]
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), ours.in_proj.weight.split(sizes), strict=True):
        getattr(theirs, name).weight.data = weight.detach()
    theirs.o_proj.weight.data = ours.out_proj.weight.detach()


def run(theirs, embedding, x, mask=None):
    positions = torch.arange(x.shape[1])[None]
    return theirs(x, position_embeddings=embedding(x, positions), attention_mask=mask)[0]


def test_attention_equals_transformers_llama():
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="sdpa"
    )
    theirs, ours = LlamaAttention(config, 0).eval(), Attention(32, 4, 2, rope=500.0)
    copy_into(theirs, ours)
    x = torch.randn(2, 23, 32)
    assert worst(ours(x), run(theirs, LlamaRotaryEmbedding(config), x)) < 1e-5


def test_attention_with_qk_norm_equals_transformers_qwen3():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config, Qwen3RotaryEmbedding

    config = Qwen3Config(**SIZES, head_dim=16, attn_implementation="sdpa")
    theirs, ours = Qwen3Attention(config, 0).eval(), Attention(32, 4, 2, headdim=16, qk_norm=True)
    copy_into(theirs, ours)
    for name in ("q_norm", "k_norm"):
        getattr(ours, name).weight.data.uniform_(0.5, 2)
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    x = torch.randn(2, 23, 32)
    assert worst(ours(x), run(theirs, Qwen3RotaryEmbedding(config), x)) < 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [4, 16])
def test_rope_equals_transformers(interleaved, dim):
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    x, pos = torch.randn(2, 7, 3, 16).double(), torch.randint(0, 5000, (2, 7))
    angle = pos[..., None] / 10000.0 ** (torch.arange(0, dim, 2).double() / dim)
    turn = x[..., :dim]
    if interleaved:
        turned = gptj(turn, angle.sin(), angle.cos())
    else:
        turned, _ = llama(turn, turn, *(torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin)), unsqueeze_dim=2)
    want = torch.cat([turned, x[..., dim:]], -1)
    torch.testing.assert_close(rotate(x, pos, 10000.0, dim, interleaved), want, rtol=1e-9, atol=1e-9)


def test_rope_depends_on_distance_only_and_stays_exact_far_out():
    q, k = torch.randn(2, 1, 1, 1, 64).double()
    near = (rotate(q, torch.tensor([7]), 1e4, 64) * rotate(k, torch.tensor([3]), 1e4, 64)).sum()
    far = (rotate(q, torch.tensor([10**6 + 4]), 1e4, 64) * rotate(k, torch.tensor([10**6]), 1e4, 64)).sum()
    assert far.item() == pytest.approx(near.item(), rel=1e-6)


def plain(layer, x):
    """Every formula of the docstring, written out for one row."""
    l, h, g, p = x.shape[0], layer.nheads, layer.nheads_kv, layer.headdim
    qkv = x @ layer.in_proj.weight.t()
    if layer.d_conv:
        w = layer.conv1d.weight[:, 0]
        past = torch.cat([torch.zeros(layer.d_conv - 1, qkv.shape[1]).to(qkv), qkv])
        qkv = layer.conv1d.bias + sum(past[i : i + l] * w[:, i] for i in range(layer.d_conv))
    q, k, v = (t.reshape(l, -1, p) for t in qkv.split([h * p, g * p, g * p], -1))
    if layer.q_norm is not None:
        q, k = (
            t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for t, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
    if layer.rope is not None:
        complex_angle = torch.outer(torch.arange(l), layer.rope ** (-torch.arange(0, p, 2) / p)).to(x)
        turn = torch.polar(torch.ones_like(complex_angle), complex_angle)[:, None]
        q, k = (
            torch.cat([(torch.complex(*t.chunk(2, -1)) * turn).real, (torch.complex(*t.chunk(2, -1)) * turn).imag], -1)
            for t in (q, k)
        )
    k, v = (t.repeat_interleave(h // g, 1) for t in (k, v))
    scores = torch.einsum("qhp,khp->hqk", q, k) * (layer.softmax_scale or p**-0.5)
    at = torch.arange(l)
    hidden = (at[None, :] > at[:, None]) | (at[None, :] <= at[:, None] - (layer.window or l))
    y = torch.einsum("hqk,khp->qhp", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
    return y.reshape(l, -1) @ layer.out_proj.weight.t()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope": None},
        {"window": 1},
        {"window": 4},
        {"window": 4, "d_conv": 3},
        {"qk_norm": True, "softmax_scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 3, 29, 70])
def test_attention_equals_the_formula(length, options):
    layer, x = Attention(32, 4, 2, **options).double(), torch.randn(2, length, 32).double()
    for row in range(2):
        assert worst(layer(x)[row], plain(layer, x[row])) < 1e-6  # the angles of the formula are float32


def test_long_windows_are_cut_into_blocks():
    layer, x = Attention(32, 4, 2, window=300).double(), torch.randn(1, 1400, 32).double()
    packed = Seq.from_cu_seqlens(torch.tensor([0, 5, 1400]), 1, 1400)
    with torch.no_grad():
        assert worst(layer(x)[0], plain(layer, x[0])) < 1e-6
        assert worst(layer(x, seq=packed)[:, 5:], layer(x[:, 5:])) < 1e-9
        parts, state = [], None
        for piece in x.split([700, 20, 680], 1):
            y, state = layer(piece, state, return_state=True)
            parts.append(y)
        assert worst(torch.cat(parts, 1), layer(x)) < 1e-9


def test_long_packed_rows_are_cut_into_blocks():
    layer, x = Attention(32, 4, 2).double(), torch.randn(1, 2100, 32).double()
    packed = Seq.from_cu_seqlens(torch.tensor([0, 900, 2100]), 1, 2100)
    with torch.no_grad():
        want = torch.cat([layer(x[:, :900]), layer(x[:, 900:])], 1)
        assert worst(layer(x, seq=packed), want) < 1e-9


@pytest.mark.parametrize("window", [None, 3, 8])
def test_a_state_keeps_no_more_than_it_needs(window):
    layer = Attention(32, 4, 2, window=window)
    _, state = layer(torch.randn(2, 11, 32), return_state=True)
    cap = window or 11
    assert state.k.shape == (2, cap, 2, 8) and state.length.tolist() == [11, 11]
    want = torch.arange(11 - cap, 11)
    assert torch.equal(state.pos[0], torch.empty(cap, dtype=torch.long).scatter(0, want % cap, want))
    reserved = layer.init_state(2, 64)
    assert reserved.k.shape[1] == (window or 64) and (reserved.pos == -1).all()


@pytest.mark.parametrize("window", [None, 40])
def test_a_full_state_grows_in_eager_mode(window):
    layer, x = Attention(32, 4, 2, window=window).double(), torch.randn(2, 90, 32).double()
    state, ys = layer.init_state(2, 3), []
    with torch.no_grad():
        for token in x.unbind(1):
            ys.append(layer.step(token, state))
    assert worst(torch.stack(ys, 1), layer(x)) < 1e-9
    assert state.k.shape[1] == 40 if window else 90 <= state.k.shape[1] < 180


def test_rows_of_different_length_decode_side_by_side():
    layer, x = Attention(32, 4, 2, window=6, d_conv=3).double(), torch.randn(3, 20, 32).double()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :5], mask[2, :8] = 0, 0
    seq, state = Seq.from_mask(mask), layer.init_state(3, 20)
    with torch.no_grad():
        _, state = layer(seq.align(x[:, :9]), state, seq, return_state=True)
        for token in x[:, 9:].unbind(1):
            y = layer.step(token, state)
        for row, skip in enumerate((0, 5, 8)):
            assert worst(y[row], layer(x[row : row + 1, skip:])[0, -1]) < 1e-9


@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("skips", [(0, 0), (3, 0)])
def test_long_pieces_need_no_mask_where_all_rows_are_as_far(kv, skips, monkeypatch):
    asked = []
    monkeypatch.setattr(attend, "_is_much", lambda q: q.shape[1] >= 8)
    monkeypatch.setattr(attend, "behind", lambda q, k, plain=attend.behind: asked.append(k.shape[1]) or plain(q, k))
    layer, x = Attention(32, 4, kv).double(), torch.randn(2, 40, 32).double()
    mask = torch.ones(2, 12, dtype=torch.long)
    for row, skip in enumerate(skips):
        mask[row, :skip] = 0
    seq = Seq.from_mask(mask)
    with torch.no_grad():
        first = x[:, :12] if seq is None else seq.align(x[:, :12])
        _, state = layer(first, layer.init_state(2, 64), seq, return_state=True)
        ys = []
        for piece in x[:, 12:].split([8, 13, 7], 1):
            y, state = layer(piece, state, return_state=True)
            ys.append(y)
        for row, skip in enumerate(skips):
            assert worst(torch.cat(ys, 1)[row], layer(x[row : row + 1, skip:])[0, 12 - skip :]) < 1e-9
    assert asked == ([20, 33] if skips == (0, 0) else [])


def test_a_state_can_be_reordered_and_copied():
    layer, x = Attention(32, 4, 2, d_conv=2).double(), torch.randn(3, 6, 32).double()
    state = layer(x[:, :5], return_state=True)[1]
    rows = torch.tensor([2, 0, 0])
    reordered = map_state(state, lambda t: t[rows])
    static = layer.init_state(3, 8)
    copy_state(static, state)
    with torch.no_grad():
        want = layer(x)[:, 5]
        assert worst(layer.step(x[rows, 5], reordered), want[rows]) < 1e-9
        assert worst(layer.step(x[:, 5], static), want) < 1e-9


def test_a_state_without_a_known_bound_asks_for_its_length():
    layer, x = Attention(32, 4, 2).double(), torch.randn(2, 30, 32).double()
    with torch.no_grad():
        state = layer(x[:, :10], return_state=True)[1]
        state.bound = -1
        y, state = layer(x[:, 10:20], state, return_state=True)
        assert state.bound == 20
        state.bound = -1
        ys = [layer.step(token, state) for token in x[:, 20:].unbind(1)]
    assert worst(torch.cat([y, torch.stack(ys, 1)], 1), layer(x)[:, 10:]) < 1e-9


def test_a_captured_graph_cannot_grow_a_state(monkeypatch):
    layer = Attention(32, 4, 2)
    state = layer(torch.randn(1, 4, 32), return_state=True)[1]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"all 4 slots.*init_state\(batch, max_len\)"):
        layer.step(torch.randn(1, 32), state)


def test_compiled_steps_equal_eager_steps():
    layer, x = Attention(32, 4, 2, window=5), torch.randn(2, 8, 32)
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    states = layer.init_state(2, 8), layer.init_state(2, 8)
    with torch.no_grad():
        for token in x.unbind(1):
            assert worst(step(token, states[0]), layer.step(token, states[1])) < 1e-5
