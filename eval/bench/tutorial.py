"""The training of ``docs/train.md`` as data, from which its picture is drawn."""

import contextlib
import json
import tempfile
from pathlib import Path

from ...zoo.data import topics
from ...zoo.train.run import train
from ..result_file import Result, header, write
from .text import write_lines

__all__ = ["COMMAND", "PLACE", "tutorial"]

PLACE = Path("eval/results/tutorial.json")

COMMAND = (
    "zoo train jamba-tiny --data train.jsonl --val validation.jsonl --out runs/hybrid "
    "--steps 400 --batch-size 16 --length 128 --lr 0.005"
)
_KEPT = ("model", "layers", "size", "budget", "optimizer")


def tutorial(out: Path, steps: int = 400, batch_size: int = 16) -> Result:
    """Run the page's first training on a CPU, and write what it logged as a result."""
    out = out.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for part, texts in topics().items():
            write_lines(texts, Path(f"{part}.jsonl"))
        train(
            "jamba-tiny", "train.jsonl", "runs/hybrid", val="validation.jsonl", steps=steps, batch_size=batch_size, length=128,
            lr=5e-3, report_to="none", device="cpu",
        )  # fmt: skip
        log = json.loads(Path("runs/hybrid/train.json").read_text())
    about = log["about"] | {"command": COMMAND, "facts": {key: log["about"]["facts"][key] for key in _KEPT}}
    result = header("tutorial", "zoo bench tutorial", "cpu", ["transformers"])
    result |= {"ceilings": {}, "cases": [], "about": about, "history": log["history"], "seconds": log["seconds"]}
    write(result, out)
    return result
