"""A study whose results are made up: what its statistics have to be is known, and its report can be looked at."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hybridzoo.eval.ablate.cells import Cell, Costs, Point

RATES = (1e-3, 3e-3, 1e-2)
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)


def costs(share, **more):
    state = round(2**16 * (1 - share) + 2**22 * share)
    known = {
        "params": 120_000 + round(900 * share),
        "active_params": 120_000 + round(900 * share),
        "flops": 750_000,
        "state_bytes": state,
        "context": 4096,
        "attention_of_mixers": share,
        "attention_of_blocks": None if share is None else share / 2,
    }
    return Costs(**known | more)


def point(name, share=0.25, rates=RATES, problem=None, **axes):
    return Point(
        name,
        axes or {"attention": share},
        {"d_model": 64, "name": name},
        rates,
        None if problem else costs(share),
        problem,
    )


def result(point, rate, seed, test, valid=None, task=None, metric="accuracy", folder=Path("/nowhere"), **more):
    """A result as the store gives it; its file is written where ``folder`` exists."""
    cell = Cell("made-up", point, rate, seed, task or {"name": "mqar", "length": 64}, {"steps": 100})
    valid = test if valid is None else valid
    found = {
        "metric": metric,
        "valid": {metric: valid, "n": 100},
        "test": {metric: test, "n": 100},
        "steps": 100,
        "seconds": 12.0,
    }
    path = folder / "cells" / cell.key("code") / "result.json"
    if folder.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "code": "0123abcd",
            "versions": {"torch": "2.13.0"},
            "device": "a CPU",
            "date": "2026-11-30T10:00:00+00:00",
        }
        path.write_text(json.dumps({"cell": cell.plain(), **facts, "result": found | more}))
    return SimpleNamespace(cell=cell, result=found | more, path=path)


def spec(**more):
    known = {
        "source": "recall-ratio",
        "name": "recall-ratio",
        "scale": "short",
        "question": "How much attention does recall need in a hybrid of Mamba-2?",
        "about": "Multi-query associative recall with models of equal size. What is on this page is made up.",
        "axes": {},
        "match": SimpleNamespace(cost="params", within=0.01, by="mixers.mlp.d_intermediate"),
        "task": {"name": "mqar", "length": 256, "pairs": 64},
        "train": {"steps": 2000, "batch_size": 64},
        "rates": {"default": list(RATES)},
        "seeds": (0, 1, 2),
        "measure": {"contexts": [1024, 4096, 16384]},
        "report": {"x": None, "literature": ["mqar", "linear-attention-hybrids"]},
        "data": {
            "name": "recall-ratio",
            "axes": {"attention": {"key": "layers.allocate.attention", "values": list(SHARES)}},
        },
    }
    return SimpleNamespace(**known | more)


def grid():
    """Eleven points: five shares of attention and three places for it, of which the pure ends have one; and one that is not matched."""
    points = [point(f"attention={s:g} place={p}", s, attention=s, place=p) for s in SHARES for p in ("even", "first", "last")
              if p == "even" or 0 < s < 1]  # fmt: skip
    return [
        *points,
        point(
            "attention=0.75 place=even",
            problem="parameters: 118,200 and 122,900 are the nearest to 120,000",
            attention=0.75,
            place="even",
        ),
    ]


def study(folder=Path("/nowhere"), metric="accuracy", seeds=(0, 1, 2), task=None):
    """Points and results: first all rates with one seed, then the best rate with the others."""
    rng, points = np.random.default_rng(0), grid()
    task = task or {"name": "mqar", "length": 256, "pairs": 64}
    results = []
    for p in points:
        if p.problem:
            continue
        share = p.axes["attention"]
        good = (
            0.99
            - 0.55 * math.exp(-9 * share)
            - 0.02 * share
            - {"even": 0, "first": 0.06, "last": 0.02}[p.axes["place"]]
        )
        best = 0 if share == 1 else 1 + (share < 0.1) * 1
        for i, rate in enumerate(RATES):
            for seed in seeds if i == best else seeds[:1]:
                noisy = lambda: float(np.clip(good - 0.08 * abs(i - best) + 0.008 * rng.standard_normal(), 0, 1))  # noqa: B023, E731
                results.append(
                    _trained(p, rate, seed, noisy(), noisy(), task, metric, folder, i == 0 and seed == seeds[0])
                )
    return points, results


def _trained(p, rate, seed, test, valid, task, metric, folder, measured):
    share = p.axes["attention"]
    slices = {
        f"pairs={n}": {metric: max(0.0, min(1.0, test + 0.05 - 0.1 * n / 64 * (1.5 - share)))}
        for n in (4, 8, 16, 32, 64)
    }
    slices |= {
        f"length={n}": {metric: max(0.0, min(1.0, test - 0.12 * max(0, math.log2(n / 256)) * (0.3 + share)))}
        for n in (64, 256, 512, 1024, 2048)
    }
    rng = np.random.default_rng(seed)
    history = [
        {"step": s, "loss": 9 * math.exp(-s / (150 + 700 * (1 - test))) + 1.2 - test + 0.03 * rng.random()}
        for s in range(20, 2001, 20)
    ]
    speed = [
        {
            "context": n,
            "prefill_tokens_s": 4e5 / (1 + share * n / 8192),
            "decode_tokens_s": 900 / (1 + share * n / 4096),
            "peak_bytes": 2**26 + 2**10 * n * (1 + share),
            "state_bytes": round(2**16 * (1 - share) + 2**10 * n * share),
        }
        for n in (1024, 4096, 16384)
    ]  # fmt: skip
    score = test if metric == "accuracy" else 2.2 - test
    return result(
        p, rate, seed, score, valid if metric == "accuracy" else 2.2 - valid, task, metric, folder,
        history=history, speed=speed if measured else [], tokens_per_second=3e5 * (1 - 0.2 * share), tokens=1e6,
    ) if metric != "accuracy" else _with_slices(
        result(p, rate, seed, score, valid, task, metric, folder, history=history, speed=speed if measured else [],
               tokens_per_second=3e5 * (1 - 0.2 * share), tokens=1e6, seconds=30 + 10 * share), slices)  # fmt: skip


def _with_slices(found, slices):
    found.result["test"]["slices"] = slices
    return found


def failure(p, rate=1e-2, error="OutOfMemoryError: tried to allocate 2.0 GiB"):
    cell = Cell("made-up", p, rate, 0, {"name": "mqar"}, {"steps": 100})
    return SimpleNamespace(
        cell=cell, error=error, log=Path("/store/recall-ratio-short/cells/0123456789abcdef/log.txt"), attempts=2
    )
