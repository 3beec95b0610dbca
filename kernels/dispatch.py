"""Which backend answers a call, and why the others do not.

Order: the ``backend`` argument, then the environment variable ``HYBRIDZOO_BACKEND``, then the first backend in the table that can. Every
backend answers *can you do this call?* with a reason; the reasons are what errors and ``zoo doctor`` print. Facts about a call
are plain Python values (``device="cpu"``, ``dtype=torch.bfloat16``, ``packed=True``); what is not stated is the plain case.

``"reference"`` means, for every op, the one backend of plain differentiable PyTorch, whatever the op calls it; and it is what answers
inside forward-mode differentiation and ``torch.func``'s transforms, which would drop tangents at a kernel without a word.
"""

import difflib
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import cuda as cuda_conv
from .derivatives import ENV, transformed
from .loss import cuda as cuda_loss
from .norm import cuda as cuda_norm
from .scan import cuda as cuda_ops
from .scan import low_rank
from .seq import Seq
from .step import cuda as cuda_update

Facts = dict[str, Any]


class BackendError(RuntimeError):
    """No backend, or not the one that was asked for, can do a call; the message says why."""


class TransformError(BackendError, NotImplementedError):
    """The backend that was asked for has no derivatives of the kind that is being taken."""


@dataclass(frozen=True)
class Backend:
    """One way to do an op.

    Attributes:
        name: What ``backend=`` and ``HYBRIDZOO_BACKEND`` call it.
        summary: What it is, in a few words.
        refuse: Why it cannot do a call with these facts, or ``None`` if it can.
        plain: Whether it consists of differentiable PyTorch operations, and so has every kind of derivative.
    """

    name: str
    summary: str
    refuse: Callable[[Facts], str | None]
    plain: bool = False


def choose(op: str, *, backend: str | None = None, **facts: Any) -> Backend:
    """The backend for one call of ``op``.

    Args:
        op: ``selective_scan``, ``ssd``, ``causal_conv1d``, ``update`` (one step of these three), ``rms_norm``, ``cross_entropy``,
            ``attention``, ``moe``, ``mamba_layer`` (how autograd sees one); or, of our kernels' ``selective_scan``, ``paths`` and
            ``dt_weight``: how it takes these arguments.
        backend: The caller's wish; ``None`` leaves it to the environment and the order of preference.
        facts: About the call: ``device`` (a type, ``"cuda"``), ``dtype``, ``d_state``, ``width``, ``headdim``, ``d``, ``rank`` and, as
            booleans, ``initial_state``, ``final_state_grad``, ``packed``, ``padded``, ``masked``; ``widths`` of the experts' matrices;
            ``dtypes`` of a norm's other tensors; ``subclass``, the type of the tensors if it is not torch's own;
            ``normed``, whether a Mamba layer normalises dt, B and C; what :func:`.step.cuda.refuse` asks about the states of an
            ``update``.

    Raises:
        BackendError: The name is unknown, or the backend asked for refuses.
        NotImplementedError: The backend asked for has no forward-mode derivatives, or cannot be transformed.
    """
    table = _table(op)
    if backend is not None:
        return _asked(op, table, backend, f"{op}(backend={backend!r})", facts)
    wish = os.environ.get(ENV)
    if wish:
        if _named(table, wish) in table:
            return _asked(op, table, wish, f"{op} ({ENV}={wish})", facts)
        if not any(wish in other for other in TABLES.values()):
            raise BackendError(f"{ENV}={wish}: {_unknown(wish, sorted({n for t in TABLES.values() for n in t}))}")
    if transformed() is not None:
        return table[_named(table, "reference")]
    for candidate in table.values():
        if candidate.refuse(facts) is None:
            return candidate
    reasons = "; ".join(f"{name}: {reason}" for name, _, reason in explain(op, **facts))
    raise BackendError(f"{op}: no backend can do this call. {reasons}.")


def explain(op: str, **facts: Any) -> list[tuple[str, bool, str]]:
    """Every backend of ``op`` in order of preference: its name, whether a call with these facts would take it, and why or why not."""
    table = _table(op)
    wish = os.environ.get(ENV)
    forced = _named(table, wish) if wish and _named(table, wish) in table else None
    rows, taken = [], False
    for name, backend in table.items():
        reason = backend.refuse(facts)
        if reason is None and forced not in (None, name):
            reason = f"{ENV}={wish} asks for another"
        elif reason is None and taken:
            reason = f"{backend.summary}; not needed"
        chosen = reason is None
        taken |= chosen
        rows.append((name, chosen, reason or backend.summary))
    return rows


def library(name: str) -> ModuleType | str:
    """An optional library, imported at the first call; or why it cannot be used, which is kept."""
    if name not in _tried:
        try:
            _tried[name] = importlib.import_module(name)
        # a library built for another torch or CUDA fails with whatever its extension raises
        except (ImportError, OSError, RuntimeError, AttributeError) as e:
            _tried[name] = (
                f"{name} is installed but does not import ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no reason'})"
            )
    return _tried[name]


_tried: dict[str, ModuleType | str] = {}
_LIBRARIES = ("mamba_ssm", "causal_conv1d", "flash_attn", "megablocks")
_installed = {name: importlib.util.find_spec(name) is not None for name in _LIBRARIES}


def _asked(op: str, table: dict[str, Backend], name: str, where: str, facts: Facts) -> Backend:
    name = _named(table, name)
    if name not in table:
        raise BackendError(f"{where}: {_unknown(name, list(table))}")
    what = transformed()
    if what is not None and not table[name].plain:
        raise TransformError(
            f"{where}: {what} go through plain PyTorch alone. Use backend='reference', or leave backend and {ENV} unset."
        )
    reason = table[name].refuse(facts)
    if reason is not None:
        able = [n for n, b in table.items() if b.refuse(facts) is None]
        raise BackendError(
            f"{where}: {reason}. Use backend={able[0]!r}, or leave backend unset to choose it automatically."
        )
    return table[name]


def _named(table: dict[str, Backend], name: str) -> str:
    """The name that an op's table has for a wish: its one plain backend for ``"reference"``."""
    return next(b.name for b in table.values() if b.plain) if name == "reference" else name


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown backend {name!r}.{hint} Known: {', '.join(known)}."


def _table(op: str) -> dict[str, Backend]:
    if op not in TABLES:
        raise ValueError(f"op: unknown op {op!r}. Known: {', '.join(TABLES)}.")
    return TABLES[op]


def _never(facts: Facts) -> str | None:
    return None


def _cuda(facts: Facts) -> str | None:
    return "there is no CUDA kernel of ours for this op yet"


def _needs(name: str, facts: Facts, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What every optional GPU library needs."""
    if not _installed[name]:
        return f"{name} is not installed"
    device, dtype = facts.get("device", "cpu"), facts.get("dtype", torch.float32)
    if device != "cuda":
        return f"{name} needs CUDA tensors, got {device}"
    if dtype not in dtypes:
        return f"{name} takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {str(dtype).removeprefix('torch.')}"
    if torch.compiler.is_compiling():
        return f"{name} would break the compiled graph"
    module = library(name)
    return module if isinstance(module, str) else None


_HALF = (torch.float16, torch.bfloat16)
_FLOAT = (torch.float32, *_HALF)


def _mamba_ssm_scan(facts: Facts) -> str | None:
    reason = _needs("mamba_ssm", facts, _FLOAT)
    if reason is not None:
        return reason
    if facts.get("initial_state"):
        return "mamba_ssm has no initial state in its selective scan"
    if facts.get("packed"):
        return "mamba_ssm has no packing in its selective scan"
    if facts.get("padded"):
        return "mamba_ssm has no padding in its selective scan"
    if facts.get("final_state_grad"):
        return "mamba_ssm drops the gradient of the final state"
    if facts.get("d_state", 16) > 256:
        return f"mamba_ssm scans up to d_state = 256, got {facts['d_state']}"
    return None


def _mamba_ssm_ssd(facts: Facts) -> str | None:
    reason = _needs("mamba_ssm", facts, _FLOAT)
    if reason is not None:
        return reason
    if facts.get("initial_state") and facts.get("packed"):
        return "mamba_ssm takes an initial state or packed documents, not both"
    if facts.get("dtype", torch.float32) == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "mamba_ssm rounds float32 matrices to TF32, which torch.backends.cuda.matmul.allow_tf32 rules out"
    return None


def _causal_conv1d(facts: Facts) -> str | None:
    reason = _needs("causal_conv1d", facts, _FLOAT)
    if reason is not None:
        return reason
    width, d = facts.get("width", 4), facts.get("d", 8)
    if not 2 <= width <= 4:
        return f"causal_conv1d takes widths 2 to 4, got {width}"
    if d % 8:
        return f"causal_conv1d needs a multiple of 8 channels, got {d}"
    if facts.get("initial_state") and facts.get("packed"):
        return "causal_conv1d takes an initial state or packed documents, not both"
    return None


def _flash_attn(facts: Facts) -> str | None:
    reason = _needs("flash_attn", facts, _HALF)
    if reason is None and facts.get("headdim", 64) > 256:
        return f"flash_attn takes headdim up to 256, got {facts['headdim']}"
    if reason is None and facts.get("masked"):
        return "flash_attn takes no mask, which a carried state and packed documents need"
    return reason


def _megablocks(facts: Facts) -> str | None:
    return _needs("megablocks", facts, _HALF)


def _grouped_mm(facts: Facts) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm (torch >= 2.10 has)"
    dtype = facts.get("dtype", torch.float32)
    if dtype not in _FLOAT:
        return f"grouped_mm takes float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    for width in facts.get("widths", ()):
        if width * dtype.itemsize % 16:
            return f"grouped_mm needs rows of a multiple of 16 bytes, got {width} x {dtype.itemsize} = {width * dtype.itemsize}"
    return None


def _mamba_layer(facts: Facts) -> str | None:
    for op in ("selective_scan", "causal_conv1d", *(["rms_norm"] if facts.get("normed") else [])):
        try:
            name = choose(op, **facts).name
        except BackendError as e:
            return str(e)
        if name != "cuda":
            return f"{op} is not by our kernels (backend: {name})"
    return None


def _ops(*backends: Backend) -> dict[str, Backend]:
    return {backend.name: backend for backend in backends}


_CUDA = Backend("cuda", "our kernels, compiled at first use", _cuda)
_CUDA_SCAN = Backend("cuda", "our kernels, compiled at first use", cuda_ops.refuse)
_CUDA_CONV = Backend("cuda", "our kernels, compiled at first use", cuda_conv.refuse)
_CUDA_LOSS = Backend("cuda", "our kernel, compiled at first use", cuda_loss.refuse)
_CUDA_NORM = Backend("cuda", "our kernels, compiled at first use", cuda_norm.refuse)
_CUDA_UPDATE = Backend("cuda", "our kernels, compiled at first use", cuda_update.refuse)
_CUDA_WALK = Backend("cuda", "our kernels walk over the tokens where they are", cuda_ops.refuse)
_CUDA_RANK = Backend(
    "cuda", "our scan forms the step sizes itself", lambda facts: cuda_ops.refuse(facts) or low_rank.refuse(facts)
)
_CHUNKED = Backend("chunked", "vectorised PyTorch, memory linear in l", _never)
_REFERENCE = Backend("reference", "a loop over time, the definition", _never, plain=True)

TABLES: dict[str, dict[str, Backend]] = {
    "selective_scan": _ops(
        _CUDA_SCAN, Backend("mamba_ssm", "mamba_ssm's CUDA scan", _mamba_ssm_scan), _CHUNKED, _REFERENCE
    ),
    "ssd": _ops(_CUDA, Backend("mamba_ssm", "mamba_ssm's Triton SSD", _mamba_ssm_ssd), _CHUNKED, _REFERENCE),
    "causal_conv1d": _ops(
        _CUDA_CONV, Backend("causal_conv1d", "causal_conv1d's CUDA kernel", _causal_conv1d), _CHUNKED, _REFERENCE
    ),
    "cross_entropy": _ops(_CUDA_LOSS, Backend("torch", "PyTorch operations", _never, plain=True)),
    "update": _ops(_CUDA_UPDATE, Backend("chunked", "PyTorch operations", _never, plain=True)),
    "rms_norm": _ops(_CUDA_NORM, Backend("torch", "PyTorch operations", _never, plain=True)),
    "attention": _ops(
        Backend("flash_attn", "flash-attn's CUDA kernel", _flash_attn),
        Backend("sdpa", "torch's scaled_dot_product_attention", _never),
        Backend("math", "the same in matrix products and a softmax", _never, plain=True),
    ),
    "moe": _ops(
        Backend("grouped_mm", "torch's grouped matmul", _grouped_mm),
        Backend("megablocks", "megablocks' grouped matmuls", _megablocks),
        Backend("loop", "one matmul per expert", _never, plain=True),
    ),
    "mamba_layer": _ops(
        Backend("cuda", "forward and backward of the layer as one node of autograd", _mamba_layer),
        Backend("modules", "a call for each of its parts", _never, plain=True),
    ),
    # of a selective_scan by our kernels; every other backend scans what was gathered, and what was multiplied before
    "paths": _ops(_CUDA_WALK, Backend("gather", "one scan per path over gathered tokens", _never, plain=True)),
    "dt_weight": _ops(_CUDA_RANK, Backend("product", "a matrix product in front of the scan", _never, plain=True)),
}


def _facts(
    x: Tensor, initial_state: Tensor | None, seq: Seq | None, final: bool, *leaves: Tensor | None, **more: Any
) -> dict[str, Any]:
    grad = final and torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in (x, *leaves))
    return {
        "device": x.device.type,
        "dtype": x.dtype,
        "initial_state": initial_state is not None,
        "final_state_grad": grad,
        "packed": seq is not None and seq.packed,
        "padded": seq is not None and seq.padded,
        **more,
    }
