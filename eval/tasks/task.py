"""The lm-eval side of the local tasks: a task class that makes its documents here, and what it makes them from.

Every YAML in this folder names :class:`LocalTask` and a ``custom_dataset`` function by its full path, so it loads by
name through ``hybridzoo.eval.run`` and by file name through any lm-eval: ``lm_eval --model hf ... --tasks
/path/to/hybridzoo_mqar.yaml``.

What can be set stands in the YAML under ``dataset_kwargs``; metadata overrides it, for all tasks or for one:
``--metadata '{"docs": 100, "hybridzoo_mqar": {"length": 256, "pairs": 32}}'``.
"""

import functools
import importlib.resources
import json
import platform
import re
import statistics
from collections.abc import Callable
from typing import Any

import datasets
import lm_eval.models  # noqa: F401  # fills the registry of models; an empty one would never be filled once we are in it
import yaml
from lm_eval.api.registry import model_registry
from lm_eval.api.task import ConfigurableTask

from ...zoo.train.data import fingerprint, topics
from . import render
from .generators import evaluation_rng

__all__ = ["LocalTask", "bpb", "copying", "induction", "mmlu_dev", "mqar", "passkey", "selective_copying"]

Built = tuple[dict[str, list[dict]], dict[str, Any]]

if "hybridzoo" not in model_registry:
    # whoever loads one of our YAMLs can name our model, too
    model_registry.register("hybridzoo", target="hybridzoo.eval.harness:HybridZooLM")


class LocalTask(ConfigurableTask):
    """A task whose ``custom_dataset`` returns ``(rows by split, facts)``.

    The facts, such as the chance level, go into the metadata.
    """

    def __init__(self, config: dict | None = None):
        config = {k: v for k, v in (config or {}).items() if k != "class"}
        # model arguments arrive here as well, and may hold a whole model
        config["metadata"] = {k: v for k, v in config.get("metadata", {}).items() if _is_plain(v)}
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Build the splits from ``dataset_kwargs``, with what the metadata overrides."""
        metadata, build = self.config.metadata, self.config.custom_dataset
        given = metadata | metadata.get(self.config.task, {})
        # other keys of the metadata are the model's or another task's
        sizes = {k: given.get(k, default) for k, default in (dataset_kwargs or {}).items()}
        splits, facts = build(**sizes)
        self.dataset = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        self.config.dataset_kwargs = sizes
        self.config.metadata = metadata | facts

    def build_all_requests(self, *, tokenizer_name: str = "", **kwargs: Any) -> None:
        """As the base class; the key of ``--cache_requests`` says which data the requests were made from."""
        made_from = json.dumps([self.config.dataset_kwargs, self.VERSION], sort_keys=True, default=str)
        super().build_all_requests(tokenizer_name=f"{tokenizer_name}-{fingerprint([made_from])[:16]}", **kwargs)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _recall(make: Callable[..., list[render.Document]], docs: int = 64, data_seed: int = 0, **sizes: Any) -> Built:
    """A row per question of ``docs`` documents, and 8 more documents as few-shot examples."""

    def rows(stream: int, n: int) -> list[dict]:
        asked = (
            (i, e) for i, d in enumerate(make(evaluation_rng(data_seed, stream), n, **sizes)) for e in d.examples()
        )
        return [{"prompt": e.prompt, "choices": list(e.choices), "gold": e.gold, "document": i} for i, e in asked]

    test = rows(0, docs)
    # exact for a guess that is uniform among the choices
    chance = statistics.fmean(1 / len(row["choices"]) for row in test)
    return {"test": test, "fewshot": rows(1, 8)}, {"chance": {"acc": chance}}


mqar = functools.partial(_recall, render.mqar_documents)
induction = functools.partial(_recall, render.induction_documents)
selective_copying = functools.partial(_recall, render.selective_copying_documents)
copying = functools.partial(_recall, render.copy_documents)
passkey = functools.partial(_recall, render.passkey_documents)


def bpb() -> Built:
    """The held-out documents of :func:`hybridzoo.zoo.train.data.topics`, whole; the text varies with the Python version."""
    held_out = topics()["validation"]
    facts = {"text_sha256": fingerprint(held_out), "python": platform.python_version()}
    return {"test": [{"text": text} for text in held_out]}, facts | {"bytes": len("".join(held_out).encode())}


def mmlu_dev() -> Built:
    """The worked examples that ship inside lm-eval for MMLU prompts (MIT): dev questions, not the MMLU test set."""
    folder = importlib.resources.files("lm_eval.tasks") / "mmlu" / "flan_cot_fewshot"
    rows = []
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if re.fullmatch(r"mmlu_.*\.yaml", file.name):
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            subject = config["dataset_name"].replace("_", " ")
            rows += [row for sample in config["fewshot_config"]["samples"] if (row := _mmlu_row(subject, sample))]
    return {"test": rows}, {"chance": {"acc": 0.25, "acc_norm": 0.25}, "questions": len(rows)}


def _mmlu_row(subject: str, sample: dict[str, str]) -> dict | None:
    # one question offers five answers and is left out
    parts = re.fullmatch(r"(.*?)\(A\)(.*?)\(B\)(.*?)\(C\)(.*?)\(D\)((?:(?!\(E\)).)*)", sample["question"], re.DOTALL)
    gold = re.search(r"answer is \(?([A-D])\)?", sample["target"])
    if parts is None or gold is None:
        return None
    question, *answers = (part.strip() for part in parts.groups())
    lines = [question, *(f"{letter}. {answer}" for letter, answer in zip("ABCD", answers, strict=True)), "Answer:"]
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return {"prompt": head + "\n".join(lines), "choices": [*"ABCD"], "gold": "ABCD".index(gold[1]), "subject": subject}
