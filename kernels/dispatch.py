"""Chooses the backend that answers a call, and says why the others do not.

An op registers its backends where it is defined, in order of preference. Order: the ``backend`` argument, then the environment
variable ``HYBRIDZOO_BACKEND``, then the first backend in the table that can. Every backend answers *can you do this call?* with a
reason; the reasons are what errors and ``zoo doctor`` print. Facts about a call are plain Python values (``device="cpu"``,
``dtype=torch.bfloat16``, ``packed=True``); what is not stated is the plain case.

``"reference"`` means, for every op, the one backend of plain differentiable PyTorch, whatever the op calls it; and it is what answers
inside forward-mode differentiation and ``torch.func``'s transforms, which would drop tangents at a kernel without a word.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .derivatives import ENV, transformed
from .numerics import HALVES
from .seq import Seq

Facts = dict[str, Any]
TABLES: dict[str, dict[str, "Backend"]] = {}
# what backends of several ops are called in a few words
KERNELS = "our kernels, compiled at first use"
CHUNKED = "vectorised PyTorch, memory linear in l"
LOOP = "a loop over time, the definition"
FLOATS = (torch.float32, *HALVES)


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
        refuse: Says why it cannot do a call with these facts, or ``None`` if it can, as always by default.
        run: Does it, with the arguments that the op's backends agree on; absent where the op asks for the name alone.
        plain: Whether it consists of differentiable PyTorch operations, and so has every kind of derivative.
        reserve: Says why it would rather not do a call with these facts, and does it only where it is asked for by name; or ``None``.
    """

    name: str
    summary: str
    refuse: Callable[[Facts], str | None] = lambda facts: None
    run: Any = None
    plain: bool = False
    reserve: Callable[[Facts], str | None] = lambda facts: None

    def passes(self, facts: Facts) -> str | None:
        """Say why a call that names no backend goes past this one."""
        # in this order: who would not be taken anyway needs no library imported
        return self.reserve(facts) or self.refuse(facts)


def register(op: str, *backends: Backend) -> None:
    """Make these the backends of ``op``, in order of preference; one of them is plain."""
    TABLES[op] = {backend.name: backend for backend in backends}


def choose(op: str, *, backend: str | None = None, **facts: Any) -> Backend:
    """The backend for one call of ``op``.

    Args:
        op: ``selective_scan``, ``ssd``, ``causal_conv1d``, ``update`` (one step of these three), ``rms_norm``, ``layer_norm``,
            ``gated_rms_norm``, ``cross_entropy``, ``attention``, ``moe``, ``step_linear`` (a product of few rows),
            ``step_attention``, ``read_attention``, ``take_rows``, ``choose_token``, ``mamba_layer``, ``mamba2_layer`` (how autograd sees
            one); or, of our kernels' ``selective_scan``, ``paths`` and ``dt_weight``: how it takes these arguments.
        backend: The caller's wish; ``None`` leaves it to the environment and the order of preference.
        facts: About the call: ``device`` (a type, ``"cuda"``), ``dtype``, ``d_state``, ``width``, ``headdim``, ``d``, ``rank`` and, as
            booleans, ``initial_state``, ``final_state_grad``, ``packed``, ``padded``, ``masked``, ``window``; ``length`` of the rows, and
            whether their documents are ``counted`` (:attr:`.seq.Seq.offsets`); ``widths`` of the experts' matrices;
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
        if candidate.passes(facts) is None:
            return candidate
    reasons = "; ".join(f"{name}: {reason}" for name, _, reason in explain(op, **facts))
    raise BackendError(f"{op}: no backend can do this call. {reasons}.")


def choose_able(op: str, refuse: Callable[[Facts], str | None], backend: str | None, facts: Facts) -> Backend:
    """As :func:`choose`, of an op that our kernel, which may ``refuse`` a call, and PyTorch's operations (``"torch"``) can do.

    What the kernel refuses they do also where the environment asks for our kernels: there is none for every call.
    """
    if backend is None and refuse(facts) is not None:
        backend = "torch"
    return choose(op, backend=backend, **facts)


def explain(op: str, **facts: Any) -> list[tuple[str, bool, str]]:
    """Every backend of ``op`` in order of preference: its name, whether a call with these facts would take it, and why or why not."""
    table = _table(op)
    wish = os.environ.get(ENV)
    forced = _named(table, wish) if wish and _named(table, wish) in table else None
    rows, taken = [], False
    for name, backend in table.items():
        reason = backend.refuse(facts) if name == forced else backend.passes(facts)
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
            _tried[name] = importlib.import_module(_MODULES.get(name, name))
        # a library built for another torch or CUDA fails with whatever its extension raises
        except (ImportError, OSError, RuntimeError, AttributeError) as e:
            _tried[name] = (
                f"{name} is installed but does not import ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no reason'})"
            )
    return _tried[name]


def _find(name: str) -> bool:
    spec = importlib.util.find_spec(name.removesuffix("_4"))
    if spec is None or not name.startswith("flash_attn"):
        return spec is not None
    # two distributions share the folder flash_attn: generation 2 is the package, generation 4 a part of what may be no package; the second
    # brings a part of that name along that does without its own requirements, and is no generation 4
    if name == "flash_attn":
        return spec.origin is not None
    return any(True for _ in importlib.metadata.distributions(name="flash-attn-4"))


_MODULES = {"flash_attn_4": "flash_attn.cute"}
_tried: dict[str, ModuleType | str] = {}
installed = {name: _find(name) for name in ("mamba_ssm", "causal_conv1d", "flash_attn", "flash_attn_4", "megablocks")}


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


def refuse_library(name: str, facts: Facts, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Say why an optional GPU library cannot do a call in ``dtypes``, or ``None`` if it may."""
    if not installed[name]:
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


def facts_of(
    x: Tensor, initial_state: Tensor | None, seq: Seq | None, final: bool, *leaves: Tensor | None, **more: Any
) -> Facts:
    """Facts about a call on ``x``; ``leaves`` are what else may want a gradient through the ``final`` state, if that is asked for."""
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
