"""The workloads of the benchmarks: ops at the shapes of real models, their inputs, the ratios to reach, the floors under their times."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Goals = dict[tuple[str, str], float]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_PASSES = (("forward", "forward+backward"), ("step", "step in a CUDA graph"))


@dataclass(frozen=True)
class Workload:
    """An op at one shape.

    Attributes:
        name: Its key in the results.
        title: The same for a reader.
        op: ``"scan"``, ``"paths"`` (the scan of an image along four walks), ``"ssd"``, ``"conv"`` or ``"decode"``.
        shape: By the glossary's letters.
        dtype: Of the activations; parameters and states are float32.
        device: Where it is worth measuring.
        goals: The ratio to reach, by peer and pass.
        part: The group that it is measured with.
    """

    name: str
    op: str
    shape: dict[str, int]
    title: str = ""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    goals: Goals = field(default_factory=dict)
    part: str = "table"

    @property
    def passes(self) -> tuple[str, ...]:
        """The calls that are timed."""
        return _PASSES[self.op == "decode"]

    def inputs(self) -> Inputs:
        """Random inputs such as a freshly initialised layer would see: step sizes of 0.001 to 0.1, decay rates of 1 to 16."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return getattr(self, f"_{self.op}")()

    def _scan(self) -> Inputs:
        b, l, d, n = (self.shape[k] for k in "bldn")
        made = {name: torch.randn(b, l, d, dtype=self.dtype) for name in ("u", "dt", "z")}
        made |= {name: torch.randn(b, l, self.shape.get("g", 1), n, dtype=self.dtype) for name in ("B", "C")}
        made |= {"A": -torch.arange(1.0, n + 1).repeat(d, 1), "D": torch.ones(d), "dt_bias": _bias(d)}
        return made

    def _paths(self) -> Inputs:
        b, l, d, n, k, r = (self.shape[key] for key in "bldnkr")
        # as one projection leaves them: per token and walk the low-rank step sizes, B and C
        made = {"u": torch.randn(b, l, d, dtype=self.dtype), "low": torch.randn(b, l, k, r + 2 * n, dtype=self.dtype)}
        made |= {
            "A": -torch.arange(1.0, n + 1).repeat(k, d, 1),
            "D": torch.ones(k, d),
            "dt_bias": _bias(k * d).view(k, d),
        }
        return made | {"dt_weight": (torch.randn(k, d, r) / r**0.5).to(self.dtype)}

    def _ssd(self) -> Inputs:
        b, l, h, p, n = (self.shape[k] for k in "blhpn")
        made = {name: torch.randn(b, l, h, p, dtype=self.dtype) for name in ("u", "z")}
        made |= {name: torch.randn(b, l, 1, n, dtype=self.dtype) for name in ("B", "C")}
        made |= {"dt": torch.randn(b, l, h, dtype=self.dtype), "A": -torch.empty(h).uniform_(1, 16)}
        return made | {"D": torch.ones(h), "dt_bias": _bias(h)}

    def _conv(self) -> Inputs:
        b, l, d, k = (self.shape[key] for key in "bldk")
        weight, bias = torch.randn(d, k, dtype=self.dtype) / k, torch.randn(d, dtype=self.dtype)
        return {"x": torch.randn(b, l, d, dtype=self.dtype), "weight": weight, "bias": bias}

    def _decode(self) -> Inputs:
        b, d, n = (self.shape[k] for k in "bdn")
        made = {name: torch.randn(b, d, dtype=self.dtype) for name in ("u", "dt", "z")}
        made |= {name: torch.randn(b, 1, n, dtype=self.dtype) for name in ("B", "C")}
        made |= {"A": -torch.arange(1.0, n + 1).repeat(d, 1), "D": torch.ones(d), "dt_bias": _bias(d)}
        return made | {"state": torch.randn(b, d, n)}


def _bias(d: int) -> Tensor:
    return torch.empty(d).uniform_(-7, -2.3)


def counts(workload: Workload, what: str) -> tuple[int, int]:
    """The fewest bytes a pass must move (each operand once per direction) and the exponentials it must compute.

    The exponentials are those of the decays, one per channel, state and token, which the backward needs again. Those of softplus and
    the gate, and parameters, are left out, so that the floor is a floor.
    """
    s, size = workload.shape, workload.dtype.itemsize
    if workload.op == "decode":
        return s["b"] * (2 * 4 * s["d"] * s["n"] + size * (4 * s["d"] + 2 * s["n"])), s["b"] * s["d"] * s["n"]
    tokens = s["b"] * s["l"]
    if workload.op == "paths":
        walks = s["k"] * (s["r"] + 2 * s["n"])
        passes = (2 * s["d"] + walks, 1) if what == "forward" else (5 * s["d"] + 3 * walks, 2)
        return tokens * size * passes[0], passes[1] * tokens * s["k"] * s["d"] * s["n"]
    # forward: inputs and the output; backward: inputs, the gradient of the output, and a gradient for every input
    if workload.op == "conv":
        return tokens * s["d"] * size * (2 if what == "forward" else 5), 0
    wide, narrow = s["d"], s.get("g", 1) * s["n"]
    if what == "forward":
        return tokens * size * (4 * wide + 2 * narrow), tokens * s["d"] * s["n"]
    return tokens * size * (11 * wide + 6 * narrow), 2 * tokens * s["d"] * s["n"]


def floor_ms(workload: Workload, what: str, ceilings: dict[str, float]) -> tuple[float, str]:
    """The time that no version can beat on a device with these ceilings, and which of them binds."""
    moved, exps = counts(workload, what)
    rate = ceilings["sfu_Gexps"] if "sfu_Gexps" in ceilings else ceilings["exp_Gs"]
    by_bytes, by_exps = moved / ceilings["copy_TBs"] / 1e9, exps / rate / 1e6
    return (by_bytes, "bytes") if by_bytes >= by_exps else (by_exps, "exponentials")


def title(name: str) -> str:
    """A workload's name for a reader."""
    return next((w.title for works in WORKLOADS.values() for w in works if w.name == name), "") or name


def _on_gpu(
    part: str, name: str, title: str, goals: tuple[float, float] = (1, 1), op: str = "scan", dtype: torch.dtype = BF16, **shape: int
) -> Workload:  # fmt: skip
    peers = ("causal_conv1d", "causal_conv1d, channels last") if op == "conv" else ("mamba_ssm",)
    aims = {(peer, p): goal for peer in peers for p, goal in zip(_PASSES[op == "decode"], goals, strict=True)}
    return Workload(name, op, shape, title, dtype, "cuda", aims, part)


def _gpu_scans() -> list[Workload]:
    return [
        _on_gpu("table", "train-1.4b", "Mamba 1.4B, training", (3, 3), b=8, l=2048, d=4096, n=16),
        _on_gpu("table", "train-2.8b", "Mamba 2.8B, training", (3, 3), b=4, l=2048, d=5120, n=16),
        _on_gpu("table", "train-130m", "Mamba 130M, training", (3, 3), b=8, l=2048, d=1536, n=16),
        _on_gpu("table", "prefill-b1", "Mamba 1.4B, prompt of 16,384 tokens", (3, 3), b=1, l=16384, d=4096, n=16),
        _on_gpu("table", "short-b1", "Mamba 130M, row of 2,048 tokens", (2, 2.5), b=1, l=2048, d=1536, n=16),
        # four directions, each with its own B and C
        _on_gpu("table", "vision-stage1", "VMamba, 64 images of 56 × 56", (6, 5), b=64, l=3136, d=768, n=16, g=4),
        _on_gpu("table", "vision-stage3", "VMamba, 64 images of 14 × 14", (6, 4), b=64, l=196, d=3072, n=16, g=4),
        # VMamba's first and third stage, published with 16 states (vanilla) and with one
        *(
            _on_gpu(
                "paths",
                f"vmamba-{h}x{h}-n{n}",
                f"four walks over {h} × {h}, n = {n}",
                op="paths",
                b=b,
                l=h * h,
                d=d,
                n=n,
                k=4,
                r=r,
            )
            for b, h, d, n, r in (
                (64, 56, 192, 16, 6),
                (64, 14, 768, 16, 24),
                (128, 56, 96, 1, 6),
                (128, 14, 384, 1, 24),
            )
        ),
        *(
            _on_gpu("length", f"length-{k}k", f"one row of {k << 10:,} tokens", b=1, l=k << 10, d=1536, n=16)
            for k in (1, 4, 16, 64, 256, 1024)
        ),
        *(
            _on_gpu("state", f"state-{n}", f"Mamba 130M, n = {n}", b=8, l=2048, d=1536, n=n)
            for n in (1, 8, 64, 128, 256)
        ),
        *(
            _on_gpu(
                "dtype", f"train-{size}-{label}", f"Mamba {size.upper()}, {label}", dtype=dtype, b=8, l=2048, d=d, n=16
            )
            for size, d in (("1.4b", 4096), ("130m", 1536))
            for label, dtype in (("fp16", FP16), ("fp32", FP32))
        ),
        *(
            _on_gpu("decode", f"decode-b{b}", f"decoding, {b} at a time", op="decode", b=b, d=4096, n=16)
            for b in (1, 64, 256)
        ),
        *(
            _on_gpu("conv", f"conv-w{k}", f"convolution of width {k}", op="conv", b=8, l=2048, d=4096, k=k)
            for k in (2, 3, 4)
        ),
    ]


_ROW = "one row of 2,048 tokens"
_CPU_GOALS: Goals = {
    ("transformers", "forward"): 3.0,
    ("transformers", "forward+backward"): 50.0,
    ("mambapy", "forward"): 2.0,
    ("mambapy", "forward+backward"): 2.0,
}
WORKLOADS: dict[str, list[Workload]] = {
    "scan": [
        Workload("b1-l2k", "scan", {"b": 1, "l": 2048, "d": 512, "n": 16}, _ROW, goals=_CPU_GOALS),
        Workload("train-tiny", "scan", {"b": 16, "l": 256, "d": 256, "n": 16}, "a tiny model, training"),
        *_gpu_scans(),
    ],
    "ssd": [
        Workload("b1-l2k", "ssd", {"b": 1, "l": 2048, "h": 8, "p": 64, "n": 64}, _ROW),
        Workload(
            "train-1.3b", "ssd", {"b": 8, "l": 2048, "h": 64, "p": 64, "n": 128}, "Mamba-2 1.3B, training", BF16, "cuda"
        ),
    ],
}
