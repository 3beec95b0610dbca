"""SS2D on a GPU: the CPU's numbers, no more memory for four directions than for their parts, one graph, and recorded as one."""

import copy

import pytest
import torch

from hybridzoo.kernels import Seq, dispatch
from hybridzoo.layers import SS2D

pytestmark = pytest.mark.gpu

VANILLA = {"ssm_ratio": 2.0, "d_state": 16, "gate": True, "conv_bias": True}
# (b, h, w, d_model, options)
GRID = [
    (2, 1, 1, 16, {}),
    (2, 1, 57, 48, {}),
    (2, 57, 1, 48, VANILLA),
    (2, 14, 15, 96, {}),
    (2, 56, 55, 96, VANILLA),
    (2, 28, 28, 192, {"ssm_ratio": 2.0}),
    (2, 14, 14, 96, {"directions": 1}),
    (2, 14, 14, 96, {"directions": 2, "gate": True}),
    (2, 13, 14, 96, {"directions": ["window7-rows", "columns", "window2-columns-back"], "d_state": 8}),
    (1, 50, 84, 96, {"d_conv": 0, "out_norm": None}),
]


def made(b, h, w, d, options):
    torch.manual_seed(0)
    mixer = SS2D(d, **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer, torch.randn(b, h * w, d), torch.randn(b, h * w, d)


def run(mixer, x, weight, h, w):
    x = x.detach().requires_grad_()
    y = mixer(x, seq=Seq.from_grid((h, w), len(x), h * w, x.device))
    grads = torch.autograd.grad((y * weight.to(y)).sum(), [x, *mixer.parameters()])
    return [y.detach(), *grads]


def distances(got, want):
    return [((a.cpu().double() - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_outputs_and_gradients_are_the_cpus(case):
    _, h, w, *_ = case
    mixer, x, weight = made(*case)
    exact = run(copy.deepcopy(mixer).double(), x.double(), weight.double(), h, w)
    got = run(copy.deepcopy(mixer).cuda(), x.cuda(), weight.cuda(), h, w)
    # cuDNN takes TF32 for convolutions in float32
    assert max(distances(got, exact)) < 2e-3
    half = copy.deepcopy(mixer).cuda().bfloat16()
    again = [run(half, x.cuda().bfloat16(), weight.cuda(), h, w) for _ in range(2)]
    assert max(distances(again[0], exact)) < 0.06
    scan = {"device": "cuda", "dtype": torch.bfloat16, "d_state": mixer.d_state}
    assert dispatch.choose("selective_scan", **scan).name == dispatch.choose("paths", **scan).name == "cuda"
    # the output, whatever cuDNN's backward of the convolution adds up in
    assert torch.equal(again[0][0], again[1][0])


def test_under_autocast():
    b, h, w, d, options = 2, 14, 14, 96, VANILLA
    mixer, x, weight = made(b, h, w, d, options)
    exact = run(copy.deepcopy(mixer).double(), x.double(), weight.double(), h, w)
    with torch.autocast("cuda", torch.bfloat16):
        got = run(mixer.cuda(), x.cuda(), weight.cuda(), h, w)
    assert got[0].dtype == torch.bfloat16 and max(distances(got, exact)) < 0.06


def test_no_gathered_tokens_in_a_forward():
    h = w = 56
    peaks = []
    for k in (1, 4):
        mixer = SS2D(96, directions=k, device="cuda", dtype=torch.bfloat16)
        x, seq = torch.randn(16, h * w, 96, device="cuda").bfloat16(), Seq.from_grid((h, w), 16, h * w, "cuda")
        with torch.no_grad():
            mixer(x, seq=seq)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            mixer(x, seq=seq)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    whole = 16 * h * w * 96 * 2
    # three directions more: a sum in float32, and 24 numbers more at each token
    assert peaks[1] - peaks[0] < 3 * whole


def test_compiled_without_graph_breaks():
    mixer, x, weight = made(2, 14, 15, 96, VANILLA)
    mixer, x, weight = mixer.cuda(), x.cuda(), weight.cuda()
    want = run(mixer, x, weight, 14, 15)
    got = run(torch.compile(mixer, fullgraph=True), x, weight, 14, 15)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("options", [{}, VANILLA, {"directions": ["window7-rows", "columns-back"]}])
def test_recorded_as_a_graph(options):
    mixer, x, _ = made(2, 14, 14, 96, options)
    mixer, x, seq = mixer.cuda().bfloat16(), x.cuda().bfloat16(), Seq.from_grid((14, 14), 2, 196, "cuda")
    with torch.no_grad():
        want = mixer(x, seq=seq)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            mixer(x, seq=seq)
        torch.cuda.current_stream().wait_stream(side)
        graph, given = torch.cuda.CUDAGraph(), torch.zeros_like(x)
        with torch.cuda.graph(graph):
            y = mixer(given, seq=seq)
        given.copy_(x)
        graph.replay()
    assert torch.equal(y, want)
