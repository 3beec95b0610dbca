"""The CUDA sources compile without a GPU, and the compiler's work is kept."""

import os
import re
import subprocess
import sys

import pytest
import torch

from hybridzoo.kernels.conv import cuda as cuda_conv
from hybridzoo.kernels.few import cuda as cuda_few
from hybridzoo.kernels.gpu import nvrtc
from hybridzoo.kernels.gpu.operands import RESET, UNALIGNED
from hybridzoo.kernels.loss import cuda as cuda_loss
from hybridzoo.kernels.norm import cuda as cuda_norm
from hybridzoo.kernels.norm import gated_cuda
from hybridzoo.kernels.norm.cuda import CENTRED
from hybridzoo.kernels.scan.launches import CUT, LOW_RANK, NARROW, OUTPUTS, WALK
from hybridzoo.kernels.scan.shapes import ADJOINT, BACKWARD, FORWARD, FULL, PAIRS, STATE
from hybridzoo.kernels.ssd import cuda as cuda_ssd
from hybridzoo.kernels.step import cuda as cuda_update

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install 'hybridzoo[cuda]'")

exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes of NVRTC; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
# no thread may have more than this many bytes of registers spilled to memory
SPILLS = 64
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def forward(element, n, mode, flags, which=0):
    s = FORWARD[n][which]
    sizes = f"{s.nc}, {s.ns}, {s.ln}, {s.ch}, {s.tt}, {s.nh}, {BACKWARD[n].k}, {mode}, {flags}, {s.blocks}"
    return "scan_forward.cu", f"scan_forward<{element}, {sizes}>"


def pair(element, flags):
    (p,) = PAIRS[16]
    lanes = ", ".join(f"{s.ns}, {s.ln}, {s.ch}, {s.tt}" for s in (p.first, p.second))
    sizes = f"{p.first.nc}, {p.first.nh}, {lanes}, {BACKWARD[16].k}, {flags}"
    return "scan_forward.cu", f"scan_forward_two<{element}, {sizes}>"


def backward(element, n, flags):
    s = BACKWARD[n]
    return (
        "scan_backward.cu",
        f"scan_backward<{element}, {s.ns}, {s.ln}, {s.ch}, {s.warps}, {s.k}, {s.ts}, {flags}, {s.blocks}>",
    )


def walked(element, n, flags):
    source, name = backward(element, n, flags)
    return source, name.replace("<", "_walks<", 1)


def in_turn(element, n, flags):
    source, name = forward(element, n, FULL, flags)
    return source, name.replace("<", "_in_turn<", 1)


def convolution(dtype, wide, k, backward, packed=False, aligned=16):
    strides = (2048 * 3072, 3072, 1)
    signature = (dtype, wide, (8, 2048, 3072), k, strides, (0, 0), strides, strides, aligned, packed, True)
    name = "conv_backward" if backward else "conv_forward"
    return "conv.cu", name + cuda_conv.plan(signature, 132, backward).arguments


def convolution_step(types, k, aligned=16):
    return "update.cu", cuda_update._conv_launch(types, aligned, (1, 1536, k, True, False, 1), (1536, 4608, 1536))[1]


def state_step(types, k, n, one_A, aligned=(16, 16), b=64, **more):
    sizes = (b, 1536, n, 24 if one_A else 1536, 1)
    strides = (1536 * n, 1536, 1536, n, n, n, n, 1536, 0, 0)
    options = (True, True, False, 64)
    types = (*types, more.pop("state", F32))
    scan = cuda_update.ScanLook(types, k, sizes, strides, aligned, one_A, (1, 0), options, (0.0, 1.0), **more)
    return "update.cu", cuda_update._scan_launch(scan, 132)[1]


def norm(types, d, backward, flags=0):
    name = "norm_backward" if backward else "norm_forward"
    return "norm.cu", name + cuda_norm.plan(types, 16384, d, (d,) * 4, flags, 1e-5, 132, backward).arguments


def gated_norm(types, d, backward, groups=1, before=False, aligned=True):
    how, name = (
        gated_cuda.Gating(1e-5, d // groups, before),
        "gated_norm_backward" if backward else "gated_norm_forward",
    )
    return "gated_norm.cu", name + gated_cuda.plan(types, 16384, d, (d,) * 4, how, aligned, 132, backward).arguments


def loss(v, dtype, want_gradient=True):
    return "cross_entropy.cu", cuda_loss.plan(v, dtype, want_gradient, 228 << 10)[0]


def few_rows(dtype, b, stream=None, norm=None, residual=None, **behind):
    types = (dtype, stream or dtype, residual or dtype)
    options = (behind.get("pairs", False), behind.get("activation"), residual is not None, 1.0, 1.0)
    k, n = behind.get("k", 768), behind.get("n", 10240)
    look = cuda_few.Look(types, (b, n, k), (k, k, 0, k, 0, 0), norm, behind.get("conv"), options)
    return "few_rows.cu", cuda_few.cut(look, 132, 227 << 10).name


NORMED, LAYER_NORM, GATED = (
    (False, False, 2560, False, 1e-5),
    (True, False, 2560, False, 1e-5),
    (False, True, 2560, False, 1e-5),
)


def dual(dtype, p, n, flags=0, space=228 << 10):
    tile = cuda_ssd.tile_of(p, n, dtype.itemsize, space)
    return "ssd_forward.cu", cuda_ssd.walk(dtype, tile, flags)


USUAL = [
    *(forward("bf16", 16, FULL, 0, i) for i in range(len(FORWARD[16]))),
    *(forward("bf16", 16, mode, 0) for mode in (STATE, ADJOINT)),
    *(f(element, 16, *rest) for element in ("float", "fp16") for f, rest in ((forward, (FULL, 0)), (backward, (0,)))),
    *(forward("bf16", 16, FULL, flags) for flags in (2, 23, 8)),
    backward("bf16", 16, 0),
    backward("bf16", 16, 8),
    backward("bf16", 16, 2),
    backward("bf16", 16, 23),
    *(backward("bf16", n, OUTPUTS) for n in (1, 4, 16)),
    backward("bf16", 16, OUTPUTS + 8),
    *(pair("bf16", flags) for flags in (0, 23, WALK + LOW_RANK)),
    pair("float", 0),
    *(forward("bf16", 16, FULL, LOW_RANK, i) for i in range(len(FORWARD[16]))),
    *(forward("fp16", n, FULL, WALK + NARROW + LOW_RANK) for n in (1, 4, 8, 16)),
    *(in_turn("bf16", n, flags) for n in (1, 2, 4) for flags in (WALK + NARROW, WALK + NARROW + LOW_RANK)),
    *(("scan_forward.cu", forward("bf16", n, ADJOINT, WALK + NARROW)[1].replace("<", "_walks<", 1)) for n in (1, 16)),
    *(walked("bf16", n, flags) for n in (1, 16) for flags in (WALK, WALK + NARROW)),
    *(("scan_backward.cu", f"sum_partials{kind}<bf16>") for kind in ("", "_walks")),
    *(convolution(BF16, wide, 4, backward) for wide in (BF16, F32) for backward in (False, True)),
    *(convolution(F32, F32, k, backward, k > 4) for k in (4, 8) for backward in (False, True)),
    convolution(BF16, F32, 4, True, packed=True),
    convolution(BF16, F32, 8, True, packed=True, aligned=1),
    ("sums.cu", "column_sums<bf16>"),
    *(("choose.cu", f"choose<{flags}>") for flags in (1, 3)),
    ("take.cu", "take_rows"),
    *(
        norm((F32, add, BF16, F32), d, backward)
        for add in (None, BF16)
        for d in (64, 768, 1024, 2560, 5120, 8192)
        for backward in (False, True)
    ),
    *(norm((m, None, m, m), 768, backward) for m in (F32, BF16, F16) for backward in (False, True)),
    *(norm((m,) * 4, 768, False) for m in (F32, BF16, F16)),
    *(norm((F32, add, F32, F32), d, True, UNALIGNED) for add in (None, F16) for d in (767, 6144)),
    *(
        norm((m, None, BF16, F32), d, backward, CENTRED)
        for m in (F32, BF16)
        for d in (96, 384)
        for backward in (False, True)
    ),
    *(norm((F32, BF16, F32, F32), d, backward, CENTRED) for d in (768, 8192) for backward in (False, True)),
    *(norm((F32, None, F32, F32), 127, backward, CENTRED) for backward in (False, True)),
    *(gated_norm((BF16, BF16, F32), d, backward) for d in (1536, 2048, 5120, 8192) for backward in (False, True)),
    *(gated_norm((m,) * 3, 8192, backward, 8, True) for m in (BF16, F32) for backward in (False, True)),
    *(gated_norm((F16, F16, F32), 8190, backward, before=True, aligned=False) for backward in (False, True)),
    convolution_step((BF16,) * 3, 4),
    state_step((BF16,) * 3, 0, 16, False, b=256),
    state_step((BF16,) * 3, 0, 16, False, b=1),
    state_step((BF16,) * 3, 0, 128, True),
    state_step((BF16,) * 3, 4, 128, True),
    state_step((F16, F32, F32), 8, 250, False, aligned=(1, 1)),
    state_step((BF16,) * 3, 4, 128, True, state=BF16),
    state_step((BF16,) * 3, 0, 16, False, b=1, rank=160),
    state_step((BF16,) * 3, 0, 16, False, b=8, rank=256, eps=1e-6),
    state_step((F32,) * 3, 0, 16, False, b=1000, rank=512, eps=1e-6),
    *(few_rows(dtype, b, F32, NORMED) for dtype in (BF16, F16) for b in (1, 16, 32)),
    *(few_rows(BF16, 1, BF16, norm) for norm in (NORMED, LAYER_NORM)),
    *(few_rows(BF16, b, BF16, GATED, F32) for b in (1, 32)),
    *(few_rows(BF16, b, residual=F32) for b in (1, 32)),
    few_rows(BF16, 16, BF16, GATED, F32, k=5120),
    few_rows(BF16, 1),
    few_rows(BF16, 1, n=192, k=5120),
    few_rows(BF16, 1, F32, NORMED, k=2560, conv=(0, 5120, 4, True)),
    few_rows(BF16, 8, F32, LAYER_NORM, k=2560, pairs=True, activation="silu"),
    *(
        ("attend.cu", f"attend_{kernel}>".replace("T", dtype).replace("H", str(halves)))
        for kernel in ("slots<T, H, 2", "slots<T, H, 2, true", "keep<T, H")
        for dtype, halves in (("bf16", 1), ("bf16", 2), ("fp16", 3), ("bf16", 4))
    ),
    *(loss(50280, dtype, want_gradient) for dtype in (BF16, F16, F32) for want_gradient in (True, False)),
    *(loss(v, BF16) for v in (256, 4096, 128256)),
    *(dual(BF16, 64, 128, flags) for flags in (0, RESET, cuda_ssd.GATED, cuda_ssd.STATES)),
    dual(F32, 64, 128),
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
@pytest.mark.parametrize(
    "kernel",
    [
        forward("bf16", 16, FULL, 0),
        backward("bf16", 16, 23),
        forward("bf16", 16, FULL, LOW_RANK),
        convolution(BF16, BF16, 4, False),
        norm((F32, BF16, BF16, F32), 768, True),
        gated_norm((BF16, BF16, F32), 2048, True),
        convolution(BF16, BF16, 4, True),
        state_step((BF16,) * 3, 4, 128, True),
        loss(50280, BF16),
        dual(BF16, 64, 128),
    ],
    ids=lambda k: k[1],
)
def test_kernels_compile_for_every_architecture_we_claim(kernel, arch):
    assert resources(*kernel, arch)[1] <= SPILLS


@pytest.mark.parametrize("kernel", USUAL, ids=lambda k: k[1])
def test_usual_kernels_fit_their_registers(kernel, record_property):
    registers, spilled = resources(*kernel, nvrtc.arch_of(9, 0))
    record_property("registers", registers)
    record_property("spilled bytes", spilled)
    assert spilled <= SPILLS


@exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("element", ["float", "bf16", "fp16"])
def test_every_instance_compiles(element, arch):
    kernels = [
        kernel
        for n in FORWARD
        for flags in range(32)
        for kernel in (
            *(
                forward(element, n, mode, flags, i)
                for i in range(len(FORWARD[n]))
                for mode in ((FULL, STATE, ADJOINT) if not flags & CUT else (FULL,))
            ),
            *(
                forward(element, n, mode, flags + LOW_RANK, i)
                for i in range(len(FORWARD[n]))
                for mode in (FULL, STATE)
                if n <= 16 and element != "float" and not (mode and flags & CUT)
            ),
            *(backward(element, n, flags + more) for more in ((0, OUTPUTS) if not flags & WALK else (0,))),
        )
    ]
    low = (0,) if element == "float" else (0, LOW_RANK)
    kernels += [pair(element, flags + more) for flags in range(32) if not flags & CUT for more in low]
    spilled = {kernel: resources(*kernel, arch) for kernel in kernels}
    assert max(s for _, s in spilled.values()) <= 4 * SPILLS, spilled


@exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
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


@exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_instance_of_the_norm_compiles(dtype, arch):
    # one width for every number of threads in a row and of accesses in a thread
    plain = F32, None, F32, F32
    cuts = {
        flag: {cuda_norm.plan(plain, 1, d, (d,) * 4, flag, 0.0, 1, True).arguments: d for d in range(4, 8193, 4)}
        for flag in (0, CENTRED)
    }
    kernels = {
        norm((dtype, add, out, wide), d, backward, flag + more)
        for add in (None, dtype, BF16)
        if add is None or torch.promote_types(dtype, add) == dtype
        for out in (F32, BF16, F16)
        for wide in (F32, dtype)
        for flag, widths in cuts.items()
        for d in widths.values()
        for backward in (False, True)
        for more in (0, UNALIGNED)
    }
    spilled = {kernel: resources(*kernel, arch)[1] for kernel in sorted(kernels)}
    assert not {kernel: size for kernel, size in spilled.items() if size > SPILLS}


@exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_instance_of_ssd_compiles(dtype, arch):
    kernels = {
        *(
            dual(dtype, p, n, flags + more, space << 10)
            for p in (32, 64)
            for n in (32, 64, 128, 256)
            for flags in (0, RESET, UNALIGNED, RESET + UNALIGNED)
            for more in (0, cuda_ssd.STATES)
            for space in (100, 164, 228)
        ),
        ("ssd_forward.cu", "ssd_pass_states"),
    }
    spilled = {kernel: resources(*kernel, arch)[1] for kernel in sorted(kernels)}
    assert not {kernel: size for kernel, size in spilled.items() if size > SPILLS}


@exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_instance_of_the_gated_norm_compiles(dtype, arch):
    # one width for every number of threads in a row and of accesses in a thread
    widths = {gated_norm((F32,) * 3, d, True): d for d in range(4, 8193, 4)}
    kernels = {
        gated_norm((dtype, gate, wide), d, backward, 1, before, aligned)
        for gate in (dtype, F32)
        for wide in (dtype, F32)
        for d in widths.values()
        for backward in (False, True)
        for before in (False, True)
        for aligned in (False, True)
    }
    spilled = {kernel: resources(*kernel, arch)[1] for kernel in sorted(kernels)}
    assert not {kernel: size for kernel, size in spilled.items() if size > SPILLS}


SUMS = ("scan_backward.cu", "sum_partials<float>", "sm_90")


def test_machine_code_is_compiled_once_and_then_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path))
    symbol, code = nvrtc.machine_code(*SUMS)
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled a second time"))
    assert nvrtc.machine_code(*SUMS) == (symbol, code)
    assert [f.suffix for f in tmp_path.iterdir()] == [".cubin"]


def test_another_architecture_or_name_is_another_entry(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path))
    nvrtc.machine_code(*SUMS)
    nvrtc.machine_code(*SUMS[:2], "sm_80")
    nvrtc.machine_code("scan_backward.cu", "sum_partials<bf16>", "sm_90")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_entry_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path))
    want = nvrtc.machine_code(*SUMS)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    for damaged in (b"", b"evil\n\x7fELFplanted"):
        entry.write_bytes(damaged)
        assert nvrtc.machine_code(*SUMS) == want
        assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_only_slower(monkeypatch, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(in_the_way / "cache"))
    monkeypatch.setattr(nvrtc.cache, "_said", set())
    with pytest.warns(UserWarning, match="compiles them anew"):
        assert nvrtc.machine_code(*SUMS)[1].startswith(b"\x7fELF")


def test_processes_share_the_cache(tmp_path):
    code = f"from hybridzoo.kernels.gpu import nvrtc; print(len(nvrtc.machine_code(*{SUMS!r})[1]))"
    environment = os.environ | {"HYBRIDZOO_CACHE": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path.parent, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    sizes = {run.communicate(timeout=200)[0] for run in runs}
    assert len(sizes) == 1 and int(sizes.pop()) > 0
    assert [f.suffix for f in tmp_path.iterdir()] == [".cubin"]


def test_an_error_in_a_source_comes_with_the_log():
    with pytest.raises(
        nvrtc.CompileError, match=r"scan_forward.cu: scan_nothing does not compile for sm_90 .*\n(.|\n)*scan_nothing"
    ):
        nvrtc.compile_source("scan_forward.cu", "scan_nothing", "sm_90")


def test_the_compiler_writes_into_no_object_that_others_hold():
    # an empty log is one byte long, and of every such bytes Python has a single object
    nvrtc.compile_source(*SUMS)
    assert list(bytes([32])) == [32]


@pytest.mark.parametrize(("capability", "allowed"), [((9, 0), True), ((8, 0), True), ((9, 0), False)])
def test_launches_overlap_where_they_may(capability, allowed, monkeypatch):
    from cuda.bindings import driver

    calls = []

    class Driver:
        CUresult = driver.CUresult
        CUlaunchAttribute, CUlaunchAttributeID = driver.CUlaunchAttribute, driver.CUlaunchAttributeID
        CUlaunchConfig = driver.CUlaunchConfig
        cuLaunchKernel = staticmethod(lambda *a: calls.append(("plain", a)) or (0,))
        cuLaunchKernelEx = staticmethod(lambda *a: calls.append(("overlapping", a)) or (0,))

    monkeypatch.setattr(nvrtc, "_driver", Driver)
    monkeypatch.setattr(nvrtc, "_can_overlap", lambda index: capability >= (9, 0))
    monkeypatch.setattr(nvrtc, "OVERLAP", allowed)
    monkeypatch.setattr(nvrtc, "current_stream", lambda index: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nvrtc, "_loaded", {("a.cu", "a", 0, 640): "kernel"})
    nvrtc._overlapping.cache_clear()
    for overlaps in (True, False):
        nvrtc.launch("a.cu", "a", b"params", 3, 128, 640, torch.device("cuda", 0), overlaps=overlaps)
    nvrtc._overlapping.cache_clear()
    ways = [how for how, _ in calls]
    assert ways == ["overlapping" if capability >= (9, 0) and allowed else "plain", "plain"]
    if ways[0] == "overlapping":
        config, kernel, *_ = calls[0][1]
        assert (config.gridDimX, config.blockDimX, config.sharedMemBytes, int(config.hStream)) == (3, 128, 640, 77)
        assert config.numAttrs == 1 and config.attrs[0].value.programmaticStreamSerializationAllowed == 1
        assert kernel == "kernel"
