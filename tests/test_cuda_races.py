"""No race in the kernels of the scans: the thread sanitizer watches them on the CPU (tests/emulator), every thread of a block for one of its own.

compute-sanitizer's racecheck, which watches the other kernels on a GPU (tests/gpu/test_sanitizer.py), takes two groups of warps that hand
tiles to and fro, one arriving at a barrier that the other waits at, for a race.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import importlib.util, sys
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("emulator", sys.argv[1])
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)
emulator.FLAGS += sys.argv[2:]
from hybridzoo.kernels.gpu import nvrtc
from hybridzoo.kernels.scan import cuda_paths, launches
from hybridzoo.kernels.scan.inputs import ScanInputs
from hybridzoo.kernels.scan.operands import ScanOperands
from hybridzoo.kernels.scan.shapes import FORWARD, Cut
from hybridzoo.kernels.ssd import cuda as ssd_cuda, cuda_backward as ssd_cuda_backward
from hybridzoo.kernels.ssd.inputs import SsdInputs, SsdOptions
nvrtc.launch = emulator.launch
def operands(l, d, n):
    wide, narrow = ([torch.randn(1, l, w).bfloat16() for _ in range(k)] for w, k in ((d, 3), (n, 2)))
    u, dt, z, (B, C) = *wide, (x.view(1, l, 1, n) for x in narrow)
    return u, dt, -torch.rand(d, n), B, C, torch.randn(d), z, torch.randn(d), torch.randn(1, d, n)
def straight(broken):
    reset = (torch.arange(70) % 7 == 3)[None]
    for shape in FORWARD[16][-2:-1] if broken else FORWARD[16]:
        call = ScanOperands.of(ScanInputs(*operands(70, 32, 16), reset, None), True)
        out, last, saved = launches.forward(call, True, shape, 1)
    if not broken:
        launches.forward(call, True, shape, 2)
        u, dt, *rest = operands(70, 32, 16)
        formed = ScanOperands.of(ScanInputs(u, dt[..., :12], *rest, reset, None, torch.randn(32, 12).bfloat16()), True)
        for shape in FORWARD[16][1:3]:
            launches.forward(formed, True, shape, 2)
        into = torch.empty_like(out)
        launches.backward(call, torch.ones_like(out), torch.ones_like(last), saved, chunks=Cut(0, 2, 64, 32), out=into)
def walks():
    # of a forward in turn, of a backward side by side
    u, dt, A, B, C, D, z, bias, state = operands(70, 32, 1)
    dt, A, B, C, D, bias, state = (torch.stack([x, x]) for x in (dt, A, B, C, D, bias, state))
    i, paths = ScanInputs(u, dt, A, B, C, D, z, bias, state), [10, 7, 7, 1, 0, 7, 10, 1, 7, 1]
    out, last, saved = cuda_paths.forward(i, True, paths, True)
    cuda_paths.backward(i, True, paths, out, last, saved)
def dual():
    # two stages of tiles and one; what a segment leaves, and the outputs
    (x, z), (B, C) = torch.randn(2, 1, 200, 1, 32).bfloat16(), torch.randn(2, 1, 200, 1, 32).bfloat16()
    i = SsdInputs(x, torch.randn(1, 200, 1), -torch.rand(1), B, C, torch.randn(1), z, reset=(torch.arange(200) % 70 == 9)[None])
    # and what groups of warps multiply together
    (y, w), (E, F) = torch.randn(2, 1, 200, 1, 64).bfloat16(), torch.randn(2, 1, 200, 1, 64).bfloat16()
    j = SsdInputs(y, torch.randn(1, 200, 1), -torch.rand(1), E, F, torch.randn(1), w)
    for each, space, processors in ((i, 228, 1), (i, 60, 5), (j, 228, 1), (j, 100, 5)):
        ssd_cuda.shared_memory, ssd_cuda.processors = lambda device: space << 10, lambda device: processors
        ssd_cuda.forward(each, SsdOptions(True), True)
def dual_backward():
    ssd_cuda.processors = ssd_cuda_backward.processors = lambda device: 1
    reset = (torch.arange(70) % 40 == 13)[None]
    # the last are what groups of warps multiply together
    cases = ((torch.bfloat16, False, 32), (torch.float16, True, 32), (torch.float32, True, 32), (torch.bfloat16, False, 64), (torch.bfloat16, True, 64))
    for dtype, gate, p in cases:
        x, z = torch.randn(2, 1, 70, 2, p).to(dtype)
        dt, B, C = (torch.randn(1, 70, *size).to(dtype) for size in ((2,), (1, p), (1, p)))
        A, D, bias, state = -torch.rand(2), torch.randn(2), torch.randn(2), torch.randn(1, 2, p, p)
        i = SsdInputs(x, dt, A, B, C, D, z if gate else None, bias, state, reset if gate and p == 32 else None)
        out, last, saved = ssd_cuda.forward(i, SsdOptions(True), True)
        ssd_cuda_backward.backward(i, SsdOptions(True), out, last, saved)
if "-DHZ_SSD" in sys.argv:
    dual()
elif "-DHZ_SSD_BACKWARD" in sys.argv:
    dual_backward()
elif "-DHZ_WALKS" in sys.argv:
    walks()
else:
    straight("-DHZ_WITHOUT_WAITS" in sys.argv)
print("done")
"""
HERE = Path(__file__).parent
exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)


def sanitized(*flags):
    library = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ has no thread sanitizer")
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, HERE / "emulator" / "emulator.py", "-fsanitize=thread", *flags],
        env={"PATH": "/usr/bin:/bin", "LD_PRELOAD": library, "TSAN_OPTIONS": "exitcode=66"},
        capture_output=True, text=True, timeout=280, cwd="/",
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-DHZ_WALKS",),
        ("-DHZ_WITHOUT_WAITS",),
        pytest.param(("-DHZ_SSD",), marks=exhaustive),
        pytest.param(("-DHZ_SSD_BACKWARD",), marks=exhaustive),
    ],
    ids=["as they are", "walks", "without waiting", "ssd", "ssd backward"],
)
def test_the_sanitizer_finds_a_race_where_nobody_waits_and_nowhere_else(flags):
    done = sanitized(*flags)
    said = (done.stdout + done.stderr)[-3000:]
    assert "done" in done.stdout, said
    assert ("ThreadSanitizer: data race" in done.stderr) == ("-DHZ_WITHOUT_WAITS" in flags), said
