"""The CUDA sources compile without a GPU, and the compiler's work is kept."""

import os
import re
import subprocess
import sys

import pytest

from hybridzoo.kernels import nvrtc
from hybridzoo.kernels.cuda_shapes import ADJOINT, BACKWARD, FORWARD, FULL, STATE

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install 'hybridzoo[cuda]'")

exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes of NVRTC; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
# no thread may have more than this many bytes of registers spilled to memory
SPILLS = 64


def forward(element, n, mode, flags, which=0):
    s = FORWARD[n][which]
    sizes = f"{s.nc}, {s.ns}, {s.ln}, {s.ch}, {s.tt}, {s.nh}, {BACKWARD[n].k}, {mode}, {flags}, {s.blocks}"
    return "scan_forward.cu", f"scan_forward<{element}, {sizes}>"


def backward(element, n, flags):
    s = BACKWARD[n]
    return (
        "scan_backward.cu",
        f"scan_backward<{element}, {s.ns}, {s.ln}, {s.ch}, {s.warps}, {s.k}, {s.ts}, {flags}, {s.blocks}>",
    )


USUAL = [
    *(forward("bf16", 16, FULL, 0, i) for i in range(len(FORWARD[16]))),
    *(forward("bf16", 16, mode, 0) for mode in (STATE, ADJOINT)),
    *(f(element, 16, *rest) for element in ("float", "fp16") for f, rest in ((forward, (FULL, 0)), (backward, (0,)))),
    *(forward("bf16", 16, FULL, flags) for flags in (2, 7)),
    backward("bf16", 16, 0),
    backward("bf16", 16, 2),
    backward("bf16", 16, 7),
    ("scan_forward.cu", "scan_carry"),
    ("scan_backward.cu", "sum_partials<bf16>"),
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
@pytest.mark.parametrize("kernel", [forward("bf16", 16, FULL, 0), backward("bf16", 16, 7)], ids=lambda k: k[1])
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
@pytest.mark.parametrize("element", ["float", "bf16", "fp16"])
def test_every_instance_compiles(element, arch):
    kernels = [
        kernel
        for n in FORWARD
        for flags in range(8)
        for kernel in (
            *(forward(element, n, mode, flags, i) for i in range(len(FORWARD[n])) for mode in (FULL, STATE, ADJOINT)),
            backward(element, n, flags),
        )
    ]
    spilled = {kernel: resources(*kernel, arch) for kernel in kernels}
    assert max(s for _, s in spilled.values()) <= 4 * SPILLS, spilled


CARRY = ("scan_forward.cu", "scan_carry", "sm_90")


def test_machine_code_is_compiled_once_and_then_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path))
    symbol, code = nvrtc.machine_code(*CARRY)
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled a second time"))
    assert nvrtc.machine_code(*CARRY) == (symbol, code)
    assert [f.suffix for f in tmp_path.iterdir()] == [".cubin"]


def test_another_architecture_or_name_is_another_entry(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path))
    nvrtc.machine_code(*CARRY)
    nvrtc.machine_code(*CARRY[:2], "sm_80")
    nvrtc.machine_code("scan_backward.cu", "sum_partials<float>", "sm_90")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_entry_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path))
    want = nvrtc.machine_code(*CARRY)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(b"")
    assert nvrtc.machine_code(*CARRY) == want
    assert entry.stat().st_size > 0


def test_a_cache_that_cannot_be_written_is_only_slower(monkeypatch, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(in_the_way / "cache"))
    assert nvrtc.machine_code(*CARRY)[1].startswith(b"\x7fELF")


def test_processes_share_the_cache(tmp_path):
    code = f"from hybridzoo.kernels import nvrtc; print(len(nvrtc.machine_code(*{CARRY!r})[1]))"
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
    nvrtc.compile_source("scan_forward.cu", "scan_carry", "sm_90")
    assert list(bytes([32])) == [32]
