"""The CUDA convolution and the kernels of one token compile without a GPU, and fit their registers."""

import os
import re

import pytest
import torch

from hybridzoo.kernels import cuda_conv, cuda_update, nvrtc

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install 'hybridzoo[cuda]'")

exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes of NVRTC; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
# no thread may have more than this many bytes of registers spilled to memory
SPILLS = 64
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def convolution(dtype, wide, k, backward, packed=False, aligned=16):
    strides = (2048 * 3072, 3072, 1)
    signature = (dtype, wide, (8, 2048, 3072), k, strides, (0, 0), strides, aligned, packed, True)
    name = "conv_backward" if backward else "conv_forward"
    return "conv.cu", name + cuda_conv.plan(signature, 132, backward).arguments


def convolution_step(types, k, aligned=16):
    return "update.cu", cuda_update._conv_launch(types, aligned, (1, 1536, k, True, False, 1), (1536, 4608, 1536))[1]


def state_step(types, k, n, one_A, aligned=(16, 16), b=64):
    sizes = (b, 1536, n, 24 if one_A else 1536, 1)
    strides = (1536 * n, 1536, 1536, n, n, n, n, 1536, 0, 0)
    options = (True, True, False, 64)
    scan = cuda_update.Scan(types, k, sizes, strides, aligned, one_A, (1, 0), options, (0.0, 1.0))
    return "update.cu", cuda_update._scan_launch(scan, 132)[1]


USUAL = [
    *(convolution(BF16, wide, 4, backward) for wide in (BF16, F32) for backward in (False, True)),
    *(convolution(F32, F32, k, backward, k > 4) for k in (4, 8) for backward in (False, True)),
    convolution(BF16, F32, 4, True, packed=True),
    convolution(BF16, F32, 8, True, packed=True, aligned=1),
    ("conv.cu", "conv_sum<bf16>"),
    convolution_step((BF16,) * 3, 4),
    state_step((BF16,) * 3, 0, 16, False, b=256),
    state_step((BF16,) * 3, 0, 16, False, b=1),
    state_step((BF16,) * 3, 0, 128, True),
    state_step((BF16,) * 3, 4, 128, True),
    state_step((F16, F32, F32), 8, 250, False, aligned=(1, 1)),
]


def resources(source, name, arch):
    _, code, log = nvrtc.compile_source(source, name, arch, "--ptxas-options=-v")
    assert code.startswith(b"\x7fELF")
    # the log is about every kernel of the source that was compiled; the one asked for comes with its own lines
    base = name.split("<")[0]
    part = next(p for p in log.split("Compiling entry function")[1:] if base in p)
    registers, spilled = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
    return int(registers[1]), int(spilled[1])


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
@pytest.mark.parametrize("kernel", [USUAL[0], USUAL[-2]], ids=lambda k: k[1])
def test_kernels_compile_for_every_architecture_we_claim(kernel, arch):
    assert resources(*kernel, arch)[1] <= SPILLS


@pytest.mark.parametrize("kernel", USUAL, ids=lambda k: k[1])
def test_usual_kernels_fit_their_registers(kernel, record_property):
    registers, spilled = resources(*kernel, "sm_90")
    record_property("registers", registers)
    record_property("spilled bytes", spilled)
    assert spilled <= SPILLS


@exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_instance_of_convolutions_and_steps_compiles(dtype, arch):
    kernels = {
        *(
            convolution(dtype, wide, k, backward, packed, aligned)
            for wide in (dtype, F32)
            for k in cuda_conv.WIDTHS
            for backward in (False, True)
            for packed in (False, True)
            for aligned in (16, 8, 1)
        ),
        *(
            convolution_step((dtype, s, w), k, a)
            for s in (dtype, F32)
            for w in (dtype, F32)
            for k in cuda_conv.WIDTHS
            for a in (16, 1)
        ),
        *(
            state_step((dtype, dtype, wide), k, n, one_A, aligned)
            for wide in (dtype, F32)
            for n in (*cuda_update.LANES, 3)
            for k, one_A in ((0, False), (0, True), *((k, True) for k in cuda_conv.WIDTHS))
            for aligned in ((16, 16), (16, 1))
        ),
    }
    spilled = {kernel: resources(*kernel, arch)[1] for kernel in sorted(kernels)}
    assert not {kernel: size for kernel, size in spilled.items() if size > SPILLS}
