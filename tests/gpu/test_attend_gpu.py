"""Attention over a cache on a GPU, of one token and of several, at real sizes against float64, and as a graph."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hybridzoo.kernels.gpu import nvrtc

pytestmark = pytest.mark.gpu

# tests are no package, so the file is loaded by its path
_spec = importlib.util.spec_from_file_location("attend", Path(__file__).parents[1] / "test_cuda_attend.py")
_attend = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_attend)
cuda, plain = _attend.cuda, _attend.plain
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("b", "h", "h_kv", "p", "cap", "window"),
    [
        (1, 32, 8, 128, 4096, None),
        (3, 12, 12, 64, 1000, None),
        (8, 32, 4, 80, 2048, 2048),
        (64, 16, 16, 64, 640, None),
        (1, 16, 1, 256, 65536, None),
        (2, 40, 8, 128, 700, 300),
        (2, 40, 2, 96, 3000, None),
    ],
)
@torch.no_grad()
def test_against_float64(b, h, h_kv, p, cap, window, dtype):
    lengths = torch.randint(1, cap, (b,)).tolist()
    i = _attend.operands(b, h, h_kv, p, cap, lengths, dtype, window=window, frequency=_attend.frequencies(p))
    exact = _attend.exactly(i)
    for _ in range(3):
        got, want = cuda.step_attention(i), plain.step_attention(exact)
        assert (got.double() - want).norm() <= 4 * _attend.UNIT[dtype] * want.norm()
        assert torch.equal(i.pos, exact.pos) and torch.equal(i.length, exact.length)


@torch.no_grad()
def test_the_same_bits_apart_overlapping_and_as_a_graph(monkeypatch):
    i = _attend.operands(3, 32, 8, 128, 1000, [900, 20, 512], frequency=_attend.frequencies(128))
    kept = [m.clone() for m in i[1:5]]

    def run(overlap, take):
        monkeypatch.setattr(nvrtc, "OVERLAP", overlap)
        for m, k in zip(i[1:5], kept, strict=True):
            m.copy_(k)
        outs = [take().clone() for _ in range(20)]
        torch.cuda.synchronize()
        return [*outs, i.length.clone()]

    apart, overlapping = (run(overlap, lambda: cuda.step_attention(i)) for overlap in (False, True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.step_attention(i)
    recorded = run(True, lambda: graph.replay() or out)
    for other in (overlapping, recorded):
        assert all(torch.equal(a, b) for a, b in zip(apart, other, strict=True))


@torch.no_grad()
def test_a_rows_bits_do_not_depend_on_the_others():
    lengths = torch.randint(1, 2000, (64,)).tolist()
    i = _attend.operands(64, 32, 8, 128, 2048, lengths, frequency=_attend.frequencies(128))
    alone = i._replace(**{name: getattr(i, name)[5:6].clone() for name in ("qkv", "k", "v", "pos", "length")})
    for _ in range(20):
        assert torch.equal(cuda.step_attention(i)[5:6], cuda.step_attention(alone))
    # the blocks that came last left the counters as they found them
    assert not any(cuda.tickets(m.k, (len(m.k), 9)).any() for m in (i, alone))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("b", "w", "h", "h_kv", "p", "cap"),
    [
        (1, 16, 32, 8, 128, 4096),
        (3, 5, 12, 12, 64, 1000),
        (8, 8, 32, 4, 80, 2048),
        (16, 16, 16, 16, 64, 640),
        (1, 4, 16, 1, 256, 65536),
        (2, 1, 40, 8, 128, 700),
        (2, 7, 40, 2, 96, 3000),
    ],
)
@torch.no_grad()
def test_several_tokens_against_float64(b, w, h, h_kv, p, cap, dtype):
    # the last rows' slots may run out
    lengths, counts = torch.randint(1, cap, (b,)).tolist(), torch.randint(1, w + 1, (b,)).tolist()
    lengths[-1] = cap - 2
    i = _attend.several(lengths, counts, w, h, h_kv, p, cap, dtype, frequency=_attend.frequencies(p))
    exact = _attend.copied(i, torch.Tensor.double)
    real = torch.arange(w) < i.counts[:, None]
    got, want = cuda.read_attention(i), plain.read_attention(exact)
    assert got.isfinite().all()
    assert (got.double() - want)[real].norm() <= 4 * _attend.UNIT[dtype] * want[real].norm()
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        new = slice(length, length + count)
        for a, b in ((i.k, exact.k), (i.v, exact.v)):
            assert (a[row, new].double() - b[row, new]).norm() <= 2 * _attend.UNIT[dtype] * b[row, new].norm()
            assert not a[row, length + count :].isfinite().any()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@torch.no_grad()
def test_several_tokens_the_same_bits_apart_overlapping_and_as_a_graph(dtype, monkeypatch):
    i = _attend.several([900, 20, 512], [5, 2, 0], 5, 32, 8, 128, 1000, dtype, frequency=_attend.frequencies(128))
    kept = [m.clone() for m in i[:5]]
    inputs = torch.randn(20, *i.qkv.shape).to(dtype)

    def run(overlap, take):
        monkeypatch.setattr(nvrtc, "OVERLAP", overlap)
        for m, k in zip(i[:5], kept, strict=True):
            m.copy_(k)
        outs = []
        for x in inputs:
            i.qkv.copy_(x)
            outs.append(take().clone())
            # what has been read is there, and other rows have less padding
            i.length.add_(i.counts)
            i.counts.copy_((i.counts + 2) % 6)
        torch.cuda.synchronize()
        return [*outs, _attend.bits(i.k).clone(), _attend.bits(i.v).clone()]

    apart, overlapping = (run(overlap, lambda: cuda.read_attention(i)) for overlap in (False, True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.read_attention(i)
    # launches of another width must leave the graph its counters
    cuda.read_attention(_attend.copied(i)._replace(k=i.k, v=i.v, qkv=i.qkv[:, :3], counts=i.counts.clamp(max=3)))
    recorded = run(True, lambda: graph.replay() or out)
    for other in (overlapping, recorded):
        assert all(torch.equal(a, b) for a, b in zip(apart, other, strict=True))


@torch.no_grad()
def test_several_tokens_of_a_row_alone_and_one_after_the_other():
    lengths, counts = torch.randint(1, 2000, (24,)).tolist(), torch.randint(0, 9, (24,)).tolist()
    lengths[5], counts[5] = 1800, 8
    i = _attend.several(lengths, counts, 8, 32, 8, 128, 2048, frequency=_attend.frequencies(128))
    alone = i._replace(**{name: getattr(i, name)[5:6].clone() for name in ("qkv", "k", "v", "length", "counts")})
    slots = torch.arange(2048)[None]
    states = (alone.k.clone(), alone.v.clone(), torch.where(slots < 1800, slots, -1), alone.length.clone())
    step = _attend.StepAttention(alone.qkv[:, 0], *states, 32, frequency=i.frequency)
    steps = torch.stack([cuda.step_attention(step._replace(qkv=x)) for x in alone.qkv.unbind(1)], 1)
    for _ in range(20):
        together = cuda.read_attention(i)[5:6]
        assert torch.equal(together, cuda.read_attention(alone))
    assert (together.double() - steps.double()).norm() <= 2 * _attend.UNIT[BF16] * steps.double().norm()
    for a, b in ((alone.k, step.k), (alone.v, step.v)):
        assert torch.equal(_attend.bits(a), _attend.bits(b))
    # the blocks that came last left the counters as they found them
    assert not any(cuda.tickets(m.k, (len(m.k), 8 * 4 + 1)).any() for m in (i, alone))
