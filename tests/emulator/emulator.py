"""Runs the CUDA sources on the CPU: the same call as ``nvrtc.launch``, with a kernel that g++ built against ``emulate.h``."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from hybridzoo.kernels.gpu import cache

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "kernels"
PARAMS = {
    "scan_forward": "ForwardParams",
    "scan_forward_walks": "Walks<ForwardParams>",
    "scan_forward_in_turn": "Walks<ForwardParams>",
    "scan_forward_two": "ForwardParams",
    "scan_backward": "BackwardParams",
    "scan_backward_walks": "Walks<BackwardParams>",
    "sum_partials": "SumParams",
    "sum_partials_walks": "Walks<SumParams>",
    "conv_forward": "ConvParams",
    "conv_backward": "ConvParams",
    "column_sums": "ColumnSumsParams",
    "norm_forward": "NormParams",
    "norm_backward": "NormParams",
    "gated_norm_forward": "GatedNormParams",
    "gated_norm_backward": "GatedNormParams",
    "conv_update": "ConvUpdateParams",
    "state_update": "StateUpdateParams",
    "cross_entropy": "CrossEntropyParams",
    "few_rows": "FewRowsParams",
    "choose": "ChooseParams",
    "take_rows": "TakeParams",
    "attend_keep": "AttendParams",
    "attend_slots": "AttendParams",
    "ssd_forward": "SsdForwardParams",
    "ssd_pass_states": "SsdForwardParams",
    "ssd_steps": "SsdBackwardParams",
    "ssd_backward_states": "SsdBackwardParams",
    "ssd_backward_chunks": "SsdBackwardParams",
    "ssd_backward_sums": "SsdBackwardParams",
}
FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC"]
# what lies there is run, so another user's folder must not be taken for it
CACHE = Path(tempfile.gettempdir()) / f"hybridzoo-emulated-{os.getuid()}"
_kernels: dict = {}


def _run(target: Path, *arguments: str, text: str | None = None) -> None:
    # any number of processes may do this at once
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        part = Path(folder) / target.name
        subprocess.run(["g++", *FLAGS, *arguments, "-o", str(part)], input=text, text=True, check=True)
        part.rename(target)


@functools.cache
def _precompiled() -> Path:
    """emulate.h as the compiler keeps it: half of every build would be the standard library's headers."""
    header = HERE / "emulate.h"
    folder = CACHE / hashlib.sha256(header.read_bytes() + repr(FLAGS).encode()).hexdigest()[:24]
    CACHE.mkdir(mode=0o700, exist_ok=True)
    assert (reason := cache.refused(CACHE)) is None, reason
    folder.mkdir(exist_ok=True)
    kept = folder / "emulate.h.gch"
    if not kept.exists():
        _run(kept, "-x", "c++-header", str(header))
    return folder / header.name


def _build(source: str, name: str):
    struct = PARAMS[name.split("<")[0]]
    text = f"""#define HZ_EMULATE
#include "{source}"
extern "C" void launch(const {struct}* p, int grid, int block, int bytes) {{
    emulated::run(grid, block, bytes, [=] {{ {name}(*p); }});
}}
"""
    stamp = hashlib.sha256((text + repr(FLAGS)).encode())
    for f in sorted([*SOURCES.glob("*/*.cu*"), *HERE.glob("*.h")]):
        stamp.update(f.read_bytes())
    includes = [
        "-include",
        str(_precompiled()),
        f"-I{HERE}",
        *sorted({f"-I{f.parent}" for f in SOURCES.glob("*/*.cu*")}),
    ]
    library = CACHE / f"{stamp.hexdigest()[:24]}.so"
    if not library.exists():
        _run(library, "-shared", *includes, "-x", "c++", "-", text=text)
    return ctypes.CDLL(str(library)).launch


def launch(source, name, params, grid, block, shared_bytes, device, overlaps=False):
    if (source, name) not in _kernels:
        _kernels[source, name] = _build(source, name)
    _kernels[source, name](ctypes.c_char_p(params), grid, block, shared_bytes)
