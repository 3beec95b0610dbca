"""The picture of what each direction sees, in README and ``docs/vision.md``, as data: a small VMamba before and after it learns digits."""

import contextlib
import json
import tempfile
from pathlib import Path

from ...zoo.checkpoint.publish import write_whole
from ...zoo.images.builtin import builtin_set
from ...zoo.images.explain import explain
from ...zoo.train.run import train
from ..images import evaluate_images
from ..result_file import Result, header

__all__ = ["COMMAND", "PLACE", "fields"]

PLACE = Path("eval/results/fields.json")
# digits have 8 x 8 pixels: enlarged, there is room to see in
MODEL, OVERRIDES = "vmamba-micro", ["image_size=32", "stem.patch=2"]
COMMAND = f"zoo train {MODEL} {' '.join(OVERRIDES)} --data digits --out runs/enlarged --steps 400"
_SEEN = 64


def fields(out: Path, steps: int = 400) -> Result:
    """Train on a CPU, look at images of the test set before and after, and write what was seen as a result."""
    out = out.resolve()
    images = list(builtin_set("digits", "test")[0][:_SEEN])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        train(MODEL, "digits", "runs/enlarged", overrides=OVERRIDES, steps=steps, report_to="none", device="cpu")
        scores = evaluate_images("runs/enlarged", "digits", device="cpu", progress=False)
        explained = explain("runs/enlarged", images, device="cpu") | {"model": MODEL}
    result = header("fields", "zoo bench fields", "cpu", ["transformers", "scikit-learn"])
    result |= {"ceilings": {}, "cases": [], "about": {"command": COMMAND, "top1": scores["top1"], "n": scores["n"]}}
    result["explained"] = explained
    # one line: ten maps are ten thousand numbers
    write_whole(out, json.dumps(result) + "\n")
    return result
