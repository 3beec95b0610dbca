"""A million tokens through a small model on a GPU, in the memory of one chunk; attention to what was read before, without a mask."""

import time

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.layers import Attention, attend

pytestmark = pytest.mark.gpu
LONG = 2**20


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-130m"])
def test_a_million_tokens_take_two_gibibytes_beside_the_weights_and_are_read_as_fast(name):
    model = zoo.build(name, device="cuda", dtype=torch.bfloat16).eval()
    ids = torch.randint(0, model.cfg.vocab_size, (1, LONG), device="cuda")

    def seconds(length):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids[:, :length], 1)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds(2**14)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    long = seconds(LONG)
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30
    # 64 chunks, each as fast as one alone
    assert long < 1.5 * min(seconds(2**14) for _ in range(5)) * LONG / 2**14


@torch.no_grad()
@pytest.mark.parametrize("kv", [4, 16])
def test_attention_reads_pieces_behind_others_without_a_mask(kv, monkeypatch):
    masks = []
    monkeypatch.setattr(attend, "behind", lambda q, k, plain=attend.behind: masks.append(k.shape[1]) or plain(q, k))
    torch.manual_seed(0)
    layer = Attention(1024, 16, kv, rope=1e4, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 4 * 8192, 1024, device="cuda", dtype=torch.bfloat16)
    whole, ys, state = layer(x), [], layer.init_state(2, x.shape[1])
    for piece in x.split(8192, 1):
        y, state = layer(piece, state, return_state=True)
        ys.append(y)
    assert masks == [2 * 8192, 3 * 8192, 4 * 8192]
    assert (torch.cat(ys, 1) - whole).float().norm() < 1e-2 * whole.float().norm()
