"""Evaluate an image model on images: how often it is right, where it is not, and how sure of that a set of this size can be."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..zoo.checkpoint.publish import write_whole
from ..zoo.images.examples import ImageExamples, images_from
from ..zoo.images.opened import check_head, evaluating, image_model, name_of
from ..zoo.report.charts import picture
from ..zoo.report.confusion import MOST, confusion_chart
from ..zoo.terminal import counting
from .tasks import check_amounts

__all__ = ["confusion_picture", "evaluate_images", "worst"]

_BATCH, _WORKERS = 64, 8


def evaluate_images(
    model: Any,
    data: Any,
    *,
    limit: int | float | None = None,
    batch_size: int | str = "auto",
    damaged: str = "stop",
    device: str | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score an image model.

    Args:
        model: As for :func:`hybridzoo.zoo.images.predict.predict`.
        data: As for :func:`hybridzoo.zoo.images.images_from`, of which the part ``test`` is taken, or ``val``, where there are parts.
        limit: Images, or a share of them below 1, taken at equal distances from all.
        batch_size: Images per forward; ``"auto"`` is 64.
        damaged: ``stop`` or ``skip``: what is done about files that are no whole images.
        device: A GPU by default, if there is one; a model stays where it is.
        output: JSON file for the results; the confusion matrix is drawn beside it, as ``.svg``. Each is written whole or not at all.
        progress: Whether a bar is shown, on a terminal.

    Returns:
        ``{"model", "data", "digest", "n", "top1", "top1_stderr", "top5", "top5_stderr", "loss", "loss_stderr", "classes": [{"name", "n",
        "top1"}, ...], "confusion": rows of counts, the true class down, the taken one across}``. Shares are from 0 to 1, the loss is in
        nats per image, standard errors are those of a mean over ``n`` images; ``top5`` is None up to five classes, ``top1`` of a class
        without images, too.

    Raises:
        ValueError: The model is none of images, or has no head; data that cannot be read or has other classes; an amount of nothing.
    """
    check_amounts(limit, batch_size)
    if output is not None and Path(output).is_dir():
        raise ValueError(f"output: {output} is a folder. Name a JSON file.")
    built = image_model(model, device, "Give tasks in place of data (--tasks hybridzoo_mqar).")
    check_head(built)
    examples = images_from(data, built.cfg, "test", damaged=damaged)
    chosen = _chosen(len(examples), limit)
    with counting("images", len(chosen), progress) as done:
        parts = []
        for part in _judged(built, examples, chosen, _BATCH if str(batch_size).startswith("auto") else int(batch_size)):
            parts.append(part)
            done(len(part[0]))
    truth, taken, loss, rank = (torch.cat(column) for column in zip(*parts, strict=True))
    of = str(data) if isinstance(data, str | os.PathLike) else type(data).__name__
    results = {"model": name_of(model), "data": of, "digest": examples.digest} | _scores(
        truth, taken, loss, rank, examples.classes
    )
    if output is not None:
        write_whole(Path(output), json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_whole(Path(output).with_suffix(".svg"), confusion_picture(results))
    return results


def confusion_picture(results: dict[str, Any]) -> str:
    """Return the confusion matrix as an SVG file; of many classes, of those that were mistaken most."""
    n, right, counts = results["n"], results["top1"], results["confusion"]
    title = f"{Path(results['model']).name} on {Path(results['data']).name}: {right:.1%} of {n:,} images right"
    shown = worst(counts)
    names = [results["classes"][i]["name"] for i in shown]
    pairs = [[i, j, counts[a][b]] for i, a in enumerate(shown) for j, b in enumerate(shown) if counts[a][b]]
    some = "Classes" if len(shown) == len(counts) else f"The {len(shown)} classes that were mistaken most"
    return picture(title, [(f"{some}, and what their images were taken for", confusion_chart(names, pairs))])


def worst(counts: Sequence[Sequence[int]], most: int = MOST) -> list[int]:
    """Return the numbers of the classes, in their order; of more than ``most``, those of which the largest share was mistaken."""
    wrong = [1 - row[i] / sum(row) if sum(row) else -1.0 for i, row in enumerate(counts)]
    return sorted(sorted(range(len(counts)), key=lambda i: -wrong[i])[:most])


def _chosen(n: int, limit: int | float | None) -> list[int]:
    """Return the numbers of as many examples as are asked for, from all classes: data is often in their order."""
    if limit is None:
        return list(range(n))
    some = min(n, max(1, math.ceil(limit * n) if limit < 1 else int(limit)))
    return [i * n // some for i in range(some)]


def _judged(model: Any, examples: ImageExamples, chosen: list[int], batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Return of batch by batch the labels, the classes taken, the losses in nats, and how many classes stood before the right one."""
    device = model.some_weight().device
    # what is in memory already is only normalised
    workers = 0 if examples.rows.kept is not None else min(_WORKERS, os.cpu_count() or 1)
    with evaluating(model):
        for part in DataLoader(Subset(examples, chosen), batch, num_workers=workers):
            logits = model(part["pixel_values"].to(device)).logits.double().cpu()
            labels = part["labels"]
            right = logits.gather(1, labels[:, None])
            rank = (logits > right).sum(1)
            yield labels, logits.argmax(1), F.cross_entropy(logits, labels, reduction="none"), rank


def _scores(truth: Tensor, taken: Tensor, loss: Tensor, rank: Tensor, names: list[str]) -> dict[str, Any]:
    n, k = len(truth), len(names)
    counts = torch.zeros(k, k, dtype=torch.long).index_put_(
        (truth, taken), torch.ones(n, dtype=torch.long), accumulate=True
    )
    found: dict[str, Any] = {"n": n}
    values = {"top1": (taken == truth).double(), "top5": (rank < 5).double() if k > 5 else None, "loss": loss}
    for name, value in values.items():
        found[name] = None if value is None else value.mean().item()
        # of one image there is none
        found[f"{name}_stderr"] = None if value is None or n < 2 else (value.std() / math.sqrt(n)).item()
    found["classes"] = [
        {"name": name, "n": int(row.sum()), "top1": (row[i] / row.sum()).item() if row.sum() else None}
        for i, (name, row) in enumerate(zip(names, counts, strict=True))
    ]
    found["confusion"] = counts.tolist()
    return found
