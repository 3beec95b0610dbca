"""Attention over a cache, of one token and of several: PyTorch operations against the layer's own and one token after the other, and the
kernels on the CPU thread by thread (tests/emulator) against float64."""

import shutil

import pytest
import torch

from hybridzoo.kernels import BackendError, HeadNorm, read_attention, step_attention
from hybridzoo.kernels.attend import cuda, plain
from hybridzoo.kernels.attend.inputs import ReadAttention, StepAttention
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


def several(lengths, counts, w, h=4, h_kv=2, p=64, cap=40, dtype=BF16, **more):
    b, lengths, counts = len(lengths), torch.tensor(lengths), torch.tensor(counts)
    k, v = (torch.randn(2, b, cap, h_kv, p) + 0.5).to(dtype)
    # what stands behind a row's tokens must not matter, but that a row of none sees a slot
    empty = torch.arange(cap) >= torch.where(counts == 0, lengths.clamp(min=1), lengths)[:, None]
    k[empty], v[empty] = float("nan"), float("inf")
    qkv = torch.randn(b, w, (h + 2 * h_kv) * p).to(dtype)
    # and what padding holds, neither
    qkv[torch.arange(w) >= counts[:, None]] = float("nan")
    return ReadAttention(qkv, k, v, lengths, counts, h, **more)


def copied(i, make=torch.clone):
    """The same with states of its own."""
    norm = None if i.norm is None else HeadNorm(i.norm.eps, *(make(m) for m in i.norm[1:]))
    return i._replace(qkv=make(i.qkv), k=make(i.k), v=make(i.v), norm=norm)


def bits(x):
    return x.view(torch.int16)


SEVERAL = {
    "plain": dict(lengths=(30, 3), counts=(5, 2), w=5),
    "one": dict(lengths=(7, 0, 9), counts=(1, 1, 0), w=1, frequency=frequencies(64)),
    "sixteen": dict(lengths=(20, 0, 5), counts=(16, 7, 0), w=16, frequency=frequencies(64), scale=0.3),
    "in splits, of three heads each": dict(lengths=(254, 550), counts=(4, 5), w=5, h=6, cap=600),
    "into the next warp's slots, and the next turn's": dict(lengths=(14, 62, 30), counts=(5, 5, 4), w=5, cap=100),
    "in chunks of heads": dict(lengths=(37, 3), counts=(2, 3), w=3, h=20, h_kv=1, p=24, frequency=frequencies(16)),
    "the first tokens": dict(lengths=(0, 0), counts=(3, 0), w=4, interleaved=True, frequency=frequencies(64)),
    "no slot is left": dict(lengths=(38, 40, 36), counts=(5, 4, 5), w=5, frequency=frequencies(64)),
    "more tokens than slots": dict(lengths=(0, 1), counts=(5, 4), w=5, cap=3),
    "normed": dict(lengths=(9, 30), counts=(4, 1), w=4, p=32, dtype=F16, frequency=frequencies(32), key_multiplier=0.5, norm=True),
    "more splits than are read at once": dict(lengths=(4690, 1500), counts=(2, 2), w=2, h=1, h_kv=1, p=16, cap=4700, dtype=F16),
    "as many heads as a block has": dict(lengths=(147, 64), counts=(3, 2), w=3, h=8, h_kv=1, p=256, cap=150, scale=1.0),
    "no whole number of halves": dict(lengths=(33, 39), counts=(6, 1), w=6, h=2, h_kv=1, p=136, frequency=frequencies(136)),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("case", SEVERAL.values(), ids=SEVERAL)
def test_several_tokens_against_float64(case, emulated):
    case = dict(case)
    if case.pop("norm", False):
        case["norm"] = HeadNorm(1e-6, *torch.rand(2, 32).add(0.5).to(F16))
    i = several(**case)
    assert cuda.misfit(i) is None
    exact, before, length = copied(i, torch.Tensor.double), copied(i), i.length.clone()
    got, want = cuda.read_attention(i), plain.read_attention(exact)
    assert got.isfinite().all() and got.dtype == i.qkv.dtype and torch.equal(i.length, length)
    real = torch.arange(i.qkv.shape[1]) < i.counts[:, None]
    assert (got.double() - want)[real].norm() <= 4 * UNIT[got.dtype] * want[real].norm()
    slots = torch.arange(i.k.shape[1])
    is_new = (slots >= length[:, None]) & (slots < (length + i.counts)[:, None])
    for a, b, old in ((i.k, exact.k, before.k), (i.v, exact.v, before.v)):
        assert (a.double() - b)[is_new].norm() <= 2 * UNIT[a.dtype] * b[is_new].norm()
        assert torch.equal(bits(a)[~is_new], bits(old)[~is_new])


@needs_compiler
def test_a_rows_bits_depend_neither_on_the_others_nor_on_padding(emulated):
    i = several((280, 3, 120), (2, 0, 5), 5, h=6, cap=300, frequency=frequencies(64))
    # rows and tokens may lie apart
    wider = torch.full((1, 11, 2 * i.qkv.shape[-1]), float("nan"), dtype=BF16)
    wider[:, :10:2, : i.qkv.shape[-1]] = i.qkv[2:]
    alone = i._replace(qkv=wider[:, ::2, : i.qkv.shape[-1]], k=i.k[2:].clone(), v=i.v[2:].clone())
    alone = alone._replace(length=i.length[2:].clone(), counts=i.counts[2:].clone())
    assert alone.qkv.shape[1] == 6
    assert torch.equal(cuda.read_attention(i)[2:], cuda.read_attention(alone)[:, :5])
    assert torch.equal(bits(alone.k), bits(i.k[2:])) and torch.equal(bits(alone.v), bits(i.v[2:]))


@needs_compiler
def test_several_tokens_are_one_after_the_other(emulated):
    i = several((300, 11, 0), (4, 4, 4), 4, h=6, cap=310, key_multiplier=0.5, frequency=frequencies(64))
    pos = torch.where((slots := torch.arange(310)) < i.length[:, None], slots, -1)
    step = StepAttention(i.qkv[:, 0], i.k.clone(), i.v.clone(), pos, i.length.clone(), 6, None, None, *i[7:])
    together = cuda.read_attention(i)
    for t, qkv in enumerate(i.qkv.unbind(1)):
        y = cuda.step_attention(step._replace(qkv=qkv))
        assert (together[:, t].double() - y.double()).norm() <= 2 * UNIT[BF16] * y.double().norm()
    assert torch.equal(bits(i.k), bits(step.k)) and torch.equal(bits(i.v), bits(step.v))


@needs_compiler
def test_what_is_not_finite_stays_in_its_row_and_behind_it(emulated):
    i = several((180, 190, 150), (3, 3, 3), 3, cap=200)
    other = copied(i)
    # in one key head of one row; a token's query; a token's value
    other.k[1, 150, 0], other.qkv[2, 1, :64], other.qkv[0, 2, -64:] = float("nan"), float("nan"), float("inf")
    clean, marred = (cuda.read_attention(m).view(3, 3, 4, 64) for m in (i, other))
    assert torch.equal(clean[1, :, 2:], marred[1, :, 2:]) and marred[1, :, :2].isnan().all()
    changed = (clean[2] != marred[2]).any(-1)
    assert changed.nonzero().tolist() == [[1, 0]]
    assert torch.equal(clean[0, :, :2], marred[0, :, :2])
    # the blocks that came last left the counters as they found them
    assert not any(cuda.tickets(m.k, (3, 5)).any() for m in (i, other))


def test_launches_of_another_form_leave_a_graph_its_counters():
    k = torch.zeros(2, 3)
    first, second = cuda.tickets(k, (2, 3)), cuda.tickets(k, (2, 5))
    assert second.shape == (2, 5) and cuda.tickets(k, (2, 3)) is first and cuda.tickets(k, (2, 5)) is second


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(frequency=frequencies(16).double(), scale=0.3),
        dict(frequency=frequencies(32).double(), interleaved=True, key_multiplier=0.5),
        dict(norm=HeadNorm(1e-6, *torch.rand(2, 32).double())),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_the_definition_is_one_token_after_the_other(options):
    i = several((7, 0, 3, 10), (4, 5, 0, 2), 5, p=32, cap=12, dtype=torch.float64, **options)
    k, v = i.k.clone(), i.v.clone()
    y = read_attention(*i[:5], nheads=4, **options)
    assert y.isfinite().all()
    for row, (length, count) in enumerate(zip(i.length.tolist(), i.counts.tolist(), strict=True)):
        # of one token the definition takes empty slots' numbers times zero
        mine = [m[row : row + 1].clone() for m in (k, v)]
        for m in mine:
            m[:, length:] = 0
        pos = torch.where((slots := torch.arange(12)) < length, slots, -1)[None]
        at = i.length[row : row + 1].clone()
        for t in range(count):
            want = step_attention(i.qkv[row : row + 1, t], *mine, pos, at, nheads=4, **options)
            torch.testing.assert_close(y[row : row + 1, t], want)
        for cache, before, m in ((i.k, k, mine[0]), (i.v, v, mine[1])):
            torch.testing.assert_close(cache[row, : length + count], m[0, : length + count])
            assert torch.equal(
                cache[row, length + count :].view(torch.int64), before[row, length + count :].view(torch.int64)
            )


def test_the_definition_asks_the_device_nothing():
    i = several((7, 0), (2, 1), 2, frequency=frequencies(64))
    tensors = [m.to("meta") for m in i[:5]]
    y = read_attention(*tensors, nheads=4, frequency=i.frequency.to("meta"))
    assert y.shape == (2, 2, 256) and y.dtype == BF16


def test_what_does_not_fit_of_several_tokens_is_named():
    i = several((7, 0), (2, 1), 2)
    with pytest.raises(ValueError, match=r"qkv has 2 dimensions, expected 3 \(b, w, \(h \+ 2 h_kv\) p\)"):
        read_attention(i.qkv[:, 0], *i[1:5], nheads=4)
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 2, 512\), expected \(2, 2, 640\)"):
        read_attention(*i[:5], nheads=6)
    with pytest.raises(ValueError, match=r"counts has shape \(1,\), expected \(2,\)"):
        read_attention(*i[:4], i.counts[:1], nheads=4)
    with pytest.raises(ValueError, match=r"counts has dtype torch.int32, expected torch.int64"):
        read_attention(*i[:4], i.counts.int(), nheads=4)
    with pytest.raises(ValueError, match="w = 0 tokens and k has cap = 40 slots, expected one of each at least"):
        read_attention(i.qkv[:, :0], *i[1:5], nheads=4)
    with pytest.raises(BackendError, match="CUDA kernels need CUDA tensors, got cpu"):
        read_attention(*i[:5], nheads=4, backend="cuda")
