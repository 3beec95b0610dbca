"""Training steps of whole models beside mamba-ssm's own: speed, memory, and the losses of the first steps from the same weights.

Each side runs in a process of its own, so that neither sees the other's memory; both read one batch and the weights that the peer drew.
A variant changes one thing of ours, which says what that thing is worth.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...kernels import dispatch
from ...zoo.models.build import build
from ...zoo.train.captured_step import CapturedStep
from ..result_file import Row, Tick
from .apart import answer, run_apart
from .timing import beside, wall_ms

PEERS = ["mamba_ssm"]
# in words for a picture, and what it is
VARIANTS = {
    "default": ("plain loop", "a plain loop: forward, loss.backward(), step"),
    "graph": ("CUDA graph", "forward and backward recorded as one CUDA graph (CapturedStep)"),
    "one-thread": (
        "as zoo train",
        "as zoo train does it: backward in the caller's thread (torch.autograd.set_multithreading_enabled)",
    ),
    "compile": ("torch.compile", "the backbone through torch.compile, block by block"),
    "logits": ("all logits", "the logits of all tokens at once in place of the chunked cross-entropy"),
    "mamba_ssm-scan": ("mamba-ssm's scan", "mamba-ssm's scan inside our layers"),
}
_JUDGED = ("default", "graph", "one-thread", "compile")
PARTS = {
    model if variant == "default" else f"{model}:{variant}": (model, variant)
    for model, variant in (
        *itertools.product(
            ("mamba-130m", "mamba-370m", "mamba2-130m", "mamba2-370m"), ("default", "graph", "one-thread")
        ),
        *itertools.product(("mamba-130m",), ("compile", "logits", "mamba_ssm-scan")),
        ("mamba-370m", "compile"),
    )
}
SHAPE = {"b": 8, "l": 2048}
GOAL_RATIO, GOAL_MEMORY = 2.0, 0.7
GOAL_RATIOS = {"mamba2-130m": 2.5}  # others than that
COMPARED, TIMED = 10, 50
# low enough for a first step without a warm-up: at 6e-4 the loss of mamba-370m jumps after six steps, and rounding decides where to
LR = 1e-4
# relative differences of the losses: at the same weights, and after some steps of a bfloat16 run
FIRST_LIMIT, LATER_LIMIT = 1e-3, 2e-2


def measure(vs: list[str], parts: list[str], tick: Tick, profile: bool = False) -> tuple[list[Row], list[str]]:
    """A row per part, each against every peer, and what failed; with ``profile``, the kernels of a step are printed instead.

    Raises:
        ValueError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench train: needs a CUDA device, and torch sees none.")
    rows, failed = [], []
    chosen = [PARTS[part] for part in parts]
    with tempfile.TemporaryDirectory() as folder:
        for model, peer in itertools.product(dict.fromkeys(model for model, _ in chosen), vs):
            weights = str(Path(folder) / f"{model}.safetensors")
            theirs: dict[str, Any] = {}
            for variant in [None, *(v for m, v in chosen if m == model)]:
                tick(f"{model}, {f'ours, {variant}' if variant else peer}")
                spec = {"side": "ours" if variant else peer, "model": model, "weights": weights, "profile": profile}
                try:
                    found = _run(spec | {"variant": variant}, folder)
                except RuntimeError as e:
                    failed.append(str(e))
                    if variant is None:
                        break  # without its weights there is nothing to compare
                    continue
                if variant is None:
                    theirs = found
                elif not profile:
                    rows.append(_row(model, variant, found, peer, theirs))
    return rows, failed


def _run(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    env = {"HYBRIDZOO_BACKEND": "mamba_ssm"} if spec.get("variant") == "mamba_ssm-scan" else {}
    return run_apart(__name__, spec, folder, env)


def main() -> None:
    """Train one side in its own process."""
    torch.manual_seed(0)
    answer(lambda spec: side(spec, "cuda"))


def side(spec: dict[str, Any], device: str, shape: dict[str, int] | None = None) -> dict[str, Any]:
    """Train one side for some steps; see :func:`measure`. The peer writes the file of weights that we read."""
    shape, variant = shape or SHAPE, spec.get("variant")
    loss, model = _MAKERS[spec["side"]](spec, device)
    ids = batch(model.get_parameter("backbone.embedding.weight").shape[0], shape["b"], shape["l"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    captured = CapturedStep(model, ids, autocast=torch.bfloat16) if variant == "graph" else None

    def differentiated() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            value = loss(ids)
        with torch.autograd.set_multithreading_enabled(variant != "one-thread"):
            value.backward()
        return value.detach()

    def step() -> Tensor:
        value = differentiated() if captured is None else captured(ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    losses = [step().item() for _ in range(COMPARED)]
    if spec.get("profile"):
        print_kernels(step, f"{spec['model']}, {spec['side']} {variant or ''}")
        return {}
    if device == "cuda" and captured is None:
        # what a graph works in, it has taken when it was recorded
        torch.cuda.reset_peak_memory_stats()
    times = _step_times(step, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    if captured is not None:
        # the first step of the optimiser made these, after the memory of the graph had been counted
        peak += sum(x.nbytes for kept in optimizer.state.values() for x in kept.values() if isinstance(x, Tensor))
    scan = "ssd" if spec["model"].startswith("mamba2") else "selective_scan"
    asked = (scan, "causal_conv1d") if spec["side"] == "ours" else ()
    return {
        "losses": losses,
        "times_ms": times,
        "peak_GiB": peak / 2**30,
        "params": sum(p.numel() for p in model.parameters()),
        "backends": {op: _chosen(op, device) for op in asked},
    }


def batch(rows: int, b: int, l: int) -> Tensor:
    """Token ids (b, l), the lower the likelier, so that there is something to learn within a few steps."""
    draw = torch.rand(b, l, generator=torch.Generator().manual_seed(0))
    return (draw**3 * rows).long().clamp(max=rows - 1)


def keep_weights(model: nn.Module, path: str) -> None:
    """Write all weights, tied ones under both names, which the format has no words for."""
    save_file({name: x.detach().clone().contiguous() for name, x in model.state_dict().items()}, path)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token loss from the logits of all tokens; they are not copied to be shifted."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def _ours(spec: dict[str, Any], device: str) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    variant = spec["variant"]
    # what runs is ours, also where the peers' libraries are installed
    for name in dispatch.installed:
        dispatch.installed[name] &= name == "mamba_ssm" and variant == "mamba_ssm-scan"
    model = build(spec["model"], device=device).train()
    model.load_state_dict(load_file(spec["weights"], device=device))
    if variant == "compile":
        for block in model.backbone.layers:
            block.compile()
    if variant == "logits":
        return lambda ids: cross_entropy(model(ids, return_state=False).logits, ids), model
    return lambda ids: model(ids, labels=ids).loss, model


def mamba_ssm_model(config: Any, device: str | None = None) -> nn.Module:
    """Return the model of mamba-ssm that has the sizes of a config of ours."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    same = build(config, device="meta")
    cfg, n_layer = same.cfg, len(same.backbone.layers)
    second = {"layer": "Mamba2"} if "mamba2" in cfg.layers else {}
    # as many rows as ours has, which may be padded to another multiple than theirs
    rows = same.get_parameter("backbone.embedding.weight").shape[0]
    theirs = MambaConfig(
        d_model=cfg.d_model, n_layer=n_layer, vocab_size=rows, pad_vocab_size_multiple=1, ssm_cfg=second
    )
    return MambaLMHeadModel(theirs, device=device)


def _mamba_ssm(spec: dict[str, Any], device: str) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    model = mamba_ssm_model(spec["model"], device)
    keep_weights(model, spec["weights"])
    return lambda ids: cross_entropy(model(ids).logits, ids), model


_MAKERS = {"ours": _ours, "mamba_ssm": _mamba_ssm}


def _step_times(step: Callable[[], Tensor], device: str) -> list[float]:
    if device != "cuda":
        return [wall_ms(step) for _ in range(TIMED)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _chosen(op: str, device: str) -> str:
    return next(name for name, taken, _ in dispatch.explain(op, device=device, dtype=torch.bfloat16) if taken)


def _row(model: str, variant: str, mine: dict[str, Any], peer: str, theirs: dict[str, Any]) -> Row:
    tokens = SHAPE["b"] * SHAPE["l"]
    goal = GOAL_RATIOS.get(model, GOAL_RATIO) if variant in _JUDGED else None
    times = beside(mine["times_ms"], theirs["times_ms"], peer, goal)
    off = [abs(x - y) / y for x, y in zip(mine["losses"], theirs["losses"], strict=True)]
    memory = mine["peak_GiB"] / theirs["peak_GiB"]
    return {
        "name": model,
        "part": variant,
        "op": f"training step, {variant}",
        "variant": variant,
        "about": VARIANTS[variant][1],
        "shape": SHAPE,
        "dtype": "bfloat16 autocast, AdamW",
        "params": mine["params"],
        "backends": mine["backends"],
        **{key: round(value, 3) if isinstance(value, float) else value for key, value in times.items()},
        "ours_tokens_s": round(1000 * tokens / times["ours_ms"]),
        "ours_GiB": round(mine["peak_GiB"], 3),
        "peer_tokens_s": round(1000 * tokens / times["peer_ms"]),
        "peer_GiB": round(theirs["peak_GiB"], 3),
        "memory_ratio": round(memory, 3),
        "goal_memory_ratio": GOAL_MEMORY,
        "memory_met": memory <= GOAL_MEMORY,
        "ours_losses": [round(x, 4) for x in mine["losses"]],
        "peer_losses": [round(x, 4) for x in theirs["losses"]],
        "error": max(off),
        "error_limits": [FIRST_LIMIT, LATER_LIMIT],
        "agree": off[0] <= FIRST_LIMIT and max(off) <= LATER_LIMIT,
    }


def print_kernels(step: Callable[[], Any], title: str, steps: int = 3, top: int = 30) -> None:
    """Print the kernels of a training step by their time on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    # annotations such as Optimizer.step#AdamW.step span kernels that have rows of their own
    kernels = [e for e in found.key_averages() if e.device_type == DeviceType.CUDA and ".step#" not in e.key]
    times = [(e.self_device_time_total / steps / 1000, e) for e in kernels]
    total = sum(ms for ms, _ in times) or 1.0
    print(f"{title}: {total:.2f} ms of kernels per step")
    for ms, e in sorted(times, key=lambda pair: -pair[0])[:top]:
        print(f"{ms:9.3f} ms {100 * ms / total:5.1f} % {e.count / steps:7.0f} x  {e.key[:110]}")
    sys.stdout.flush()
