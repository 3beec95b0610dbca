"""compute-sanitizer finds nothing in our kernels: no access out of bounds (memcheck), no race in shared memory (racecheck).

The scan's forward is left out of racecheck, which takes a textbook ring of two buffers, with a barrier that one side arrives at and the
other waits at, for a race; the thread sanitizer watches it on the CPU (tests/test_cuda_races.py).
"""

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# small, odd, and between them every kernel: one block and several, a split length, documents, groups, few and many states
PROGRAM = """
import torch
from hybridzoo.kernels import HeadNorm, ScanNorms, Seq, StepConv, StepNorm, branch_layer_norm, branch_rms_norm, causal_conv1d, cross_entropy
from hybridzoo.kernels import gated_rms_norm, selective_scan, selective_state_update, ssd, read_attention, step_attention, step_linear
from hybridzoo.kernels.scan import launches
from hybridzoo.kernels.scan.inputs import ScanInputs
from hybridzoo.kernels.scan.operands import ScanOperands
from hybridzoo.kernels.scan.shapes import Cut
from hybridzoo.kernels.step.take import TakenInputs, TakenKeys, TakenValues, take_rows
from hybridzoo.layers import Mamba, Mamba2
torch.manual_seed(0)
CASES = [(2, 65, 33, 16, 1, torch.float32), (1, 130, 72, 16, 3, torch.bfloat16), (2, 7, 8, 3, 1, torch.float16), (1, 70, 40, 100, 1, torch.bfloat16)]
for b, l, d, n, g, dtype in CASES:
    wide = [torch.randn(b, l, d).to(dtype).cuda() for _ in range(3)]
    narrow = [torch.randn(b, l, g, n).to(dtype).cuda() for _ in range(2)]
    A, D, bias, h0 = -torch.rand(d, n).cuda(), torch.randn(d).cuda(), torch.randn(d).cuda(), torch.randn(b, d, n).cuda()
    u, dt, z, B, C, A, D, bias, h0 = leaves = [x.requires_grad_() for x in (*wide, *narrow, A, D, bias, h0)]
    doc = (torch.arange(l) // 5).expand(b, l).contiguous().cuda()
    for seq in (None, Seq.from_documents(doc)):
        out, last = selective_scan(u, dt, A, B, C, D, z, dt_bias=bias, dt_softplus=True, initial_state=h0, seq=seq,
                                   return_final_state=True, backend="cuda")
        torch.autograd.grad([out, last], leaves, [torch.ones_like(out), torch.ones_like(last)])
    there_and_back = [(1, l, 0, 1, 0), (1, l, 0, 1, 1)]
    out = selective_scan(u, dt, A, B, C, D, z, dt_bias=bias, dt_softplus=True, paths=there_and_back, backend="cuda")
    torch.autograd.grad(out.sum(), leaves[:-1])
    for paths in (None, there_and_back):
        weight = torch.randn(d, 5).to(dtype).cuda().requires_grad_()
        out = selective_scan(u, dt[..., :5], A, B, C, D, z, dt_bias=bias, dt_weight=weight, dt_softplus=True, paths=paths, backend="cuda")
        torch.autograd.grad(out.sum(), (u, dt, weight))
    call = ScanOperands.of(ScanInputs(u, dt, A, B, C, D, z, bias, h0, None, None), True)
    out, last, saved = launches.forward(call, True, chunks=3)
    for cut in (3, Cut(b - 1, 1 + (l - 33) // 32, 64, 32) if l > 64 else 1):
        for into in (None, torch.empty_like(out)):
            launches.backward(call, torch.ones_like(out), torch.ones_like(last), saved, chunks=cut, out=into)
    for k in (2, 4, 7):
        weight, start = (torch.randn(*size).to(dtype).cuda() for size in ((d, k), (b, k - 1, d)))
        x = u.detach().requires_grad_()
        for seq in (None, Seq.from_documents(doc)):
            y = causal_conv1d(x, weight, None, initial_state=start, seq=seq, activation="silu", backend="cuda")
            torch.autograd.grad(y.sum(), x)
    wide = torch.randn(b, l, d).cuda().requires_grad_()
    h, same = branch_rms_norm(wide, torch.randn(d).cuda(), 1e-5, dtype, backend="cuda")
    h, same = branch_rms_norm(same, None, 1e-5, dtype, add=h, backend="cuda")
    gains = [torch.randn(d).cuda().requires_grad_() for _ in range(2)]
    h, same = branch_layer_norm(same, *gains, 1e-5, dtype, add=h, backend="cuda")
    torch.autograd.grad(h.sum() + same.sum(), wide)
for l, h, p, n, dtype in (
    (70, 2, 24, 33, torch.bfloat16), (130, 2, 64, 128, torch.float16), (200, 2, 64, 32, torch.float32), (700, 1, 40, 200, torch.bfloat16),
    (200, 2, 64, 100, torch.bfloat16),
):
    (x, z), (B, C) = torch.randn(2, 2, l, h, p).to(dtype).cuda(), torch.randn(2, 2, l, 1, n).to(dtype).cuda()
    dt, A, D, h0 = torch.randn(2, l, h).cuda(), -torch.rand(h).cuda(), torch.randn(h, p).cuda(), torch.randn(2, h, p, n).cuda()
    leaves = [m.requires_grad_() for m in (x, dt, A, B, C, D, z, h0)]
    doc = (torch.arange(l) // 50).expand(2, l).contiguous().cuda()
    for seq in (None, Seq.from_documents(doc)):
        out, last = ssd(x, dt, A, B, C, D, z, dt_softplus=True, initial_state=h0, seq=seq, return_final_state=True, backend="cuda")
        torch.autograd.grad([out, last], leaves, [torch.ones_like(out), torch.ones_like(last)])
        ssd(x, dt, A, B, C, D.mean(1), None, dt_softplus=True, seq=seq, backend="cuda").float().sum().backward()
for layer in (Mamba(64).cuda(), Mamba2(64, headdim=16).cuda()):
    with torch.no_grad():
        state = layer.init_state(3)
        for _ in range(2):
            layer.step(torch.randn(3, 64).cuda(), state)
# a decode step's products and what is between them, in several tiles and splits
with torch.no_grad():
    half = lambda *size: torch.randn(*size).bfloat16().cuda()
    for b in (1, 3, 20):
        x, gain = torch.randn(b, 264).cuda(), half(264)
        behind = StepConv(5, half(b, 3, 3000), half(3000, 4), half(3000))
        step_linear(x, half(4000, 264), half(4000), norm=StepNorm(gain, 1e-5), conv=behind, backend="cuda")
        step_linear(half(b, 264), half(4000, 264), activation="gelu", gated=True, backend="cuda")
        norm = StepNorm(gain, 1e-5, gate=half(b, 264), group_size=132)
        step_linear(half(b, 264), half(70, 264), norm=norm, residual=torch.randn(b, 70).cuda(), backend="cuda")
        gated_rms_norm(half(b, 264), half(b, 264), gain, 1e-5, backend="cuda")
        for norms in (None, ScanNorms(1e-6)):
            state, u, low, narrow = torch.randn(b, 70, 16).cuda(), half(b, 70), half(b, 24), half(b, 16)
            selective_state_update(state, u, low, torch.rand(70, 16).cuda(), narrow, narrow, z=u, dt_weight=half(70, 24), norms=norms,
                                   log_rates=True, dt_softplus=True, backend="cuda")
        k, length = half(2, b, 700, 2, 64), torch.randint(0, 1400, (b,)).cuda()
        last = length[:, None] - 1
        pos = (last - (last - torch.arange(700).cuda()) % 700).clamp(min=-1)
        step_attention(half(b, 10 * 64), *k, pos, length, nheads=6, window=600, frequency=torch.rand(32).cuda(), backend="cuda")
        # some rows have no slot left, some tokens are padding
        length, counts = torch.randint(0, 705, (b,)).cuda(), torch.randint(0, 6, (b,)).cuda()
        read_attention(half(b, 5, 10 * 64), *k, length, counts, nheads=6, frequency=torch.rand(32).cuda(), backend="cuda")
        read_attention(half(b, 5, 11 * 72), *half(2, b, 700, 1, 72), length, counts, nheads=9, norm=HeadNorm(1e-5), backend="cuda")
# what tokens have left behind, of every kind
for dtype, d in ((torch.bfloat16, 9), (torch.float32, 64)):
    values, filters = torch.randn(2, 3, 1030, d).to(dtype).cuda(), torch.randn(2, 3, 5, d).to(dtype).cuda()
    cache, pos = torch.randn(2, 3, 20, 2, d).to(dtype).cuda(), torch.arange(20).expand(3, 20).contiguous().cuda()
    for rows in (True, False):
        keys = TakenKeys(*cache, pos, torch.tensor([0, 7, 18]).cuda())
        what = [TakenValues(*values), TakenInputs(filters[0, :, :3].contiguous(), filters[1]), keys]
        take_rows(what * 20, torch.tensor([rows, True, rows]).cuda(), torch.tensor([5, 1, 4]).cuda(), backend="cuda")
# forward and backward of a layer as one node of autograd
with torch.autocast("cuda", torch.bfloat16):
    Mamba(33, bcdt_norm=True).cuda()(torch.randn(2, 65, 33).cuda()).sum().backward()
    for options in ({}, {"norm_before_gate": True, "ngroups": 3}, {"rmsnorm": False}):
        Mamba2(33, headdim=11, d_state=20, **options).cuda()(torch.randn(2, 65, 33).cuda()).sum().backward()
for v, dtype in ((1, torch.float32), (257, torch.bfloat16), (9001, torch.float16), (60001, torch.float32)):
    logits, targets = torch.randn(5, v).to(dtype).cuda(), torch.tensor([0, v - 1, -100, v, v // 2]).cuda()
    for want_gradient in (True, False):
        cross_entropy(logits, targets, want_gradient=want_gradient, backend="cuda")
torch.cuda.synchronize()
print("done")
"""
# all but scan_forward
KERNELS = (
    "scan_backward",
    "sum_partials",
    "conv_",
    "norm_",
    "cross_entropy",
    "state_update",
    "few_rows",
    "gated_norm",
    "attend_",
    "ssd_",
    "take_rows",
)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    # an allocation of its own for every tensor, so that one byte too far is seen
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # cuda-bindings asks the driver for functions that it may not have, which is no error of ours
    own = ["--report-api-errors", "no"] if tool == "memcheck" else [f"--kernel-name=kns={name}" for name in KERNELS]
    done = subprocess.run(
        [sanitizer, "--tool", tool, *own, "--error-exitcode", "9", "--print-limit", "5", sys.executable, "-c", PROGRAM],
        env=env, capture_output=True, text=True, timeout=280, cwd="/",
    )  # fmt: skip
    said = (done.stdout + done.stderr)[-4000:]
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not know this device")
    assert done.returncode == 0 and "done" in done.stdout, said
    assert "0 errors" in said or "0 hazards" in said, said
