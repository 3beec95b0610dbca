"""Checkpoints against transformers' own classes: random weights, through a folder, in both directions, and the distances found.

The tests hold each case to its limits; ``zoo bench parity`` writes what was measured, for the README's table.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from ...zoo.checkpoint import export, load
from .. import markdown
from ..result_file import header, write
from .configs import CONFIGS, PUBLISHED, VOCAB, config_of

__all__ = ["Pair", "gradients", "parity", "ratio", "redraw", "table", "tensors_of", "their_model"]


def redraw(model: Any) -> Any:
    """Weights that make every path matter: transformers' own initialisation gives nearly flat logits."""
    generator = torch.Generator().manual_seed(1)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("A_log", "D")) or "norm" in name.rsplit(".", 2)[-2]:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.2)
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            p.data.uniform_(-4, -1, generator=generator)
        elif "conv1d" in name or name.endswith(("bias", "correction_bias")):
            p.data.normal_(std=0.4, generator=generator)
        elif "inv_freq" not in name and "mup_vector" not in name:
            # a block that feeds on itself through adapters would amplify float32's rounding beyond what is compared here
            std = 0.75 if "adapter" in name else 1.0 if "shared_transformer" in name else 1.5
            p.data.normal_(std=std * p.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def their_model(config: Any) -> Any:
    """Build transformers' model of a config, in float32, with weights that make every path matter."""
    from transformers import AutoModelForCausalLM

    return redraw(AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def ratio(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


class Pair:
    """An entry of :data:`CONFIGS`: transformers' model in ``theirs``, saved to an empty ``folder``, and what we read there in ``ours``."""

    def __init__(self, name: str, folder: Path):
        torch.manual_seed(0)
        config = config_of(name)
        self.theirs = their_model(config)
        self.cls: Any = type(self.theirs)
        self.folder = folder
        self.theirs.save_pretrained(folder)
        self.ours: Any = load(folder)
        self.family = str(config.model_type)


def gradients(pair: Pair, ids: Tensor, folder: Path) -> dict[str, float]:
    """Distances of our gradients from transformers', by name; they travel through files like weights, so that counterparts meet."""
    ours, theirs = load(pair.folder), pair.cls.from_pretrained(pair.folder, attn_implementation="eager")
    out, judge = ours(ids, labels=ids), theirs(ids, labels=ids, use_cache=False).loss
    cross_entropy = out.loss if out.aux_loss is None else out.loss - out.aux_loss
    if abs(cross_entropy - judge) > 1e-5:
        raise ValueError(f"{pair.family}: the loss is {cross_entropy:.6f}, transformers' {judge:.6f}.")
    cross_entropy.backward(), judge.backward()
    for model in (ours, theirs):
        for name, p in model.named_parameters():
            if p.requires_grad and p.grad is None:
                raise ValueError(f"{pair.family}: {name} has no gradient.")
            p.data = p.grad if p.requires_grad else p.data
    export(ours, folder / "ours", "hf"), theirs.save_pretrained(folder / "theirs")
    expected, got = tensors_of(folder / "theirs"), tensors_of(folder / "ours")
    if expected.keys() != got.keys():
        raise ValueError(f"{pair.family}: exported {sorted(got)}, transformers writes {sorted(expected)}.")
    return {name: ratio(got[name], expected[name]) for name in expected if expected[name].any()}


def parity(out: Path | None = None) -> dict[str, Any]:
    """Measure every case, in float32 on the CPU, and write the result where asked (:mod:`hybridzoo.eval.result_file`).

    Of each case: the worst error of the logits of one pass and of 20 decoded steps after a prefill, the worst error of any parameter's
    gradient, and whether what we write is bitwise what we read and is loaded by transformers with no key missing or left over.
    """
    rows, console = [], Console(stderr=True)
    for name in track(CONFIGS, "parity", console=console, transient=True, disable=not console.is_terminal):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_measure(name, Path(folder)))
    result = header("parity", "zoo bench parity", "cpu", ["transformers"]) | {"cases": rows}
    if out is not None:
        write(result, out)
    return result


def table(result: dict[str, Any]) -> str:
    """A result as a Markdown table, one line per family: the worst of its cases."""
    lines = []
    for family, published in PUBLISHED.items():
        rows = [row for row in result["cases"] if row["family"] == family]
        logits = max(max(row["logit_error"], row["decoding_error"]) for row in rows)
        written = all(row["export_is_bitwise"] and row["transformers_reads_it"] for row in rows)
        worst = f"{logits:.0e}", f"{max(row['gradient_error'] for row in rows):.0e}"
        lines.append([f"`{family}`", published, f"{len(rows)} shapes", "bitwise" if written else "no", *worst])
    return markdown.table(["family", "published", "read", "written back", "logits", "gradients"], lines)


def _measure(name: str, folder: Path) -> dict[str, Any]:
    pair = Pair(name, folder / "in")
    torch.manual_seed(0)
    ids = torch.randint(1, VOCAB, (2, 37))
    with torch.no_grad():
        expected = pair.theirs(ids, use_cache=False).logits
        first = pair.ours(ids[:, :17])
        steps = torch.stack([pair.ours.step(ids[:, t], first.state) for t in range(17, 37)], 1)
        errors = ratio(pair.ours(ids).logits, expected), ratio(steps, expected[:, 17:])
    worst = max(gradients(pair, ids[:, :13], folder).values())
    export(pair.ours, folder / "out")
    a, b = tensors_of(folder / "in"), tensors_of(folder / "out")
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    _, info = pair.cls.from_pretrained(folder / "out", output_loading_info=True)
    read = not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return {
        "name": name, "family": pair.family, "op": "logits, decoding, gradients, export", "shape": {"b": 2, "l": 37}, "dtype": "float32",
        "peer": "transformers", "logit_error": float(f"{errors[0]:.2g}"), "decoding_error": float(f"{errors[1]:.2g}"),
        "gradient_error": float(f"{worst:.2g}"), "export_is_bitwise": same, "transformers_reads_it": read,
    }  # fmt: skip
