"""Both sides of the benchmarks: our calls, and other people's functions, called as published and in the layouts they ask for."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import Seq, causal_conv1d, dispatch, selective_scan, selective_state_update, ssd
from ...layers.attention import Attention
from .workloads import Inputs

# what has a value per token or per row, and so another layout where channels come first
_PER_TOKEN = ("u", "x", "dt", "z", "B", "C")


@dataclass
class Timed:
    """A function of leaves, ready to be called again and again.

    Attributes:
        leaves: Tensors that get a gradient, by name.
        call: The op on the leaves.
        channels_first: Whether tensors with an axis of tokens have it last, (b, d, l) and (b, g, n, l).
        backend: What does it, if that is a choice.
        state: What the call updates in place, if anything.
    """

    leaves: dict[str, Tensor]
    call: Callable[[], Tensor]
    channels_first: bool = False
    backend: str | None = None
    state: Tensor | None = None
    _gout: Tensor | None = field(default=None, repr=False)

    def in_our_layout(self, name: str, x: Tensor) -> Tensor:
        """A tensor of theirs with tokens second."""
        return x.movedim(-1, 1) if self.channels_first and name in (*_PER_TOKEN, "out") else x

    def result(self) -> Tensor:
        """The output in our layout."""
        with torch.no_grad():
            return self.in_our_layout("out", self.call())

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the leaves, in our layout, for one random gradient of the output."""
        return {name: self.in_our_layout(name, g) for name, g in zip(self.leaves, self.train(), strict=True)}

    def forward(self) -> None:
        """One call that records nothing for a backward."""
        with torch.no_grad():
            self.call()

    def train(self) -> tuple[Tensor, ...]:
        """One call and the gradients of every leaf."""
        y = self.call()
        return torch.autograd.grad(y, list(self.leaves.values()), self._random_like(y))

    def saved_bytes(self) -> int:
        """Bytes that a call keeps for its backward besides the leaves, storage that is shared counted once."""
        kept: dict[int, int] = {}
        known = {x.untyped_storage().data_ptr() for x in self.leaves.values()}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = self.call()
        del y
        return sum(kept.values())

    def _random_like(self, y: Tensor) -> Tensor:
        # random, since what is the same everywhere can run faster than real values do
        if self._gout is None:
            shape = self.in_our_layout("out", y).shape
            generator = torch.Generator(y.device).manual_seed(1)
            gout = torch.randn(shape, generator=generator, device=y.device, dtype=y.dtype)
            self._gout = gout.movedim(1, -1).contiguous() if self.channels_first else gout
        return self._gout


def own_backend(op: str, x: Tensor) -> str:
    """Our own fastest way to do a call on ``x``, other people's libraries left out."""
    table = dispatch.TABLES[op]
    facts = {"device": x.device.type, "dtype": x.dtype}
    return "cuda" if "cuda" in table and table["cuda"].refuse(facts) is None else "chunked"


def _leaves(inputs: Inputs, *names: str) -> dict[str, Tensor]:
    # the same storage: at a length of a million a copy is 10 GB
    return {name: inputs[name].detach().requires_grad_() for name in names}


_SCAN = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
_PATHS = ("u", "low", "A", "D", "dt_bias", "dt_weight")


def _along_walks(u: Tensor, low: Tensor, A: Tensor, dt_weight: Tensor, **more: Any) -> Tensor:
    """Our scan along the rows and columns of a square image, there and back."""
    h, r, n = math.isqrt(u.shape[1]), dt_weight.shape[-1], A.shape[-1]
    paths = [(h, h, *strides, back) for back in (0, 1) for strides in ((h, 1), (1, h))]
    dt, B, C = low.movedim(2, 0).split([r, n, n], -1)
    return selective_scan(u, dt, A, B.unsqueeze(-2), C.unsqueeze(-2), dt_weight=dt_weight, paths=paths, **more)


# by op: the function, the name that its backends go by, and options
_OURS: dict[str, tuple[Callable[..., Tensor], str, dict[str, Any]]] = {
    "scan": (selective_scan, "selective_scan", {"dt_softplus": True}),
    "paths": (_along_walks, "selective_scan", {"dt_softplus": True}),
    "ssd": (lambda u, **more: ssd(u, **more), "ssd", {"dt_softplus": True}),
    "conv": (causal_conv1d, "causal_conv1d", {"activation": "silu"}),
    "decode": (selective_state_update, "update", {"dt_softplus": True}),
}


def ours(what: str, inputs: Inputs) -> Timed:
    """Our op on its own layout, by our own backend; attention by the backend that is chosen."""
    if what == "attention":
        return _attention(inputs, None)
    op, name, options = _OURS[what]
    own = own_backend(name, next(iter(inputs.values())))
    if "state" in inputs:
        given = inputs | {"state": inputs["state"].clone()}
        return Timed({}, lambda: op(**given, **options, backend=own), backend=own, state=given["state"])
    leaves = _leaves(inputs, *inputs)
    return Timed(leaves, lambda: op(**leaves, **options, backend=own), backend=own)


def _paths_mamba_ssm(i: Inputs) -> Timed:
    """mamba-ssm's CUDA kernel on four copies of the image, walked in turn, as VMamba calls it; a product makes the step sizes."""
    scan = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    leaves = _leaves(i, *_PATHS)
    h, r, n = math.isqrt(i["u"].shape[1]), i["dt_weight"].shape[-1], i["A"].shape[-1]

    def turned(x: Tensor) -> Tensor:
        # (..., l), rows to columns or back
        return x.unflatten(-1, (h, h)).mT.flatten(-2)

    def call() -> Tensor:
        u, low, A, D, bias, weight = leaves.values()
        u, (a, b, c, d) = u.mT, low.permute(2, 0, 3, 1)
        xs = torch.stack([u, turned(u)], 1)
        xs = torch.cat([xs, xs.flip(-1)], 1)
        lows = torch.stack([a, turned(b), c.flip(-1), turned(d).flip(-1)], 1)
        dt, B, C = lows.split([r, n, n], 2)
        dt = torch.einsum("bkrl,kdr->bkdl", dt, weight).flatten(1, 2)
        y = scan(xs.flatten(1, 2), dt, A.flatten(0, 1), B, C, D.flatten(), None, bias.flatten(), True)
        y = y.unflatten(1, (4, -1))
        y = y[:, :2] + y[:, 2:].flip(-1)
        return (y[:, 0] + turned(y[:, 1])).mT

    return Timed(leaves, call)


def _first(inputs: Inputs, *names: str) -> dict[str, Tensor]:
    """Leaves with tokens last."""
    moved = {k: inputs[k].movedim(1, -1).contiguous() if k in _PER_TOKEN else inputs[k] for k in names}
    return _leaves(moved, *names)


def _scan_transformers(i: Inputs) -> Timed:
    """The torch path of transformers' Mamba, channels first."""
    scan = import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan
    leaves = _first(i | {"B": i["B"][:, :, 0], "C": i["C"][:, :, 0]}, *_SCAN)
    u, dt, A, B, C, D, z, bias = leaves.values()
    return Timed(leaves, lambda: scan(u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True), True)


def _scan_mambapy(i: Inputs) -> Timed:
    """The block of mambapy: discretisation and its parallel scan; bias, softplus and gate around it as in the block."""
    block = import_module("mambapy.mamba").MambaBlock
    leaves = _leaves(i | {"B": i["B"][:, :, 0], "C": i["C"][:, :, 0]}, *_SCAN)

    def call() -> Tensor:
        u, dt, A, B, C, D, z, bias = leaves.values()
        return block.selective_scan(None, u, F.softplus(dt + bias), A, B, C, D) * F.silu(z)

    return Timed(leaves, call)


def _scan_mamba_ssm(i: Inputs) -> Timed:
    """mamba-ssm's CUDA kernel, channels first."""
    scan = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    leaves = _first(i, *_SCAN)
    return Timed(leaves, lambda: scan(*leaves.values(), delta_softplus=True), True)


def _ssd_transformers(i: Inputs) -> Timed:
    """The torch path of transformers' Mamba-2, with the gate that its norm applies."""
    scan = import_module("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
    leaves = _leaves(i, *_SCAN)

    def call() -> Tensor:
        x, dt, A, B, C, D, z, bias = leaves.values()
        y = scan(x, dt, A, B, C, 64, D=D, dt_bias=bias, dt_softplus=True)
        y = y[0] if isinstance(y, tuple) else y
        return y.view_as(z) * F.silu(z)

    return Timed(leaves, call)


def _ssd_mamba_ssm(i: Inputs) -> Timed:
    """mamba-ssm's Triton kernels."""
    scan = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    leaves = _leaves(i, *_SCAN)
    x, dt, A, B, C, D, z, bias = leaves.values()
    return Timed(leaves, lambda: scan(x, dt, A, B, C, 256, D=D, z=z, dt_bias=bias, dt_softplus=True))


def _ssd_fla(i: Inputs) -> Timed:
    """flash-linear-attention's Triton kernels of simple GLA, the same recurrence; step sizes, skip and gate are PyTorch's around it."""
    scan = import_module("fla.ops.simple_gla").chunk_simple_gla
    leaves = _leaves(i, *_SCAN)
    heads = i["u"].shape[2]

    def call() -> Tensor:
        x, dt, A, B, C, D, z, bias = leaves.values()
        B, C = (m.repeat_interleave(heads // m.shape[2], 2) for m in (B, C))
        dt = F.softplus(dt.float() + bias)
        y, _ = scan(C, B, (x * dt[..., None]).to(x.dtype), dt * A, scale=1.0)
        return ((y + D[:, None] * x) * F.silu(z.float())).to(x.dtype)

    return Timed(leaves, call)


def _conv_library(i: Inputs) -> Timed:
    """causal-conv1d's kernel on (b, d, l), the layout that mamba-ssm calls it with."""
    conv = import_module("causal_conv1d").causal_conv1d_fn
    leaves = _first(i, "x", "weight", "bias")
    return Timed(leaves, lambda: conv(*leaves.values(), activation="silu"), True)


def _conv_library_last(i: Inputs) -> Timed:
    """causal-conv1d's other kernel, for (b, d, l) views of tensors with channels last."""
    conv = import_module("causal_conv1d").causal_conv1d_fn
    leaves = _leaves(i, "x", "weight", "bias")
    x, weight, bias = leaves.values()
    return Timed(leaves, lambda: conv(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2))


def _decode_mamba_ssm(i: Inputs) -> Timed:
    """mamba-ssm's Triton kernel on the same float32 state."""
    update = import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    u, dt, A, B, C, D, z, bias = (i[name] for name in _SCAN)
    state = i["state"].clone()
    return Timed(
        {}, lambda: update(state, u, dt, A, B[:, 0], C[:, 0], D, z=z, dt_bias=bias, dt_softplus=True), state=state
    )


def _attention(i: Inputs, backend: str | None) -> Timed:
    """Attention between its projections, by one of its backends or the one that is chosen."""
    leaves, (h, p), kv = _leaves(i, "q", "k", "v"), i["q"].shape[2:], i["k"].shape[2]
    window = int(i["window"]) if "window" in i else None
    layer = Attention(h * p, h, kv, p, rope=None, window=window, device="meta")
    seq = Seq.from_documents(i["documents"], i["q"].device) if "documents" in i else None
    name = dispatch.choose("attention", backend=backend, **layer.facts(i["q"], seq)).name
    return Timed(leaves, lambda: layer.mix(**leaves, seq=seq, backend=backend), backend=name)


Make = Callable[[Inputs], Timed]
# by op; the convolution's peers stand in for mamba_ssm, which calls that library
PEERS: dict[str, dict[str, Make]] = {
    "scan": {"transformers": _scan_transformers, "mambapy": _scan_mambapy, "mamba_ssm": _scan_mamba_ssm},
    "paths": {"mamba_ssm": _paths_mamba_ssm},
    "ssd": {"transformers": _ssd_transformers, "mamba_ssm": _ssd_mamba_ssm, "fla-core": _ssd_fla},
    "conv": {"causal_conv1d": _conv_library, "causal_conv1d, channels last": _conv_library_last},
    "decode": {"mamba_ssm": _decode_mamba_ssm},
    "attention": {name: partial(_attention, backend=name) for name in dispatch.TABLES["attention"]},
}


def default_peers(what: str) -> list[str]:
    """The peers that make sense on this machine's device."""
    if what == "attention":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        facts = {"device": device, "dtype": torch.bfloat16, "packed": True}
        able = [name for name, backend in dispatch.TABLES[what].items() if backend.refuse(facts) is None]
        return [name for name in able if name != "math" or device == "cpu"]
    if torch.cuda.is_available():
        return ["mamba_ssm", *(["fla-core"] if what == "ssd" and find_spec("fla") else [])]
    return [name for name in PEERS[what] if name not in ("mamba_ssm", "fla-core")]
