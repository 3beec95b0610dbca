"""What tokens have left behind, taken over in some rows: in PyTorch operations, and by the CUDA kernel, run on the CPU thread by thread."""

import shutil

import pytest
import torch

from hybridzoo.kernels.step import take
from hybridzoo.kernels.step.take import TakenInputs, TakenKeys, TakenValues, take_rows

emulates = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
BF16, F32 = torch.bfloat16, torch.float32


def keys(length, cap=20, h_kv=2, p=8, ahead=0):
    b, slots = len(length), torch.arange(cap)
    k, v = torch.randn(2, b, cap, h_kv, p).to(BF16)
    length = torch.tensor(length)
    behind = slots >= length[:, None] + ahead
    k[behind], v[behind] = 0, 0
    return TakenKeys(k, v, torch.where(slots < length[:, None], slots, -1), length)


def things(b=3, w=5):
    """Of every kind one in every unit; what is read is a piece of something wider."""
    wide = torch.randn(b, w, 60).to(BF16)
    return [
        TakenValues(torch.randn(b, 7, 16), torch.randn(b, 7, 16)),
        TakenInputs(torch.randn(b, 3, 16).to(BF16), wide[..., 8:24]),
        TakenInputs(torch.randn(b, 1, 10).to(BF16), wide[..., 2:12]),
        TakenInputs(torch.randn(b, 7, 6), torch.randn(b, w, 6)),
        TakenInputs(torch.randn(b, 0, 6), torch.randn(b, w, 6)),
        TakenValues(torch.randn(b, 5).to(BF16), torch.randn(b, 5).to(BF16)),
        TakenValues(torch.randn(b, 1300, 4), torch.randn(b, 1300, 4)),
        keys([0, 11, 17], ahead=w),
        keys([18, 3, 0], ahead=w, p=7, h_kv=1),
    ]


def clones(what):
    return [type(x)(*(m.clone() if isinstance(x, TakenKeys) or not i else m for i, m in enumerate(x))) for x in what]


@emulates
@pytest.mark.parametrize("times", [1, 6])  # more than one launch has room for
def test_the_kernel_does_what_operations_do(emulated, times):
    torch.manual_seed(times)
    what, rows, counts = things() * times, torch.tensor([True, False, True]), torch.tensor([5, 4, 1])
    ways = clones(what), clones(what)
    assert take.misfit(ways[0]) is None
    take._plain(ways[0], rows, counts)
    take._cuda(ways[1], rows, counts)
    for x, y in zip(*ways, strict=True):
        for name, one, other in zip(x._fields, x, y, strict=True):
            assert torch.equal(one, other), (type(x), name)


@emulates
def test_a_row_that_read_nothing_stays(emulated):
    what = things()
    ways = clones(what), clones(what)
    rows, counts = torch.tensor([False, False, False]), torch.tensor([0, 0, 2])
    take._plain(ways[0], rows, counts)
    take._cuda(ways[1], rows, counts)
    for before, x, y in zip(what, *ways, strict=True):
        for name, old, one, other in zip(x._fields, before, x, y, strict=True):
            assert torch.equal(one, other), (type(x), name)
            same = slice(2) if name in "kv" else slice(None)
            assert torch.equal(one[same], old[same])


def test_states_go_on_where_the_tokens_end():
    inputs = TakenInputs(torch.tensor([[[1.0], [2], [3]]] * 2), torch.tensor([[[4.0], [5]]] * 2))
    values = TakenValues(torch.zeros(2, 1), torch.ones(2, 1))
    cache = keys([2, 4], ahead=2)
    before = cache.k.clone()
    take_rows([inputs, values, cache], torch.tensor([True, False]), torch.tensor([1, 2]))
    assert inputs.into.squeeze(-1).tolist() == [[2, 3, 4], [1, 2, 3]] and values.into.tolist() == [[1], [0]]
    assert cache.length.tolist() == [3, 4] and cache.pos[0, :4].tolist() == [0, 1, 2, -1]
    assert cache.pos[1].max() == 3 and not cache.k[1, 4:].any() and not cache.v[1, 4:].any()
    assert torch.equal(cache.k[0], before[0]) and torch.equal(cache.k[1, :4], before[1, :4])


def test_what_does_not_fit_is_refused():
    rows, counts = torch.tensor([True, False]), torch.tensor([1, 1])
    with pytest.raises(ValueError, match=r"take_rows: new has shape \(2, 4\), expected \(2, 3\)"):
        take_rows([TakenValues(torch.zeros(2, 3), torch.zeros(2, 4))], rows, counts)
    with pytest.raises(ValueError, match=r"take_rows: torch.float64 cannot be taken into a state of torch.float32"):
        take_rows([TakenValues(torch.zeros(2, 3), torch.zeros(2, 3).double())], rows, counts)
    with pytest.raises(ValueError, match=r"take_rows: rows and counts have dtypes torch.int64 and torch.int64"):
        take_rows([], counts, counts)
    assert "in one piece" in take.misfit([TakenValues(torch.zeros(3, 2).T, torch.zeros(2, 3))])
