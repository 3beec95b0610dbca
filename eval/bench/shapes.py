"""What the benchmarks measure: shapes, their inputs, the ratios to reach, and the floor under each time."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Goals = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Case:
    """One shape to measure.

    Attributes:
        name: What it stands for.
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
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    goals: Goals = field(default_factory=dict)
    part: str = "table"

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed."""
        return ("step", "step in a CUDA graph") if self.op == "decode" else ("forward", "forward+backward")

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


def counts(case: Case, what: str) -> tuple[int, int]:
    """The fewest bytes a pass must move (each operand once per direction) and the exponentials it must compute.

    The exponentials are those of the decays, one per channel, state and token, which the backward needs again. Those of softplus and
    the gate, and parameters, are left out, so that the floor is a floor.
    """
    s, size = case.shape, case.dtype.itemsize
    if case.op == "decode":
        return s["b"] * (2 * 4 * s["d"] * s["n"] + size * (4 * s["d"] + 2 * s["n"])), s["b"] * s["d"] * s["n"]
    tokens = s["b"] * s["l"]
    if case.op == "paths":
        walks = s["k"] * (s["r"] + 2 * s["n"])
        passes = (2 * s["d"] + walks, 1) if what == "forward" else (5 * s["d"] + 3 * walks, 2)
        return tokens * size * passes[0], passes[1] * tokens * s["k"] * s["d"] * s["n"]
    # forward: inputs and the output; backward: inputs, the gradient of the output, and a gradient for every input
    if case.op == "conv":
        return tokens * s["d"] * size * (2 if what == "forward" else 5), 0
    wide, narrow = s["d"], s.get("g", 1) * s["n"]
    if what == "forward":
        return tokens * size * (4 * wide + 2 * narrow), tokens * s["d"] * s["n"]
    return tokens * size * (11 * wide + 6 * narrow), 2 * tokens * s["d"] * s["n"]


def floor_ms(case: Case, what: str, ceilings: dict[str, float]) -> tuple[float, str]:
    """The time that no version can beat on a device with these ceilings, and which of them binds."""
    moved, exps = counts(case, what)
    rate = ceilings["sfu_Gexps"] if "sfu_Gexps" in ceilings else ceilings["exp_Gs"]
    by_bytes, by_exps = moved / ceilings["copy_TBs"] / 1e9, exps / rate / 1e6
    return (by_bytes, "bytes") if by_bytes >= by_exps else (by_exps, "exponentials")


_CPU_GOALS: Goals = {
    ("transformers", "forward"): 3.0,
    ("transformers", "forward+backward"): 50.0,
    ("mambapy", "forward"): 2.0,
    ("mambapy", "forward+backward"): 2.0,
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _scan_case(
    name: str, b: int, l: int, d: int, n: int = 16, g: int = 1, *, part: str, goals: tuple[float, float] = (1.0, 1.0),
    dtype: torch.dtype = BF16,
) -> Case:  # fmt: skip
    aims = {("mamba_ssm", "forward"): goals[0], ("mamba_ssm", "forward+backward"): goals[1]}
    shape = {"b": b, "l": l, "d": d, "n": n} | ({"g": g} if g > 1 else {})
    return Case(name, "scan", shape, dtype, "cuda", aims, part)


def _gpu_scans() -> list[Case]:
    goals = {("mamba_ssm", "step"): 1.0, ("mamba_ssm", "step in a CUDA graph"): 1.0}
    both = {("mamba_ssm", what): 1.0 for what in ("forward", "forward+backward")}
    beside = {(peer, p): 1.0 for peer in _CONV_PEERS for p in ("forward", "forward+backward")}
    table = [
        _scan_case("train-1.4b", 8, 2048, 4096, part="table", goals=(3, 3)),
        _scan_case("train-2.8b", 4, 2048, 5120, part="table", goals=(3, 3)),
        _scan_case("train-130m", 8, 2048, 1536, part="table", goals=(3, 3)),
        _scan_case("prefill-b1", 1, 16384, 4096, part="table", goals=(3, 3)),
        _scan_case("short-b1", 1, 2048, 1536, part="table", goals=(2, 2.5)),
        # four directions, each with its own B and C
        _scan_case("vision-stage1", 64, 3136, 768, g=4, part="table", goals=(6, 5)),
        _scan_case("vision-stage3", 64, 196, 3072, g=4, part="table", goals=(6, 4)),
    ]
    # VMamba's first and third stage: 56 x 56 and 14 x 14, published with 16 states (vanilla) and with one
    paths = [
        Case(
            f"vmamba-{h}x{h}-n{n}",
            "paths",
            {"b": b, "l": h * h, "d": d, "n": n, "k": 4, "r": r},
            BF16,
            "cuda",
            both,
            "paths",
        )
        for b, h, d, n, r in ((64, 56, 192, 16, 6), (64, 14, 768, 16, 24), (128, 56, 96, 1, 6), (128, 14, 384, 1, 24))
    ]
    length = [_scan_case(f"length-{k}k", 1, k << 10, 1536, part="length") for k in (1, 4, 16, 64, 256, 1024)]
    state = [_scan_case(f"state-{n}", 8, 2048, 1536, n, part="state") for n in (1, 8, 64, 128, 256)]
    dtypes = [
        _scan_case(f"{name}-{label}", 8, 2048, d, part="dtype", dtype=dtype)
        for name, d in (("train-1.4b", 4096), ("train-130m", 1536))
        for label, dtype in (("fp16", FP16), ("fp32", FP32))
    ]
    steps = [
        Case(f"decode-b{b}", "decode", {"b": b, "d": 4096, "n": 16}, BF16, "cuda", goals, "decode")
        for b in (1, 64, 256)
    ]
    convs = [
        Case(f"conv-w{k}", "conv", {"b": 8, "l": 2048, "d": 4096, "k": k}, BF16, "cuda", beside, "conv")
        for k in (2, 3, 4)
    ]
    return [*table, *paths, *length, *state, *dtypes, *steps, *convs]


_CONV_PEERS = ("causal_conv1d", "causal_conv1d, channels last")
CASES: dict[str, list[Case]] = {
    "scan": [
        Case("b1-l2k", "scan", {"b": 1, "l": 2048, "d": 512, "n": 16}, goals=_CPU_GOALS),
        Case("train-tiny", "scan", {"b": 16, "l": 256, "d": 256, "n": 16}),
        *_gpu_scans(),
    ],
    "ssd": [
        Case("b1-l2k", "ssd", {"b": 1, "l": 2048, "h": 8, "p": 64, "n": 64}),
        Case("train-1.3b", "ssd", {"b": 8, "l": 2048, "h": 64, "p": 64, "n": 128}, BF16, "cuda"),
    ],
}
