"""Time and memory of the way from generated JSON Lines to rows, a process for each size; the memory must not grow with the data."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ...zoo.tables import columns
from ..result_file import Result, Row, Tick, header, write
from .apart import answer, run_apart

__all__ = ["SIZES", "bench_data", "main", "measure", "table"]

SIZES = ("0.1", "1", "bpe:0.1")
_LENGTH, _ROWS = 2048, 20_000
_POOL = 4000  # different documents
_VOCABULARY = 8192


def bench_data(sizes: list[str] | None = None, out: Path | None = None, tick: Tick = lambda text: None) -> Result:
    """Measure gigabytes of JSON Lines (``10``), or what a tokenizer of 8,192 words makes of them (``bpe:1``), each in a fresh process.

    Raises:
        ValueError: A size that is no number of gigabytes, or a process that failed.
    """
    sizes, rows = list(sizes or SIZES), []
    with tempfile.TemporaryDirectory(prefix="hybridzoo-bench-") as folder:
        for kind, gigabytes in [_parsed(size) for size in sizes]:
            tick(f"{kind} {gigabytes:g}")
            spec = {"side": kind, "model": f"{gigabytes:g} GB", "gigabytes": gigabytes}
            try:
                rows.append(run_apart(__name__, spec, folder))
            except RuntimeError as e:
                raise ValueError(f"bench data: {e}") from e
    result = header("data", "zoo bench data " + " ".join(f"--part {size}" for size in sizes), "cpu", ["tokenizers"])
    result |= {"ceilings": {}, "cases": rows}
    if out is not None:
        write(result, out)
    return result


def _parsed(size: str) -> tuple[str, float]:
    kind, _, number = size.rpartition(":")
    try:
        if kind in ("", "byte", "bpe") and 0 < float(number) < 1e6:
            return kind or "byte", float(number)
    except ValueError:
        pass
    raise ValueError(f"bench data: unknown part {size!r}. Give gigabytes, as in {', '.join(SIZES)}, 10.")


def table(result: Result) -> Table:
    """Lay a result out for people."""
    heads = (
        "tokenize_MBs",
        "layout_s",
        "open_again_s",
        "read_row_us",
        "before_MB",
        "prepared_peak_MB",
        "store_MB",
        "padding",
    )
    laid = columns("data", *heads, left=1)
    for row in result["cases"]:
        laid.add_row(row["name"], *(f"{row[head]:g}" for head in heads))
    return laid


def main() -> None:
    """Measure one size in its own process."""
    answer(lambda spec: measure(spec["gigabytes"], spec["side"]))


def measure(gigabytes: float, kind: str) -> Row:
    """Generate, tokenize, lay out and read, in this process and a temporary folder."""
    import os

    from ...zoo.corpus.packing import layout_of
    from ...zoo.corpus.rows import StoredRows
    from ...zoo.corpus.tokenized import Tokenizing, tokens_at
    from ...zoo.tokenizer import ByteTokenizer

    with tempfile.TemporaryDirectory(prefix="hybridzoo-bench-") as folder:
        os.environ["HYBRIDZOO_CACHE"] = folder
        file = Path(folder, "lines.jsonl")
        size = generate(file, int(gigabytes * 1e9))
        tokenizer = ByteTokenizer() if kind == "byte" else _trained()
        how = Tokenizing(tokenizer, max(256, getattr(tokenizer, "vocab_size", 0)))
        before = _peak_megabytes()
        begun = time.perf_counter()
        store, _ = tokens_at(file, how, None)
        tokenized = time.perf_counter()
        layout = layout_of(store, _LENGTH, "documents")
        laid = time.perf_counter()
        prepared = _peak_megabytes()
        rows = StoredRows(store, layout, apart=True)
        chosen = np.random.default_rng(0).integers(0, len(rows), _ROWS)
        reading = time.perf_counter()
        for index in chosen.tolist():
            rows[index]
        read = time.perf_counter()
        again = time.perf_counter()
        layout_of(tokens_at(file, how, None)[0], _LENGTH, "documents")
        opened = time.perf_counter() - again
        return {
            "name": f"{kind} {gigabytes:g} GB", "op": "data", "bytes": size, "documents": store.documents, "tokens": len(store.tokens),
            "rows": len(rows), "padding": round(1 - len(store.tokens) / (len(rows) * _LENGTH), 5),
            "tokenize_MBs": round(size / 1e6 / (tokenized - begun), 1), "tokenize_s": round(tokenized - begun, 2),
            "layout_s": round(laid - tokenized, 2), "open_again_s": round(opened, 3),
            "read_row_us": round(1e6 * (read - reading) / _ROWS, 1), "before_MB": before, "prepared_peak_MB": prepared,
            "store_MB": round(sum(f.stat().st_size for f in store.folder.rglob("*") if f.is_file()) / 1e6),
        }  # fmt: skip


def generate(file: Path, size: int) -> int:
    """Write about ``size`` bytes of documents of the lengths of web pages, taken from the text that ships with Python."""
    from pydoc_data.topics import topics

    rng = np.random.default_rng(0)
    text = "\n".join(topics.values())
    lengths = np.clip(rng.lognormal(7.3, 1.1, _POOL), 20, 200_000).astype(int)
    starts = rng.integers(0, max(1, len(text) - lengths.max()), _POOL)
    pool = [
        json.dumps({"text": text[a : a + n], "id": i}).encode() + b"\n"
        for i, (a, n) in enumerate(zip(starts, lengths, strict=True))
    ]
    written = 0
    with file.open("wb") as f:
        while written < size:
            block = b"".join(pool[i] for i in rng.integers(0, _POOL, 1000).tolist())
            written += f.write(block)
    return written


def _trained() -> Any:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def _peak_megabytes() -> int:
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
