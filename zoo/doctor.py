"""The report of ``zoo doctor``: the machine, the packages, and the backend that every op takes here, and why."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from ..kernels.dispatch import TABLES, explain
from ..kernels.gpu import cache, nvrtc
from ..layers import attention, experts  # noqa: F401, registers the backends of their ops
from .device import pick_device

__all__ = ["examine"]

_PACKAGES = (
    "hybridzoo", "torch", "numpy", "omegaconf", "safetensors", "transformers", "tokenizers", "accelerate",
    "tensorboard", "lm_eval", "datasets", "triton", "mamba_ssm", "causal_conv1d", "flash_attn", "flash_attn_4", "megablocks",
)  # fmt: skip

# what a call of each op usually looks like
_TYPICAL: dict[str, dict[str, Any]] = {
    "selective_scan": {"d_state": 16}, "ssd": {"d_state": 128}, "causal_conv1d": {"width": 4, "d": 1536}, "rms_norm": {"d": 768},
    "layer_norm": {"d": 384}, "gated_rms_norm": {"d": 1536}, "attention": {"headdim": 64}, "moe": {"widths": (1024, 4096)},
    "step_linear": {"rows": 1, "d": 2560},
}  # fmt: skip


def examine(device: str | None = None) -> dict[str, Any]:
    """Look at the machine, and ask the ops about a device, a GPU by default, if there is one; one that is not there is a ``ValueError``.

    ``cuda`` is answered for without a GPU too: why there is none, and what would be taken, is what one wants to know then.

    Returns:
        ``{"system": {...}, "packages": {name: version}, "ops": {op: [{"backend", "chosen", "reason"}]}, "verdicts": {op: text}}``, and
        for a GPU ``"gpu"``: the device, the driver, the compiler of the kernels, and where they are kept.
    """
    device = "cuda" if (device or "").partition(":")[0] == "cuda" else pick_device(device).type
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    asked = {op: explain(op, device=device, dtype=dtype, **_TYPICAL.get(op, {})) for op in TABLES}
    report = {
        "system": _system(device, dtype),
        "packages": {name: _version(name) for name in _PACKAGES},
        "ops": {
            op: [{"backend": name, "chosen": chosen, "reason": reason} for name, chosen, reason in rows]
            for op, rows in asked.items()
        },
        "verdicts": {op: _verdict(rows) for op, rows in asked.items()},
    }
    return report | {"gpu": _gpu()} if device == "cuda" else report


def _verdict(rows: list[tuple[str, bool, str]]) -> str:
    """Name the backend that is taken, and why not those that are preferred to it."""
    at = next(i for i, (_, chosen, _) in enumerate(rows) if chosen)
    passed_over = "; ".join(f"not {name}: {reason}" for name, _, reason in rows[:at])
    return f"{rows[at][0]} ({rows[at][2]})" + (f", {passed_over}" if passed_over else "")


def _gpu() -> dict[str, str]:
    missing = nvrtc.unavailable()
    if not torch.cuda.is_available():
        return {"device": "none that torch sees", "kernels": str(missing)}
    at = torch.cuda.current_device()
    found = torch.cuda.get_device_properties(at)
    return {
        "device": f"{found.name}, {found.total_memory / 2**30:.1f} GiB, {found.multi_processor_count} multiprocessors",
        "arch": f"sm_{found.major}{found.minor}",
        "driver": _driver(),
        "compiler": _compiler(),
        "kernel cache": _cache(*cache.place()),
        "kernels": "compiled at first use" if missing is None else f"off: {missing}",
    }


def _driver() -> str:
    said = Path("/proc/driver/nvidia/version")
    version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", said.read_text()) if said.is_file() else None
    try:
        status, number = importlib.import_module("cuda.bindings.driver").cuDriverGetVersion()
    except (ImportError, OSError, RuntimeError) as e:
        return f"{version[0] if version else 'unknown'} ({type(e).__name__}: {e})"
    cuda = "an unknown CUDA" if status else f"CUDA {number // 1000}.{number % 1000 // 10}"
    return f"{version[0] + ', ' if version else ''}up to {cuda}"


def _compiler() -> str:
    try:
        version = nvrtc.compiler_version()
    # without its shared library, a binding raises RuntimeError or an error of the package that looks for libraries
    except (ImportError, OSError, RuntimeError) as e:
        return f"none ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no reason'})"
    return f"NVRTC {version} from {_loaded_from('libnvrtc.so') or 'an unknown place'}"


def _loaded_from(library: str) -> str | None:
    # the file of a library that this process has loaded
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    return next((line.split(maxsplit=5)[5] for line in lines if f"/{library}" in line), None)


def _cache(folder: Path | None, refused: str | None) -> str:
    if folder is None or refused is not None:
        return f"none, every process compiles anew: {refused}"
    kept = list(folder.glob("*.cubin")) if folder.is_dir() else []
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    writable = "" if there.is_dir() and os.access(there, os.W_OK) else "not writable: every process compiles anew"
    return f"{folder}: {len(kept)} kernels, {sum(f.stat().st_size for f in kept):,} bytes, {writable or 'writable'}"


def _system(device: str, dtype: torch.dtype) -> dict[str, str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    home = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    return _stale() | {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "cuda": ", ".join(cuda) if cuda else f"none (torch was built for {torch.version.cuda or 'the CPU'})",
        "asked about": f"{device}, {str(dtype).removeprefix('torch.')}",
        "HYBRIDZOO_BACKEND": os.environ.get("HYBRIDZOO_BACKEND", "not set: chosen call by call"),
        "hub cache": f"{home} ({'there' if home.is_dir() else 'not there yet'})",
    }


def _stale() -> dict[str, str]:
    """Say of an installation that it was made by an earlier version: its entry points lead to what has moved."""
    found = importlib.metadata.entry_points
    why = ["`import torch` loads it" for e in found(group="torch.backends") if e.name == "hybridzoo"]
    scripts = [e.value for e in found(group="console_scripts") if e.name == "zoo"]
    why += [f"its script `zoo` starts {value}" for value in scripts if value.startswith("hybridzoo.zoo.")]
    return {"installation": f"stale: {' and '.join(why)}. Install hybridzoo again"} if why else {}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        # a folder without code may hold parts of another package
        spec = importlib.util.find_spec(name)
        return "not installed" if spec is None or spec.origin is None else "installed"
