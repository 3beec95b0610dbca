"""Lines that a training says before its first step."""

from pathlib import Path

from transformers import TrainingArguments

from ..models.model import Model
from .examples import Examples

__all__ = ["described"]


def described(core: Model, rows: Examples, source: str, tokens: int, args: TrainingArguments) -> list[str]:
    """Say in lines what is trained, on what and on which device."""
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in core.parameters()})
    devices = args.world_size * max(1, args.n_gpu)
    where = f"{devices} x {args.device.type}" if devices > 1 else str(args.device)
    length = rows.length
    once = len(rows) * length
    lines = [
        f"{core.num_params():,} parameters in {' and '.join(kinds)}, on {where}",
        f"{len(rows):,} rows of {length:,} tokens ({once:,}){source}",
        f"{args.max_steps:,} steps of {args.train_batch_size * args.world_size:,} rows: {tokens:,} tokens, "
        f"the data {tokens / once:.3g} times; into {Path(args.output_dir).parent}",
    ]
    if left := len(rows.rows) - len(rows):
        lines.insert(2, f"{left:,} rows hold nothing to predict and are left out")
    return lines
