"""The workloads of the benchmarks: ops at the shapes of real models, their inputs, the ratios to reach, the floors under their times."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Goals = dict[tuple[str, str], float]
BF16 = torch.bfloat16
_PASSES = (("forward", "forward+backward"), ("step", "step in a CUDA graph"))


@dataclass(frozen=True)
class Workload:
    """An op at one shape.

    Attributes:
        name: Its key in the results.
        title: The same for a reader.
        op: ``"scan"``, ``"paths"`` (the scan of an image along four walks), ``"ssd"``, ``"conv"``, ``"decode"`` or ``"attention"``.
        shape: By the glossary's letters; of attention also the ``kv`` heads, tokens of a packed ``doc``, and of the window ``w``.
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
            return getattr(self, f"_{self.op}")(**self.shape)

    def _random(self, names: str, *shape: int) -> Inputs:
        return {name: torch.randn(shape, dtype=self.dtype) for name in names.split()}

    def _scan(self, b: int, d: int, n: int, l: int | None = None, g: int = 1) -> Inputs:
        rows = (b,) if l is None else (b, l)
        return (
            self._random("u dt z", *rows, d) | self._random("B C", *rows, g, n) | _parameters(d) | {"A": _decays(d, n)}
        )

    def _decode(self, b: int, d: int, n: int) -> Inputs:
        return self._scan(b, d, n) | {"state": torch.randn(b, d, n)}

    def _paths(self, b: int, l: int, d: int, n: int, k: int, r: int) -> Inputs:
        # as one projection leaves them: per token and walk the low-rank step sizes, B and C
        made = self._random("u", b, l, d) | self._random("low", b, l, k, r + 2 * n) | {"A": _decays(k, d, n)}
        return made | _parameters(k, d) | {"dt_weight": (torch.randn(k, d, r) / r**0.5).to(self.dtype)}

    def _ssd(self, b: int, l: int, h: int, p: int, n: int) -> Inputs:
        made = self._random("u z", b, l, h, p) | self._random("B C", b, l, 1, n) | self._random("dt", b, l, h)
        return made | {"A": -torch.empty(h).uniform_(1, 16)} | _parameters(h)

    def _attention(self, b: int, l: int, h: int, kv: int, p: int, doc: int = 0, w: int = 0) -> Inputs:
        made = self._random("q", b, l, h, p) | self._random("k v", b, l, kv, p)
        # the host knows where documents start, as where it has packed them
        made |= {"documents": (torch.arange(l, device="cpu") // doc).repeat(b, 1)} if doc else {}
        return made | ({"window": torch.tensor(w, device="cpu")} if w else {})

    def _conv(self, b: int, l: int, d: int, k: int) -> Inputs:
        weight, bias = torch.randn(d, k, dtype=self.dtype) / k, torch.randn(d, dtype=self.dtype)
        return self._random("x", b, l, d) | {"weight": weight, "bias": bias}


def _decays(*shape: int) -> Tensor:
    return -torch.arange(1.0, shape[-1] + 1).repeat(*shape[:-1], 1)


def _parameters(*shape: int) -> Inputs:
    return {"D": torch.ones(shape), "dt_bias": torch.empty(shape).uniform_(-7, -2.3)}


# tensors of the width of u, and of that of B or of the projection, that a forward moves, and a forward with its backward: inputs and
# the output; then the inputs again, the gradient of the output, and a gradient for every input
_OPERANDS = {"scan": ((4, 2), (11, 6)), "paths": ((2, 1), (5, 3)), "conv": ((2, 0), (5, 0)), "decode": ((4, 2),)}


def counts(workload: Workload, what: str) -> tuple[int, int]:
    """The fewest bytes a pass must move (each operand once per direction) and the exponentials it must compute.

    The exponentials are those of the decays, one per channel, state and token, which the backward needs again. Those of softplus and
    the gate, and parameters, are left out, so that the floor is a floor.
    """
    s, op, twice = workload.shape, workload.op, what == "forward+backward"
    d, n, walks = s["d"], s.get("n", 0), s["k"] if op == "paths" else 1
    wide, narrow = _OPERANDS[op][twice]
    operands = wide * d + narrow * (walks * (s["r"] + 2 * n) if op == "paths" else s.get("g", 1) * n)
    state = 2 * 4 * d * n if op == "decode" else 0
    tokens = s["b"] * s.get("l", 1)
    return tokens * (workload.dtype.itemsize * operands + state), (1 + twice) * tokens * walks * d * n


def floor_ms(workload: Workload, what: str, ceilings: dict[str, float]) -> tuple[float, str]:
    """The time that no version can beat on a device with these ceilings, and which of them binds."""
    moved, exps = counts(workload, what)
    rate = "sfu_Gexps" if "sfu_Gexps" in ceilings else "exp_Gs"
    by_bytes, by_exps = moved / ceilings["copy_TBs"] / 1e9, exps / ceilings[rate] / 1e6
    return (by_bytes, "bytes") if by_bytes >= by_exps else (by_exps, "exponentials")


def title(name: str) -> str:
    """A workload's name for a reader."""
    return next((w.title for works in WORKLOADS.values() for w in works if w.name == name), "") or name


def _on_gpu(
    part: str, name: str, title: str, goals: tuple[float, float] = (1, 1), dtype: torch.dtype = BF16, **shape: int
) -> Workload:
    op = part if part in ("paths", "conv", "decode") else "scan"
    peers = ("causal_conv1d", "causal_conv1d, channels last") if op == "conv" else ("mamba_ssm",)
    aims = {(peer, p): goal for peer in peers for p, goal in zip(_PASSES[op == "decode"], goals, strict=True)}
    return Workload(name, op, shape, title, dtype, "cuda", aims, part)


_GPU_SCANS = [
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
            "paths", f"vmamba-{h}x{h}-n{n}", f"four walks over {h} × {h}, n = {n}", b=b, l=h * h, d=d, n=n, k=4, r=r
        )
        for b, h, d, n, r in ((64, 56, 192, 16, 6), (64, 14, 768, 16, 24), (128, 56, 96, 1, 6))
    ),
    # and the smallest: its third and last stage
    *(
        _on_gpu(
            "paths",
            f"vmamba-{h}x{h}-n1",
            f"four walks over {h} × {h}, n = 1",
            (1, 1.2),
            b=128,
            l=h * h,
            d=d,
            n=1,
            k=4,
            r=r,
        )
        for h, d, r in ((14, 384, 24), (7, 768, 48))
    ),
    *(
        _on_gpu("length", f"length-{k}k", f"one row of {k << 10:,} tokens", b=1, l=k << 10, d=1536, n=16)
        for k in (1, 4, 16, 64, 256, 1024)
    ),
    *(_on_gpu("state", f"state-{n}", f"Mamba 130M, n = {n}", b=8, l=2048, d=1536, n=n) for n in (1, 8, 64, 128, 256)),
    *(
        _on_gpu("dtype", f"train-{size}-{name}", f"Mamba {size.upper()}, {name}", dtype=dtype, b=8, l=2048, d=d, n=16)
        for size, d in (("1.4b", 4096), ("130m", 1536))
        for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32))
    ),
    *(_on_gpu("decode", f"decode-b{b}", f"decoding, {b} at a time", b=b, d=4096, n=16) for b in (1, 64, 256)),
    *(_on_gpu("conv", f"conv-w{k}", f"convolution of width {k}", b=8, l=2048, d=4096, k=k) for k in (2, 3, 4)),
]


def _attends(part: str, b: int, l: int, h: int, kv: int, p: int, **more: int) -> Workload:
    name = f"{part}-b{b}-l{l}-p{p}"
    heads = f"{h} heads" + (f", {kv} of keys" if kv != h else "")
    extra = "".join(
        f", {what} of {more[key]}" for key, what in (("doc", "documents"), ("w", "a window")) if key in more
    )
    words = f"{b} × {l:,} tokens, {heads}, {p} channels{extra}"
    return Workload(
        name, "attention", {"b": b, "l": l, "h": h, "kv": kv, "p": p, **more}, words, BF16, "cuda", {}, part
    )


_ATTENTION = [
    *(
        _attends("table", *shape)
        for shape in (
            (8, 2048, 12, 12, 64),
            (4, 4096, 16, 16, 64),
            (16, 1024, 32, 8, 128),
            (8, 2048, 32, 8, 128),
            (4, 4096, 32, 8, 128),
            (1, 32768, 32, 8, 128),
        )
    ),
    *(
        _attends("packed", *shape, doc=512)
        for shape in ((8, 2048, 12, 12, 64), (1, 16384, 12, 12, 64), (8, 2048, 32, 8, 128), (4, 4096, 32, 8, 128))
    ),
    _attends("window", 8, 2048, 12, 12, 64, w=256),
    _attends("window", 4, 4096, 16, 16, 64, w=2048),
    _attends("window", 4, 8192, 32, 8, 128, w=1024),
]
_GPU_SSD = [
    Workload(
        name,
        "ssd",
        {"b": b, "l": l, "h": h, "p": 64, "n": 128},
        f"Mamba-2 {words}",
        BF16,
        "cuda",
        {("mamba_ssm", p): goal for p, goal in zip(_PASSES[0], goals, strict=True)},
    )
    for name, words, b, l, h, goals in (
        ("train-1.3b", "1.3B, training", 8, 2048, 64, (3.0, 2.5)),
        ("train-2.7b", "2.7B, training", 4, 2048, 80, (3.0, 2.5)),
        ("train-mamba2-130m", "130M, training", 8, 2048, 24, (4.0, 4.0)),
        ("prefill-1.3b", "1.3B, prompt of 16,384 tokens", 1, 16384, 64, (2.5, 2.5)),
        ("short-mamba2-130m", "130M, row of 2,048 tokens", 1, 2048, 24, (5.0, 4.0)),
    )
]
_ROW = "one row of 2,048 tokens"
_CPU_RATIOS = {"transformers": (3.0, 50.0), "mambapy": (2.0, 2.0)}
_CPU_GOALS = {(peer, p): goal for peer, goals in _CPU_RATIOS.items() for p, goal in zip(_PASSES[0], goals, strict=True)}
WORKLOADS: dict[str, list[Workload]] = {
    "scan": [
        Workload("b1-l2k", "scan", {"b": 1, "l": 2048, "d": 512, "n": 16}, _ROW, goals=_CPU_GOALS),
        Workload("train-tiny", "scan", {"b": 16, "l": 256, "d": 256, "n": 16}, "a tiny model, training"),
        *_GPU_SCANS,
    ],
    "ssd": [
        Workload("b1-l2k", "ssd", {"b": 1, "l": 2048, "h": 8, "p": 64, "n": 64}, _ROW),
        *_GPU_SSD,
    ],
    "attention": [
        Workload("b1-l2k", "attention", {"b": 1, "l": 2048, "h": 4, "kv": 2, "p": 32, "doc": 256}, _ROW + ", packed"),
        *_ATTENTION,
    ],
}
