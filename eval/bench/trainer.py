"""``zoo train`` itself, as a user runs it: real tokens a second, memory and the share of time outside the step, on real text.

Beside it the same model in a plain loop of transformers' ``Trainer``, as a user would write it without the zoo: rows padded, bf16,
default collator; and mamba-ssm's model in the same loop. Each runs in a process of its own. Time is that from step to step, with
everything that lies between them: reading, logging, schedules.
"""

import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...kernels import dispatch
from ...zoo.config import load_config
from ...zoo.models.build import build
from ...zoo.train.flops import flops_per_token, peak_flops
from ..result_file import Row, Tick
from .apart import answer, run_apart
from .text import documentation, padded, write_lines
from .train import cross_entropy, mamba_ssm_model

__all__ = ["MODELS", "PARTS", "VARIANTS", "main", "measure", "side"]

# of the size of the others: six Mamba layers and two of attention, every second feed-forward a mixture of eight experts
_JAMBA = (
    "vocab_size=50277", "pad_vocab_size_multiple=8", "d_model=768", "layers=(mamba mlp mamba moe mamba mlp attention moe) * 2",
    "mixers.attention.nheads=12", "mixers.attention.nheads_kv=4", "mixers.mlp.d_intermediate=2048", "mixers.moe.d_intermediate=640",
    "mixers.moe.num_experts=8", "max_length=2048",
)  # fmt: skip
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mamba-130m": ("mamba-130m", ()),
    "mamba2-130m": ("mamba2-130m", ()),
    "jamba-130m": ("jamba-tiny", _JAMBA),
    "transformer-130m": ("transformer-130m", ()),
}
# in words for a table
VARIANTS = {
    "packed": "zoo train, rows packed with whole documents",
    "padded": "zoo train, a document padded to each row",
    "eager": "zoo train, packed, no step captured",
    "plain": "the same model in a plain transformers Trainer, padded",
    "mamba_ssm": "mamba-ssm's model in a plain transformers Trainer, padded",
}
PARTS = {
    model if variant == "packed" else f"{model}:{variant}": (model, variant)
    for model, variant in (
        *itertools.product(MODELS, ("packed", "padded", "plain")),
        *itertools.product(("mamba-130m", "mamba2-130m"), ("mamba_ssm",)),
        ("mamba-130m", "eager"),
    )
}
SHAPE = {"b": 8, "l": 2048}
# steps before the clock starts, those that it sees, and those that the run is planned for, which say how often it logs and saves
WARM, TIMED, PLANNED = 20, 60, 2000
LR = 1e-4
GOAL_OUTSIDE = 0.03
_LEAST_BATCH = 1


class Enough(Exception):
    """All steps that are timed were taken."""


def measure(parts: list[str], tick: Tick) -> tuple[list[Row], list[str]]:
    """Return a row per part, and what failed; a model that does not fit into memory is tried with half of the rows.

    Raises:
        ValueError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench trainer: needs a CUDA device, and torch sees none.")
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = str(write_lines(documentation(), Path(folder) / "python.jsonl"))
        for part in parts:
            model, variant = PARTS[part]
            b = SHAPE["b"]
            while True:
                tick(f"{model}, {variant}, {b} rows")
                spec = {"side": variant, "model": model, "data": data, "shape": SHAPE | {"b": b}, "device": "cuda"}
                try:
                    rows.append(_row(spec, _run(spec, folder)))
                except RuntimeError as e:
                    if "out of memory" in str(e).lower() and b // 2 >= _LEAST_BATCH:
                        b //= 2
                        continue
                    failed.append(str(e))
                break
    return rows, failed


def _run(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    return run_apart(__name__, spec, folder)


def main() -> None:
    """Train one side in its own process."""
    answer(side)


def side(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one side for the steps that are timed, and say how long they took, and of how many tokens."""
    # what runs is ours, also where the peers' libraries are installed
    for name in dispatch.installed:
        dispatch.installed[name] = False
    torch.manual_seed(0)
    marks = Marks(spec["device"])
    train = _plain if spec["side"] in ("plain", "mamba_ssm") else _ours
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        train(spec, spec["shape"], marks, folder)
    found = marks.summary()
    flops = flops_per_token(build(_config(spec["model"]), device="meta"), found["context"])
    return found | {"flops_per_token": flops}


class Marks:
    """Times of the beginning and the end of every step, on the device, and the batches in between."""

    def __init__(self, device: str):
        self.device = device
        self.begun: list[Any] = []
        self.ended: list[Any] = []
        self.batches: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.params = 0

    @contextlib.contextmanager
    def watching(self, trainer: type) -> Iterator[None]:
        """Mark where a step of a Trainer begins, its forward, and where it ends, with the optimiser's."""
        plain = trainer.training_step  # type: ignore[attr-defined]

        def training_step(this: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            self.params = self.params or sum(p.numel() for p in model.parameters())
            # -1 where there is no token, and otherwise the document's number in its row
            documents = inputs["documents"] if "documents" in inputs else inputs["labels"].clamp(-1, 0)
            self.batches.append(documents)
            self.begun.append(self._now())
            loss = plain(this, model, inputs, *args, **kwargs)
            self.losses.append(loss.detach().clone())
            return loss

        def ended(*_: Any) -> None:
            self.ended.append(self._now())
            if len(self.ended) >= WARM + TIMED:
                raise Enough

        trainer.training_step = training_step  # type: ignore[attr-defined]
        hook = register_optimizer_step_post_hook(ended)
        try:
            yield
        finally:
            hook.remove()
            trainer.training_step = plain  # type: ignore[attr-defined]

    def _now(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1000 if self.device == "cuda" else b - a

    def summary(self) -> dict[str, Any]:
        """Return speed, memory and losses of the steps that were timed."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        if len(self.ended) < WARM + TIMED:
            raise RuntimeError(f"{len(self.ended)} steps were taken of {WARM + TIMED}")
        steps = range(WARM, WARM + TIMED)
        whole = [self._between(self.ended[i - 1], self.ended[i]) for i in steps]
        inside = [self._between(self.begun[i], self.ended[i]) for i in steps]
        read = torch.cat([self.batches[i] for i in steps]).cpu()
        lengths = torch.cat([torch.unique_consecutive(row[row >= 0], return_counts=True)[1] for row in read]).double()
        real = int(lengths.sum())
        seconds = sum(whole)
        losses = torch.stack([x.float().cpu() for x in self.losses]).tolist()
        return {
            "seconds": seconds,
            "step_ms": 1000 * median(whole),
            "outside_share": 1 - sum(inside) / seconds,
            "tokens_s": real / seconds,
            "real_share": real / read.numel(),
            "context": float((lengths**2).sum() / real),
            "params": self.params,
            "peak_GiB": torch.cuda.max_memory_reserved() / 2**30 if self.device == "cuda" else 0.0,
            "first_loss": losses[0],
            "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        }


def _config(name: str) -> Any:
    base, overrides = MODELS.get(name, (name, ()))
    # bytes need no files of a tokenizer, and the table of embeddings stays as large as it was
    return load_config(base, [*overrides, "tokenizer=byte"])


def _ours(spec: dict[str, Any], shape: Mapping[str, int], marks: Marks, folder: str) -> None:
    from ...zoo.train.loop import ZooTrainer
    from ...zoo.train.run import train

    with marks.watching(ZooTrainer):
        train(
            _config(spec["model"]), spec["data"], Path(folder) / "run", steps=PLANNED, batch_size=shape["b"], length=shape["l"],
            lr=LR, packing="padded" if spec["side"] == "padded" else "documents",
            capture="off" if spec["side"] == "eager" else "auto", device=spec["device"], report_to="none",
        )  # fmt: skip


def _plain(spec: dict[str, Any], shape: Mapping[str, int], marks: Marks, folder: str) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    gpu = spec["device"] == "cuda"
    texts = (json.loads(line)["text"] for line in Path(spec["data"]).read_text(encoding="utf-8").splitlines())
    rows: Any = padded(texts, shape["l"])
    args = TrainingArguments(
        folder, max_steps=PLANNED, per_device_train_batch_size=shape["b"], learning_rate=LR, lr_scheduler_type="cosine",
        warmup_steps=PLANNED // 10, weight_decay=0.1, bf16=gpu, use_cpu=not gpu, logging_steps=10, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = (_library if spec["side"] == "mamba_ssm" else _adapter)(_config(spec["model"]))
    with marks.watching(Trainer):
        Trainer(model, args, train_dataset=rows, data_collator=default_data_collator).train()


def _adapter(cfg: Any) -> nn.Module:
    from ...zoo.hf import HybridZooForCausalLM

    return HybridZooForCausalLM.wrap(build(cfg).train())


class _Labelled(nn.Module):
    """mamba-ssm's model with a loss, as transformers' Trainer wants it; what is padded on the right it may read."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.model(input_ids).logits, labels)}


def _library(cfg: Any) -> nn.Module:
    return _Labelled(mamba_ssm_model(cfg))


def _row(spec: dict[str, Any], found: dict[str, Any]) -> Row:
    variant, peak = spec["side"], peak_flops(torch.cuda.get_device_name(), half=True)
    shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    return {
        "name": spec["model"],
        "part": variant,
        "op": f"training, {variant}",
        "variant": variant,
        "about": VARIANTS[variant],
        "shape": spec["shape"],
        "dtype": "bfloat16 autocast",
        **shown,
        "tokens_s": round(found["tokens_s"]),
        "mfu": round(found["tokens_s"] * found["flops_per_token"] / peak, 4) if peak else None,
        "goal_outside": GOAL_OUTSIDE,
        "outside_met": found["outside_share"] <= GOAL_OUTSIDE,
    }
