"""One token's attention, in PyTorch operations against the layer's own, and on the CPU thread by thread (tests/emulator) against float64."""

import shutil

import pytest
import torch

from hybridzoo.kernels import HeadNorm, step_attention
from hybridzoo.kernels.attend import cuda, plain
from hybridzoo.kernels.attend.inputs import StepAttention
from hybridzoo.layers import Attention

BF16, F16 = torch.bfloat16, torch.float16
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
UNIT = {BF16: 2**-8, F16: 2**-11}


def operands(b=2, h=4, h_kv=2, p=64, cap=40, lengths=(37, 3), dtype=BF16, **more):
    k, v = (torch.randn(2, b, cap, h_kv, p) + 0.5).to(dtype)
    slots, lengths = torch.arange(cap), torch.tensor(lengths)
    end = lengths[:, None] - 1
    # the last position that falls on a slot, as the layer's state has it
    pos = (end - (end - slots) % cap).clamp(min=-1)
    # what stands in an empty slot must not matter
    k[pos < 0], v[pos < 0] = float("nan"), float("inf")
    return StepAttention((torch.randn(b, (h + 2 * h_kv) * p)).to(dtype), k, v, pos, lengths, h, **more)


def exactly(i):
    """The same in float64, with states of its own whose empty slots are zero."""
    empty = (i.pos < 0)[..., None, None]
    caches = [m.masked_fill(empty, 0).double() for m in (i.k, i.v)]
    norm = None if i.norm is None else HeadNorm(i.norm.eps, *(m.double() for m in i.norm[1:]))
    return i._replace(
        qkv=i.qkv.double(), k=caches[0], v=caches[1], pos=i.pos.clone(), length=i.length.clone(), norm=norm
    )


def frequencies(dim):
    return 10000.0 ** -(torch.arange(0, dim, 2) / dim)


CASES = {
    "plain": dict(),
    "in splits, of three heads each": dict(h=6, h_kv=2, cap=600, lengths=(550, 260)),
    "in chunks of heads": dict(h=6, h_kv=1, p=24, frequency=frequencies(16)),
    "a window that has come round": dict(cap=40, lengths=(100, 17), window=40, frequency=frequencies(64)),
    "a window less than the slots": dict(window=7, scale=0.3, interleaved=True, frequency=frequencies(64)),
    "normed": dict(p=32, dtype=F16, frequency=frequencies(32), key_multiplier=0.5, norm=True),
    "the first token": dict(lengths=(0, 0), frequency=frequencies(64)),
    "more splits than are read at once": dict(h=1, h_kv=1, p=16, cap=2200, lengths=(2190, 1500), dtype=F16),
    "as many heads as a block has": dict(h=8, h_kv=1, p=256, cap=150, lengths=(149, 64), scale=1.0),
    "no whole number of halves": dict(h=2, h_kv=1, p=136, lengths=(39, 39), frequency=frequencies(136)),
    "angles that float32 hardly tells apart": dict(lengths=(1 << 20, 3 << 18), frequency=frequencies(64)),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case, emulated):
    case = dict(case)
    if case.pop("norm", False):
        case["norm"] = HeadNorm(1e-6, *torch.rand(2, 32).add(0.5).to(F16))
    i = operands(**case)
    assert cuda.misfit(i) is None
    exact = exactly(i)
    for _ in range(2):
        got, want = cuda.step_attention(i), plain.step_attention(exact)
        assert got.isfinite().all() and got.dtype == i.qkv.dtype
        # queries and keys are rounded once more where they are normed or turned
        assert (got.double() - want).norm() <= 4 * UNIT[got.dtype] * want.norm()
        assert torch.equal(i.pos, exact.pos) and torch.equal(i.length, exact.length)
        seen = (i.pos >= 0)[..., None, None]
        for a, b in ((i.k, exact.k), (i.v, exact.v)):
            assert (torch.where(seen, a, 0).double() - b).norm() <= 2 * UNIT[a.dtype] * b.norm()


@needs_compiler
def test_a_rows_bits_do_not_depend_on_the_others(emulated):
    i = operands(3, cap=300, lengths=(280, 3, 120), frequency=frequencies(64))
    alone = StepAttention(*(m[1:2].clone() for m in i[:5]), *i[5:])
    assert torch.equal(cuda.step_attention(i)[1:2], cuda.step_attention(alone))
    assert torch.equal(alone.k[0, 3], i.k[1, 3])


@needs_compiler
def test_what_is_not_finite_stays_where_it_is(emulated):
    i = operands(2, cap=200, lengths=(180, 190), window=100)
    other = StepAttention(*(m.clone() for m in i[:5]), *i[5:])
    # behind the window, nowhere; before it, in one key head of one row
    other.k[:, :50], other.v[:, 50:80], other.k[1, 150, 0] = float("nan"), float("inf"), float("nan")
    clean, marred = (cuda.step_attention(m).view(2, 4, 64) for m in (i, other))
    assert torch.equal(clean[0], marred[0]) and torch.equal(clean[1, 2:], marred[1, 2:])
    assert marred[1, :2].isnan().all()
    # the blocks that came last left the counters as they found them
    assert not any(cuda.tickets(m.k, (2, 3)).any() for m in (i, other))


def test_what_does_not_fit_is_named():
    i = operands()
    options = dict(nheads=4)
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 512\), expected \(2, 640\)"):
        step_attention(i.qkv, *i[1:5], nheads=6)
    with pytest.raises(ValueError, match=r"length has dtype torch.int32, expected torch.int64"):
        step_attention(*i[:4], i.length.int(), **options)
    with pytest.raises(ValueError, match="frequency has 40 numbers, and heads of 64 channels have 32 pairs"):
        step_attention(*i[:5], **options, frequency=torch.ones(40))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(nheads_kv=2, window=5, qk_norm=True),
        dict(rotary_dim=8, rope_interleaved=True, key_multiplier=0.5, softmax_scale=0.3),
        dict(rope=None),
    ],
    ids=str,
)
@torch.no_grad()
def test_it_is_what_the_layer_does_between_its_projections(options):
    layer = Attention(64, nheads=4, **options)
    mine, state = (layer.init_state(2, 12) for _ in range(2))
    rope = options.get("rope", 10000.0)
    frequency = None if rope is None else 1.0 / rope ** (torch.arange(0, layer.rotary_dim, 2) / layer.rotary_dim)
    norm = HeadNorm(1e-6, layer.q_norm.weight, layer.k_norm.weight) if layer.q_norm is not None else None
    given = dict(nheads=4, scale=layer.softmax_scale, window=layer.window, frequency=frequency, norm=norm)
    given |= dict(interleaved=layer.rope_interleaved, key_multiplier=layer.key_multiplier)
    for x in torch.randn(12, 2, 64):
        y = step_attention(layer.in_proj(x), mine.k, mine.v, mine.pos, mine.length, **given)
        torch.testing.assert_close(layer.out_proj(y), layer.step(x, state))
        for (_, a), (_, b) in zip(mine.tensors(), state.tensors(), strict=True):
            torch.testing.assert_close(a, b)


def test_launches_of_another_form_leave_a_graph_its_counters():
    k = torch.zeros(2, 3)
    first, second = cuda.tickets(k, (2, 3)), cuda.tickets(k, (2, 5))
    assert second.shape == (2, 5) and cuda.tickets(k, (2, 3)) is first and cuda.tickets(k, (2, 5)) is second
