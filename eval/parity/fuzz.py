"""Configs that nobody wrote down: options and fields drawn at random, computed by transformers and by us, and compared.

Two directions. *Edits*: a config of transformers with one field changed, loaded by us, must give transformers' logits, or be refused by
a :class:`CheckpointError` that names the field. *Exports*: a config of ours with some options changed, written by us, must give our
logits in transformers, or be refused by an error that names options. ``zoo bench parity --part fuzz`` runs both for
every family and writes how often each outcome came up; anything but the good ones fails.
"""

import dataclasses
import json
import multiprocessing
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ...zoo.checkpoint import CheckpointError, export, load
from ...zoo.models.build import build
from ...zoo.registry import ConfigError
from .. import markdown
from ..result_file import header, write
from .configs import CONFIGS, VOCAB
from .draws import ABSENT, Base, Options, edits
from .run import ratio, redraw, their_model

__all__ = [
    "GOOD", "Outcome", "edit_outcomes", "export_outcomes", "fuzz", "quiet", "summary", "tokens", "try_edit", "try_export",
]  # fmt: skip

GOOD = ("equal", "refused", "not judged")
_LIMIT = 1e-4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one try.

    Attributes:
        family: The ``model_type``.
        change: What was changed.
        kind: ``equal``, ``refused`` (the error names what was changed), ``not judged`` (transformers itself cannot),
            ``unnamed`` (refused, but the error does not say why), ``silent`` (other logits) or ``crash`` (any other exception).
        detail: The error, or how far the logits are apart.
    """

    family: str
    change: str
    kind: str
    detail: str = ""


def tokens(vocab: int) -> Tensor:
    """Two rows of 21 tokens: longer than the windows and chunks that are drawn."""
    return torch.randint(0, vocab, (2, 21), generator=torch.Generator().manual_seed(7))


def try_edit(base: Base, name: str, value: Any, folder: Path) -> Outcome:
    """Change one field, in a new folder: what does transformers compute, and what do we?"""
    change = f"{name} = {'(absent)' if value is ABSENT else json.dumps(value)}"
    data = {key: v for key, v in base.data.items() if key != name} | ({} if value is ABSENT else {name: value})
    folder.mkdir()
    expected = None
    try:
        expected = _written_by_transformers(data, folder)
    except Exception as e:
        # any: the classes check little, and fail anywhere
        detail = _line(e)
        for file in base.folder.glob("*.safetensors"):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
        (folder / "config.json").write_text(json.dumps(data))
    try:
        with torch.no_grad():
            ours = load(folder)
            got = ours(tokens(expected[0])).logits if expected else None
    except CheckpointError as e:
        said = str(e).replace(str(folder), "")
        kind = "not judged" if expected is None else "refused" if name in said else "unnamed"
        return Outcome(base.family, change, kind, said)
    except Exception as e:
        return Outcome(base.family, change, "crash", _line(e))
    if expected is None or got is None:
        return Outcome(base.family, change, "not judged", detail)
    return _compared(base.family, change, got, expected[1])


def _written_by_transformers(data: dict[str, Any], folder: Path) -> tuple[int, Tensor] | None:
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(data))
    config = AutoConfig.from_pretrained(folder)
    model = their_model(config)
    vocab = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        logits = model(tokens(vocab), use_cache=False).logits
    if not logits.isfinite().all():
        raise ValueError("logits that are not finite")
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(data))
    return vocab, logits


def _line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0]


def _compared(family: str, change: str, got: Tensor, expected: Tensor) -> Outcome:
    if got.shape != expected.shape:
        return Outcome(family, change, "silent", f"shape {tuple(got.shape)}, transformers' {tuple(expected.shape)}")
    apart = ratio(got, expected)
    return Outcome(family, change, "equal" if apart < _LIMIT else "silent", f"{apart:.1e}")


def try_export(family: str, cfg: dict[str, Any], names: list[str], folder: Path) -> Outcome | None:
    """Write a model of ours for transformers, into a new folder: what does it compute? None if the config is no model.

    ``cfg`` was a config of ``family`` before the options in ``names`` were changed.
    """
    from transformers import AutoModelForCausalLM

    try:
        ours = redraw(build(cfg))
    except ConfigError:
        return None
    change = ", ".join(f"{name} = {_found(cfg, name)}" for name in names)
    try:
        ours.family = family
        kind = export(ours, folder)
    except CheckpointError as e:
        # what does not fit need not be what was changed: a head's size follows from their number
        reasons = ("The closest differs in", f"options. {family}: ", *(f" {name}" for name in names))
        named = "layers" in names or any(reason in str(e) for reason in reasons)
        return Outcome(family, change, "refused" if named else "unnamed", str(e).replace(str(folder), ""))
    except Exception as e:
        return Outcome(family, change, "crash", _line(e))
    ids = tokens(min(ours.cfg.vocab_size, VOCAB))
    reading = {"attn_implementation": "eager", "output_loading_info": True}
    try:
        judge, info = AutoModelForCausalLM.from_pretrained(folder, **reading)
        with torch.no_grad():
            expected, got = judge.eval()(ids, use_cache=False).logits, ours(ids).logits
    except Exception as e:
        return Outcome(kind, change, "crash", f"transformers cannot read it: {_line(e)}")
    if info["missing_keys"] or info["unexpected_keys"]:
        return Outcome(kind, change, "silent", f"missing {info['missing_keys']}, left over {info['unexpected_keys']}")
    if ratio(got, expected) >= _LIMIT:
        # some of what is drawn amplifies float32's rounding, which float64 tells from another function
        with torch.no_grad():
            expected, got = judge.double()(ids, use_cache=False).logits, ours.double()(ids).logits
    return _compared(kind, change, got, expected)


def _found(cfg: Any, name: str) -> Any:
    if name in cfg:
        return str(cfg[name])
    return [spec[name] for spec in (*cfg["mixers"].values(), cfg["norm"]) if name in spec]


def edit_outcomes(name: str, count: int | None, seed: int = 0) -> Iterator[Outcome]:
    """Edits of one of :data:`CONFIGS`, in a random order: ``count`` of them, or all."""
    with tempfile.TemporaryDirectory() as place:
        base = Base(name, Path(place, "base"))
        todo = list(edits(base))
        random.Random(f"{seed} {name}").shuffle(todo)
        for i, (field, value) in enumerate(todo[:count]):
            with tempfile.TemporaryDirectory() as folder:
                yield try_edit(base, field, value, Path(folder, str(i)))


def export_outcomes(name: str, count: int, seed: int = 0) -> Iterator[Outcome]:
    """Exports of changed options of one of :data:`CONFIGS`, until ``count`` were written; what was refused comes along."""
    with tempfile.TemporaryDirectory() as place:
        base = Base(name, Path(place, "base"))
        plain: Any = OmegaConf.to_container(load(base.folder).cfg)
        options, written = Options(plain, random.Random(f"{seed} {name}")), 0
        for _ in range(40 * count):
            cfg, names = next(options)
            with tempfile.TemporaryDirectory() as folder:
                outcome = try_export(base.family, cfg, names, Path(folder, "out"))
            if outcome is None or outcome.kind in ("refused", "unnamed"):
                options.refused(names)
            if outcome is not None:
                written += outcome.kind not in ("refused", "unnamed")
                yield outcome
            if written == count:
                break


def fuzz(out: Path | None = None, edits_each: int = 110, exports_each: int = 26, seed: int = 0) -> dict[str, Any]:
    """Try edits and exports of every case, in two processes, and write the result where asked (:mod:`hybridzoo.eval.result_file`).

    It says of each family and direction how often each outcome came up, and what went wrong.

    Raises:
        ValueError: Something went wrong, after the result has been written.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    bad: list[dict[str, str]] = []
    console = Console(stderr=True)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_tried, name, edits_each, exports_each, seed) for name in CONFIGS]
        for job in track(as_completed(jobs), "fuzz", len(jobs), console=console, disable=not console.is_terminal):
            for direction, name, outcome in job.result():
                counts.setdefault((outcome.family, direction), Counter())[outcome.kind] += 1
                if outcome.kind not in GOOD:
                    bad.append({"direction": direction, "case": name, **dataclasses.asdict(outcome)})
    rows = [
        {"name": f"{family}-{op}", "family": family, "op": op, "peer": "transformers", "dtype": "float32", **count}
        for (family, op), count in sorted(counts.items())
    ]
    result = header("parity_fuzz", "zoo bench parity --part fuzz", "cpu", ["transformers"])
    result |= {"seed": seed, "cases": rows, "failed": bad}
    if out is not None:
        write(result, out)
    if bad:
        raise ValueError(f"parity: {len(bad)} of the tries went wrong; the first is {bad[0]}. The result lists all.")
    return result


def _tried(name: str, edits_each: int, exports_each: int, seed: int) -> list[tuple[str, str, Outcome]]:
    torch.set_num_threads(1)
    quiet()
    found = {"edit": edit_outcomes(name, edits_each, seed), "export": export_outcomes(name, exports_each, seed)}
    return [(direction, name, outcome) for direction, outcomes in found.items() for outcome in outcomes]


def summary(result: dict[str, Any]) -> str:
    """A result as a Markdown table: of every family and direction how often each outcome came up."""
    kinds = [*GOOD, "unnamed", "silent", "crash"]
    lines = [[f"`{row['family']}`", row["op"], *(str(row.get(kind, 0)) for kind in kinds)] for row in result["cases"]]
    for op in ("edit", "export"):
        rows = [row for row in result["cases"] if row["op"] == op]
        lines.append(["all", op, *(str(sum(row.get(kind, 0) for row in rows)) for kind in kinds)])
    return markdown.table(["family", "direction", *kinds], lines)


def quiet() -> None:
    """Silence what transformers says about configs that are wrong on purpose."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.get_logger("transformers").setLevel(60)
