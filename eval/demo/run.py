"""The demo: three kinds of model of one budget learn the same things, and a page compares them.

The training stream mixes CPython's reference text with recall drills: documents of the evaluated tasks in which a question
follows the other, so that every row teaches often. Only answers are targets there; the symbols in between are random, and
learning to expect them would only be noise. Evaluation draws from seeds that training cannot reach.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ...zoo.checkpoint.publish import write_whole
from ...zoo.models.model import Model
from ...zoo.models.stats import stats
from ...zoo.tables import columns
from ...zoo.tokenizer import ByteTokenizer
from ...zoo.train.data import fingerprint, mix, pack, topics
from ..result_file import header, version
from ..tasks import sizes as sizes_of
from ..tasks.generators import training_rng
from .drills import induction_drills, mqar_drills, selective_copying_drills
from .page import measures, write_page
from .side_by_side import message, run_side_by_side

__all__ = ["command", "run", "score", "training_rows", "work"]

LENGTH, BATCH, STEPS, SEED = 64, 16, 900, 0
TEXT_SHARE = 0.3
# the best of a small grid for each; one rate for all would favour somebody
LEARNING_RATES = {"mamba-tiny": 1e-2, "jamba-tiny": 5e-3, "transformer-tiny": 3e-3}
# recall is learnt sooner from embeddings that differ from the start: with the configs' 0.02, a Transformer has none of it after these steps
INITIALIZER_RANGE = 0.15
PROMPT = "The "
_SCORES = "scores.json"


@dataclasses.dataclass(frozen=True)
class Task:
    """A recall task as the demo trains for it; where the sizes are the task's own, ``zoo eval`` needs to be told nothing.

    ``name`` is lm-eval's, and ``title`` and ``about`` are for the page; ``share`` is that of the drills, relative to the other tasks: what
    is learned last gets most.
    """

    name: str
    title: str
    about: str
    sizes: dict[str, int]
    share: float


def _task(name: str, title: str, about: str, sizes: str, share: float) -> Task:
    found = sizes_of(f"hybridzoo_{name}")
    return Task(f"hybridzoo_{name}", title, about, {key: found[key] for key in sizes.split()}, share)


_MQAR = "Multi-query associative recall: four pairs of a key and a value, then the keys in another order: which value belongs to this key?"
_INDUCTION = "Induction heads: random letters, a marker somewhere among them and again at the end: what followed it the first time?"
_COPYING = "Selective copying: four letters scattered among dots, to be repeated in order."
TASKS = (
    _task("mqar", "MQAR", _MQAR, "docs length pairs vocab", 1.4),
    _task("induction", "induction", _INDUCTION, "docs length vocab", 0.5),
    _task("selective_copying", "copying", _COPYING, "docs length tokens vocab", 2.0),
)


def run(out: str | Path = "runs/demo", *, fresh: bool = False) -> dict[str, Any]:
    """Train, evaluate and compare, and return the results that the page shows; what is done already is used again, unless ``fresh``.

    The models, ``report.html``, and the results as ``report.json`` are written to the folder ``out``.
    """
    start, out, console = time.monotonic(), Path(out), Console(highlight=False)
    if not console.is_terminal:
        console.width = 110  # a file or a pipe has none
    budgets = {name: stats(name, LENGTH) for name in LEARNING_RATES}
    params = [b.params for b in budgets.values()]
    spread = max(params) / min(params) - 1
    console.print(f"{len(params)} models of {min(params):,} to {max(params):,} parameters, {100 * spread:.1f} % apart")
    assert spread <= 0.02, f"the models' budgets differ by {100 * spread:.1f} %, which is no fair comparison"
    steps = f"{STEPS} steps of {BATCH} x {LENGTH} tokens"
    console.print(f"each learns for {steps}; Ctrl-C saves, the same command continues")
    code = "from hybridzoo.eval.demo.run import work; work({!r}, {!r}, {})"
    run_side_by_side({n: code.format(n, str(out / n), fresh) for n in LEARNING_RATES}, out, console)
    models = []
    for name, b in budgets.items():
        facts = {"name": name, "pattern": b.layers, "params": b.params, "active_params": b.active_params}
        facts["command"] = command(out / name)
        models.append(facts | json.loads((out / name / _SCORES).read_text())["results"])
    results = _results(models, time.monotonic() - start)
    console.print()
    console.print(_table(results))
    console.print("\nthe same numbers, model by model:")
    for model in models:
        console.print(f"  {model['command']}", markup=False, soft_wrap=True)
    for model in models:
        console.print(f"\n[bold]{model['name']}[/bold] writes")
        console.print(PROMPT + model["sample"], markup=False, style="dim")
    page = write_page(results, out / "report.html")
    console.print(f"\n{page} shows it all, with pictures. It took {results['facts']['time']}.")
    return results


def work(name: str, out: str, fresh: bool) -> None:
    """One model's part of the demo, in a process of its own: train it, score it, leave both in ``out``."""
    from ...zoo.train.run import DifferentRun, train

    folder = Path(out)
    settings: dict[str, Any] = {
        # the window that evaluation takes is what the model has seen
        "overrides": [f"max_length={LENGTH}", f"initializer_range={INITIALIZER_RANGE}"],
        "steps": STEPS, "batch_size": BATCH, "lr": LEARNING_RATES[name], "seed": SEED, "device": "cpu",
        "on_step": lambda step, loss: message(done=step, total=STEPS, note=f"loss {loss:.2f}"),
    }  # fmt: skip
    rows = training_rows(topics()["train"])
    try:
        result = train(name, rows, folder, resume=not fresh, **settings)
    except DifferentRun as e:
        message(say=f"starts again: {e}")
        result = train(name, rows, folder, resume=False, **settings)
    at = result.resumed_from
    how = {0: "trained", STEPS: "was trained before"}.get(at, f"continued at step {at}")
    loss = result.history[-1]["loss"]
    message(say=f"{how}, {result.tokens_per_second:,.0f} tokens/s, last loss {loss:.2f} nats per target")
    file, key = folder / _SCORES, _key(folder)
    if not fresh and file.exists() and json.loads(file.read_text())["key"] == key:
        return message(say="was evaluated before")
    scores = score(result.model, folder / "lm_eval.json")
    message(say=f"evaluated, {scores['bits_per_byte']:.2f} bits per byte")
    scores |= {"history": result.history, "tokens_per_second": result.tokens_per_second}
    scores["tokens_per_step"] = BATCH * LENGTH
    write_whole(file, json.dumps({"key": key, "results": scores}, indent=1) + "\n")


def score(model: Model, output: Path) -> dict[str, Any]:
    """Evaluate a model through lm-eval on what the demo trains for, and let it write."""
    from ..evaluate import evaluate
    from ..run import table as rows_of

    # a prompt begins a document, and in training every document begins after the separator
    results = evaluate(model, _tasks(), metadata=_resized(), add_bos_token=True, output=output, progress=False)
    assert results is not None, "one process evaluates"
    found = {(row["task"], row["metric"]): row for row in rows_of(results)}
    return {
        "bits_per_byte": found["hybridzoo_bpb", "bits_per_byte"]["value"],
        "accuracy": {t.name: found[t.name, "acc"]["value"] for t in TASKS},
        "chance": {t.name: found[t.name, "acc"]["chance"] for t in TASKS},
        "sample": _sample(model),
    }


def command(folder: Path) -> str:
    """The command line that gives a trained model's numbers again, exactly."""
    words = ["zoo", "eval", str(folder), "--tasks", ",".join(_tasks()), "--add-bos-token", "--device", "cpu"]
    return shlex.join(words + (["--metadata", json.dumps(resized)] if (resized := _resized()) else []))


def _tasks() -> list[str]:
    return ["hybridzoo_bpb", *(t.name for t in TASKS)]


def _resized() -> dict[str, dict[str, int]]:
    """The sizes that are not the tasks' own."""
    found = {t.name: {k: v for k, v in t.sizes.items() if sizes_of(t.name)[k] != v} for t in TASKS}
    return {name: differing for name, differing in found.items() if differing}


def training_rows(text: list[str]) -> np.ndarray:
    """The stream that all models read: ``(STEPS * BATCH, LENGTH)`` token ids, text and drills in random order."""
    mqar, induction, copying = ({k: v for k, v in task.sizes.items() if k != "docs"} for task in TASKS)
    rng, total = training_rng(SEED), STEPS * BATCH
    drills: tuple[tuple[Callable[..., list[np.ndarray]], dict[str, int], int], ...] = (
        # as many questions as a row holds; a row of copies takes several documents
        (mqar_drills, mqar | {"length": LENGTH - 1}, 1),
        (induction_drills, induction | {"length": LENGTH - 1}, 1),
        (selective_copying_drills, copying, LENGTH // (copying["length"] + 2 * copying["tokens"] + 2)),
    )
    sources = [(pack(map(ByteTokenizer().encode, text), LENGTH), TEXT_SHARE)]
    for task, (make, sizes, per_row) in zip(TASKS, drills, strict=True):
        share = (1 - TEXT_SHARE) * task.share / sum(t.share for t in TASKS)
        sources.append((pack(make(rng, per_row * math.ceil(share * total), **sizes), LENGTH), share))
    return mix(sources, total, SEED)


def unigram_bits_per_byte(text: dict[str, list[str]]) -> float:
    """Bits that byte frequencies of the training text, add-one smoothed, need for a byte of the held-out text."""
    counts = Counter(b"".join(t.encode() for t in text["train"]))
    total = sum(counts.values()) + 256
    held_out = b"".join(t.encode() for t in text["validation"])
    return sum(-math.log2((counts[b] + 1) / total) for b in held_out) / len(held_out)


def _key(folder: Path) -> str:
    # scores hold for these weights, these tasks and this version of what computes them
    tasks, sizes = [dataclasses.asdict(t) for t in TASKS], [sizes_of(t.name) for t in TASKS]
    facts = (tasks, LENGTH, PROMPT, sizes, *map(version, ("hybridzoo", "lm_eval", "torch")))
    return hashlib.sha256(repr(facts).encode() + (folder / "model.safetensors").read_bytes()).hexdigest()


def _sample(model: Any) -> str:
    tokenizer = ByteTokenizer()
    ids = torch.tensor([[0, *tokenizer.encode(PROMPT)]])
    # more tokens than characters: a character may take several bytes
    out = model.generate(ids, 240, temperature=0.8, seed=SEED)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())[:200]


def _results(models: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    text = topics()
    return header("demo", "zoo demo", "cpu", ["hybridzoo", "transformers", "lm_eval"]) | {
        "models": models,
        "tasks": [dataclasses.asdict(t) | {"chance": models[0]["chance"][t.name]} for t in TASKS],
        "text": {"unigram_bits_per_byte": unigram_bits_per_byte(text)},
        "prompt": PROMPT,
        "facts": _facts(text, seconds),
    }


def _table(results: dict[str, Any]) -> Table:
    rows = measures(results)
    table = columns("model", "layers", *(row[0] for row in rows))
    for i, m in enumerate(results["models"], 1):
        table.add_row(m["name"], m["pattern"], *(row[i] for row in rows))
    table.add_row("without a model", "", *(row[-1] for row in rows), style="dim")
    return table


def _facts(text: dict[str, list[str]], seconds: float) -> dict[str, str]:
    sizes = {side: sum(len(t.encode()) for t in documents) for side, documents in text.items()}
    rates = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    return {
        "text": f"pydoc_data.topics of CPython {platform.python_version()}",
        "training": f"{sizes['train']:,} bytes, sha256 {fingerprint(text['train'])}",
        "held out": f"{sizes['validation']:,} bytes, sha256 {fingerprint(text['validation'])}",
        "stream": f"{100 * TEXT_SHARE:.0f} % text, {100 - 100 * TEXT_SHARE:.0f} % drills; {STEPS} steps of {BATCH} rows of {LENGTH} tokens",
        "optimiser": f"AdamW, cosine decay; learning rates: {rates}; embeddings start with a deviation of {INITIALIZER_RANGE}",
        "seed": str(SEED),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("hybridzoo", "torch", "transformers", "lm_eval")),
        "time": f"{seconds:.0f} s on {os.cpu_count()} CPU cores",
    }
