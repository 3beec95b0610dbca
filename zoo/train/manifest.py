"""A checkpoint of a training and the file that says what it is made of; the JSON that a training writes, and reads without trusting it."""

import json
import math
from pathlib import Path
from typing import Any

from ..checkpoint.files import is_deep
from ..checkpoint.tensors import check_state_file
from ..digests import digest_file
from ..errors import CheckpointError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "STATE",
    "Checkpoint",
    "are_entries",
    "dumps",
    "is_number",
    "loss_entries",
    "manifest_of",
    "plain",
    "read_json",
    "step_of",
]

FORMAT = 3
MANIFEST, STATE = "zoo.json", "trainer_state.json"
_FOREVER = 1e10  # seconds: longer than anything trains


class Checkpoint:
    """A whole checkpoint: its folder, and what its manifest says (``step``, ``seconds``, ``losses``, ``logged``)."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.step, self.seconds = int(manifest["step"]), float(manifest["seconds"])

    def history(self) -> list[dict[str, float]]:
        """Return what was logged up to here."""
        return loss_entries(read_json(self.folder / STATE)["log_history"])


def loss_entries(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The logged losses among what transformers logs, each with the evaluation of its step."""
    found: dict[float, dict[str, float]] = {}
    for entry in log_history:
        if "loss" in entry:
            found[entry["step"]] = {k: v for k, v in entry.items() if k != "epoch"}
        elif "eval_loss" in entry and entry["step"] in found:
            found[entry["step"]] |= {k: v for k, v in entry.items() if k.startswith("eval_")}
    return list(found.values())


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what was written."""
    try:
        manifest = read_json(folder / MANIFEST)
        expected = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        if manifest["format"] != FORMAT or manifest["step"] != step_of(folder):
            raise ValueError(f"format {manifest['format']}, step {manifest['step']}")
        kinds = {"settings": dict, "losses": list, "logged": int}
        if not all(isinstance(manifest[key], kind) for key, kind in kinds.items()):
            raise ValueError("settings, losses or logged is of another kind")
        losses = [isinstance(of, list) and len(of) in (1, 4) and all(map(is_number, of)) for of in manifest["losses"]]
        if not losses or not all(losses) or not 0 <= float(manifest["seconds"]) < _FOREVER:
            raise ValueError("losses are no numbers, or seconds is none")
        if outside := [name for name in expected if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f"it names {outside[0]!r}, which is not in the folder")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}, so no training of this version has left it there"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{folder / MANIFEST}: is not as it was written ({e})") from e
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        if (now := file.stat().st_size) != size:
            raise CheckpointError(f"{file}: has {now} bytes, and {size} were written")
        if digest_file(file) != digest:
            raise CheckpointError(f"{file}: is not as it was written (its digest differs)")
    # a digest in the same folder says nothing of who wrote it
    for file in (f for ending in ("*.pt", "*.pth") for f in folder.glob(ending)):
        check_state_file(file)
    try:
        state = read_json(folder / STATE)
        if state["global_step"] != manifest["step"] or not are_entries(state["log_history"]):
            raise ValueError(f"global_step {state['global_step']}, log_history {str(state['log_history'])[:40]}")
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise CheckpointError(f"{folder / STATE}: is not as transformers writes it ({e})") from e
    return manifest


def is_number(value: Any) -> bool:
    """Return whether a value is a number, and no truth."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_entries(history: Any) -> bool:
    """Return whether something read is a list of entries of numbers."""
    return isinstance(history, list) and all(
        isinstance(entry, dict) and all(map(is_number, entry.values())) for entry in history
    )


def plain(value: Any) -> Any:
    """Return what JSON has words for: keys are text, and numbers that are not finite are written out."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def step_of(folder: Path) -> int:
    """The step of a checkpoint by the name of its folder; -1 for another folder."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() else -1


def read_json(file: Path) -> Any:
    """Read a file; one that is no JSON, no file or nested too deeply is a ValueError."""

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is no JSON")

    if file.exists() and not file.is_file():
        raise ValueError("is no regular file")  # a pipe would be waited for
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except RecursionError as e:
        raise ValueError(str(e)) from e
    if is_deep(content):
        raise ValueError("is nested too deeply")
    return content


def dumps(content: Any) -> str:
    """Write JSON, of numbers that are finite."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
