"""Files made tokens once: what is read of every kind, what is kept, and what is noticed."""

import errno
import gzip
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.zoo.corpus import sealed, store, text_files, tokenized
from hybridzoo.zoo.corpus.documents import read_documents
from hybridzoo.zoo.corpus.encoding import batch_encoder, identity_of
from hybridzoo.zoo.corpus.piece import Piece
from hybridzoo.zoo.corpus.sealed import NotWhole
from hybridzoo.zoo.corpus.standard_input import OtherInput, tokens_of_input
from hybridzoo.zoo.corpus.store import TokenStore, TokenWriter
from hybridzoo.zoo.corpus.tokenized import Tokenizing, tokens_at
from hybridzoo.zoo.tokenizer import ByteTokenizer, document_encoder
from hybridzoo.zoo.train.run import train
from hybridzoo.zoo.train.run_folder import DifferentRun

BYTES = Tokenizing(ByteTokenizer(), 256)
encode = ByteTokenizer().encode
# nothing is imported again
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
FORK = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(folder))
    return folder


def documents_of(store):
    """As lists, without their separators."""
    edges = store.starts.tolist()
    found = [store.tokens[a:b].tolist() for a, b in itertools.pairwise(edges)]
    assert all(d[0] == store.separator for d in found)
    return [d[1:] for d in found]


def kept_in(cache):
    return sorted(f for f in (cache / "tokens").iterdir() if not f.name.startswith("."))


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_kind_of_file_in_one_folder(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("one\r\ntwo")
    (tmp_path / "b.jsonl").write_text(lines({"text": "three"}, {"text": [4, 5]}, {"text": ""}))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as f:
        f.write(lines({"text": "six"}))
    with gzip.open(tmp_path / "d.txt.gz", "wt") as f:
        f.write("seven")
    parquet.write_table(pa.table({"text": ["eight", "nine"] * 2000}), tmp_path / "e.parquet", row_group_size=7)
    parquet.write_table(pa.table({"text": [[1, 2], [], [3]]}), tmp_path / "f.parquet")
    datasets.Dataset.from_dict({"text": ["ten"], "other": [1]}).save_to_disk(str(tmp_path / "g"))
    np.save(tmp_path / "h.npy", np.array([[7, 8], [9, 1]], ">i4"))
    (tmp_path / "i.txt").write_text(" \n")
    (tmp_path / "z.bin").write_bytes(b"\xff")
    wanted = [encode("one\ntwo"), encode("three"), [4, 5], encode("six"), encode("seven")]
    wanted += [encode("eight"), encode("nine")] * 2000 + [[1, 2], [3], encode("ten"), [7, 8, 9, 1]]
    store, about = tokens_at(tmp_path, BYTES, None)
    assert documents_of(store) == wanted
    assert store.skipped == 3 and store.tokens.dtype == np.uint8 and store.documents == len(wanted)
    assert [list(d) for d in read_documents(tmp_path, encode) if len(d)] == wanted
    assert about[0].startswith("tokenized in")


def test_the_column_and_the_split_are_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"content": ["abc", "de"], "ids": [[1], [2, 3]], "score": [0.5, 1.0]})
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(test=rows, valid=rows).save_to_disk(str(tmp_path / "neither"))

    def found(folder, column):
        return documents_of(tokens_at(tmp_path / folder, Tokenizing(ByteTokenizer(), 256, column), None)[0])

    assert found("both", "content") == [encode("abc"), encode("de")] and found("both", "ids") == [[1], [2, 3]]
    assert found("both/test", "ids") == [[2, 3]]
    # rows that were chosen, and stand elsewhere on disk
    rows.shuffle(seed=1).select([1, 0]).save_to_disk(str(tmp_path / "chosen"))
    assert sorted(found("chosen", "ids")) == [[1], [2, 3]]
    for folder, column, message in [
        ("both", "text", "has no column 'text'; its columns: 'content', 'ids', 'score'"),
        ("both", "score", "holds double, which is neither text nor lists of token ids"),
        ("neither", "ids", r"no split 'train'; its splits: test, valid\. Name the folder of one: .*neither/test"),
    ]:
        with pytest.raises(ValueError, match=message):
            found(folder, column)


def damaged_parquet(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": [str(i) * 99 for i in range(3000)]}), tmp_path / "a.parquet")
    return pa, parquet, (tmp_path / "a.parquet").read_bytes()


def test_a_parquet_file_that_was_cut_or_holds_nulls_is_one_error(tmp_path):
    pa, parquet, whole = damaged_parquet(tmp_path)
    middle = whole[: len(whole) // 3] + bytes(2000) + whole[len(whole) // 3 + 2000 :]
    for content in (whole[:-100], whole[: len(whole) // 2], middle, b"", b"PAR1"):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.parquet: is not a whole parquet file"):
            tokens_at(tmp_path / "a.parquet", BYTES, None)
    for values, message in [
        (["a", "b", None], r"a\.parquet, row 3: 'text' is empty \(null\)"),
        ([[1], [2, None]], r"a\.parquet, row 2: 'text' holds an empty id"),
    ]:
        parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=message):
            tokens_at(tmp_path / "a.parquet", BYTES, None)


def test_lists_of_every_kind_are_token_ids(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [[1, 2], [3, 4], [5, 6]] * 1000
    for kind in (pa.list_(pa.int64()), pa.list_(pa.uint16(), 2), pa.large_list(pa.int8())):
        parquet.write_table(pa.table({"text": pa.array(rows, kind)}), tmp_path / "a.parquet")
        assert documents_of(tokens_at(tmp_path / "a.parquet", BYTES, None)[0]) == rows
    words = pa.array(["one", "two"] * 3).dictionary_encode()
    parquet.write_table(pa.table({"text": words}), tmp_path / "a.parquet")
    assert documents_of(tokens_at(tmp_path / "a.parquet", BYTES, None)[0]) == [encode("one"), encode("two")] * 3
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="is empty"):
        tokens_at(tmp_path / "a.parquet", BYTES, None)


@pytest.mark.parametrize("damage", ["state.json", "dataset_info.json", "arrow"])
def test_a_damaged_dataset_is_one_error(tmp_path, damage):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [str(i) * 50 for i in range(5000)]}).save_to_disk(str(tmp_path / "data"))
    if damage == "arrow":
        file = next((tmp_path / "data").glob("*.arrow"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        (tmp_path / "data" / damage).write_text("{")
    with pytest.raises(ValueError, match="data: cannot be read as a dataset"):
        tokens_at(tmp_path / "data", BYTES, None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_sent_to_standard_input(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"is a pipe or a device, .*--data - <"):
        tokens_at(tmp_path / "pipe", BYTES, None)


@pytest.mark.parametrize("library", ["pyarrow", "datasets"])
def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    if library == "pyarrow":
        (tmp_path / "a.parquet").touch()
    else:
        (tmp_path / "state.json").write_text("{}")
        (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ModuleNotFoundError, match=rf"'{library}'.*pip install 'hybridzoo\[data\]'"):
        tokens_at(tmp_path, BYTES, None)


def test_one_broken_line_in_a_million_is_named(tmp_path):
    good = b'{"text": "a"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 150_000 + b'{"text": "b}\n' + good * 849_999)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 150001: is not a JSON object"):
        tokens_at(tmp_path / "a.jsonl", BYTES, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "a"}\n', r"line 2: .*its keys: 'txt'\. .*--column"),
        ('{"text": [1, 2]}\n{"text": [1, "2"]}\n', 'line 2: "text" holds a string'),
        ('{"text": [true]}\n', 'line 1: "text" holds true'),
        ('{"text": [1, 99999999999999999999]}\n', "line 1: .*beyond 64 bits"),
        ('{"text": [1]}\n{"text": [1, 256]}\n', r"line 2: holds id 256, .*vocabulary of 256\. Set vocab_size"),
        ('{"text": [-300]}\n', "line 1: holds id 299"),
        ('{"text": ""}\n{"text": "\\u0000"}\n', "none of 2 documents holds a token"),
        ('{"text": ""}\n{"text": []}\n', "is empty"),
        ('{"text": {}}\n', "is an object"),
    ],
    ids=range(9),
)
def test_bad_lines_are_named(tmp_path, cache, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        tokens_at(tmp_path / "a.jsonl", BYTES, None)
    assert not kept_in(cache)


def test_compressed_files_that_were_cut_are_named(tmp_path):
    whole = gzip.compress(lines(*({"text": str(i) * 50} for i in range(500))).encode())
    for content in (whole[:-4], whole[: len(whole) // 2], b"no gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: is not whole gzip data"):
            tokens_at(tmp_path / "a.jsonl.gz", BYTES, None)


@given(st.text(alphabet="ab \n\ré€😀", max_size=60), st.integers(8, 20))
@settings(max_examples=150, deadline=None)
def test_long_text_in_pieces_is_the_text(text, block):
    before, text_files._BLOCK = text_files._BLOCK, block
    try:
        raw = text.encode()
        found = list(text_files.read_text(io.BytesIO(raw), "there", lambda: 0))
    finally:
        text_files._BLOCK = before
    whole = text.replace("\r\n", "\n").replace("\r", "\n")
    assert [p.begins for p in found] == [True] + [False] * (len(found) - 1)
    assert "".join(p.content for p in found) == (whole if whole.strip() or len(raw) >= block else "")


def test_a_long_text_is_cut_where_a_tokenizer_sees_no_difference(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    text = "\n".join(f"line {i}, with words {'and more ' * (i % 7)}end" + "\n" * (i % 3) for i in range(400))
    tokenizer = trained_on(text, transformers)
    whole = list(document_encoder(tokenizer)[0](text))
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(text_files, "_BLOCK", 1000)
    store, _ = tokens_at(tmp_path / "a.txt", Tokenizing(tokenizer, 1000), None)
    assert documents_of(store) == [whole] and store.tokens.dtype == np.uint16


def trained_on(text, transformers, template=None):
    """A byte-level BPE tokenizer as GPT-2's, perhaps with special tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
def test_a_batch_is_encoded_as_its_documents_are(template):
    transformers = pytest.importorskip("transformers")
    texts = ["the first one", "", "a second", "and the third\nof them" * 5]
    tokenizer = trained_on(" ".join(texts), transformers, template)
    one, _ = document_encoder(tokenizer)
    found = batch_encoder(tokenizer)([Piece("", text, True, 0) for text in texts])
    assert [part.tolist() for part in found] == [list(one(text)) for text in texts]
    # in parts: what a tokenizer puts in front stands there once
    parts = [Piece("", "a second", True, 0), Piece("", " one", False, 0)]
    joined = np.concatenate(batch_encoder(tokenizer)(parts)).tolist()
    assert joined == list(one("a second")) + tokenizer.encode(" one", add_special_tokens=False)
    assert identity_of(tokenizer) != identity_of(trained_on("other words", transformers, template))
    assert identity_of(tokenizer) == identity_of(trained_on(" ".join(texts), transformers, template))


def test_a_tokenizer_of_more_ids_than_the_model_is_named_with_the_document(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = trained_on("some words for a tokenizer", transformers)
    (tmp_path / "a.jsonl").write_text(lines({"text": "\u00e9"}, {"text": "words for a tokenizer"}))
    with pytest.raises(ValueError, match=r"line 2: the tokenizer gives id \d+, .*vocabulary of 258\. Name the model's"):
        tokens_at(tmp_path / "a.jsonl", Tokenizing(tokenizer, 258), None)


def test_numbers_are_as_small_as_they_can_be_and_grow_when_they_must(tmp_path):
    rng = np.random.default_rng(0)
    runs = [
        rng.integers(0, 200, 1000),
        rng.integers(0, 60_000, 1000),
        -rng.integers(1, 100, 10),
        rng.integers(0, 2**31, 9),
    ]
    for count, kind in enumerate((np.uint8, np.uint16, np.int32, np.int64), 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        with TokenWriter(folder, 0, 2**31, 200) as writer:
            for ids in runs[:count]:
                writer.add([Piece("there", ids, True, 0)], [ids])
            writer.close()
        store = TokenStore(folder)
        assert store.tokens.dtype == kind and documents_of(store) == [ids.tolist() for ids in runs[:count]]
    assert store.beyond(2**31) is None and store.beyond(60_000)[1] == 4 and store.read_only


def test_what_is_not_changed_is_not_tokenized_again(tmp_path, cache, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("abc")
    first, _ = tokens_at(file, BYTES, None)
    monkeypatch.setattr(Tokenizing, "write", None)
    again, about = tokens_at(file, BYTES, None)
    assert again.digest == first.digest and "tokenized before" in about[0]
    monkeypatch.undo()
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(cache))
    # the same size, and within a tick of the clock perhaps the same time
    file.write_text("abd")
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    other, _ = tokens_at(file, BYTES, None)
    assert documents_of(other) == [encode("abd")] and other.digest != first.digest
    assert kept_in(cache) == [other.folder], "what was made of the old content is of no use"
    elsewhere = tmp_path / "b.txt"
    elsewhere.write_text("abd")
    assert tokens_at(elsewhere, BYTES, None)[0].digest == other.digest and len(kept_in(cache)) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "sealed", "garbage", "other"])
def test_a_damaged_store_is_made_again(tmp_path, cache, damage):
    file = tmp_path / "a.txt"
    file.write_text("abc" * 1000)
    store, _ = tokens_at(file, BYTES, None)
    digest, tokens, seal = store.digest, store.folder / "tokens.bin", store.folder / "sealed.json"
    if damage == "cut":
        os.truncate(tokens, 100)
    elif damage == "flip":
        content = bytearray(tokens.read_bytes())
        content[500] ^= 1
        tokens.write_bytes(content)
    elif damage == "missing":
        (store.folder / "documents.bin").unlink()
    else:
        seal.write_text({"sealed": "", "garbage": "[]", "other": '{"format": 0}'}[damage])
    with pytest.raises(NotWhole):
        TokenStore(store.folder)
    again, about = tokens_at(file, BYTES, None)
    assert again.digest == digest and documents_of(again) == [encode("abc" * 1000)] and "tokenized in" in about[0]


@forks
def test_a_process_that_is_killed_leaves_nothing_half(tmp_path, cache, monkeypatch):
    file, writing = tmp_path / "a.jsonl", FORK.Event()
    file.write_text(lines(*({"text": "word " * 50} for _ in range(40_000))))

    def wait(*args):
        writing.set()
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(store, "seal", wait)
        process = FORK.Process(target=tokens_at, args=(file, BYTES, None))
        process.start()
    assert writing.wait(60)
    process.kill()
    process.join()
    assert not kept_in(cache) and list((cache / "tokens").glob(".*.writing"))
    # another file's turn takes away what is left
    (tmp_path / "b.txt").write_text("b")
    tokens_at(tmp_path / "b.txt", BYTES, None)
    assert not list((cache / "tokens").glob(".*.writing"))
    assert tokens_at(file, BYTES, None)[0].documents == 40_000


@forks
def test_of_several_processes_one_tokenizes(tmp_path, cache):
    file, at_once, said = tmp_path / "a.jsonl", FORK.Barrier(3), FORK.Queue()
    file.write_text(lines(*({"text": "word " * 50} for _ in range(20_000))))

    def tokenize():
        at_once.wait()
        store, about = tokens_at(file, BYTES, None)
        said.put((store.digest, about[0].startswith("tokenized in")))

    for _ in range(3):
        FORK.Process(target=tokenize).start()
    found = [said.get(timeout=60) for _ in range(3)]
    assert len({digest for digest, _ in found}) == 1 and sorted(made for _, made in found) == [False, False, True]


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("abc")
    write = Tokenizing.write

    def slowly(self, *args):
        write(self, *args)
        file.write_text("abc and more")

    monkeypatch.setattr(Tokenizing, "write", slowly)
    with pytest.raises(ValueError, match=r"a\.txt: has changed while it was read"):
        tokens_at(file, BYTES, None)


def test_a_full_disk_is_one_error_that_names_the_folder(tmp_path, cache, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")

    def full(folder, facts):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hybridzoo.zoo.corpus.store.seal", full)
    with pytest.raises(OSError, match=r"tokens: there is no room for the tokens \(No space left.*HYBRIDZOO_CACHE") as e:
        tokens_at(tmp_path / "a.txt", BYTES, None)
    assert str(cache) in str(e.value) and not list((cache / "tokens").glob(".*.writing"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_disk_that_is_full_is_told_by_every_write(tmp_path):
    with pytest.raises(OSError) as e, TokenWriter(tmp_path, 0, 256, 256) as writer:
        writer.tokens.close()
        writer.tokens = open("/dev/full", "wb")
        ids = np.ones(1 << 20, np.uint8)
        writer.add([Piece("there", ids, True, 0)], [ids])
    assert e.value.errno == errno.ENOSPC


def test_without_a_cache_tokens_lie_in_the_run_s_folder_or_nowhere(tmp_path, cache, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")
    cache.chmod(0o777)  # which is refused for a folder of code that is run, and holds for this one too
    store, about = tokens_at(tmp_path / "a.txt", BYTES, tmp_path / "run")
    assert store.folder.parent == tmp_path / "run" / "tokens" and "everybody may write" in about[0]
    store, about = tokens_at(tmp_path / "a.txt", BYTES, None)
    assert documents_of(store) == [encode("abc")] and "not kept" in about[0]
    assert not (cache / "tokens").exists()


def stdin_of(monkeypatch, content):
    raw = io.BytesIO(content.encode() if isinstance(content, str) else content)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=raw))


def test_standard_input_is_text_or_lines_and_is_kept(tmp_path, monkeypatch):
    how = Tokenizing(ByteTokenizer(), 256, "body")
    for content, wanted in [
        (lines({"body": "one"}, {"body": "two"}), [encode("one"), encode("two")]),
        ("plain\ntext", [encode("plain\ntext")]),
        ("{braces} are no JSON\nnor is this", [encode("{braces} are no JSON\nnor is this")]),
        ("\ufeff" + lines({"body": "marked"}), [encode("marked")]),
        ("x" * 70_000 + "\nlong", [encode("x" * 70_000 + "\nlong")]),
    ]:
        stdin_of(monkeypatch, content)
        store, _ = tokens_of_input(how, tmp_path)
        assert documents_of(store) == wanted
    stdin_of(monkeypatch, "")
    again, about = tokens_of_input(how, tmp_path)
    assert again.digest == store.digest and "earlier call" in about[0]
    with pytest.raises(ValueError, match=r"standard input: is empty, and .*other keeps nothing"):
        tokens_of_input(how, tmp_path / "other")
    stdin_of(monkeypatch, lines({"text": "a"}))
    with pytest.raises(ValueError, match=r"standard input, line 1: .*its keys: 'text'"):
        tokens_of_input(how, tmp_path / "other")


def test_what_is_kept_of_standard_input_is_not_replaced_against_its_will(tmp_path, monkeypatch):
    stdin_of(monkeypatch, "abc")
    first, _ = tokens_of_input(BYTES, tmp_path)
    stdin_of(monkeypatch, "abd")
    with pytest.raises(OtherInput, match="another text than that of standard input"):
        tokens_of_input(BYTES, tmp_path, replace=False)
    assert TokenStore(first.folder).digest == first.digest
    stdin_of(monkeypatch, "abc")
    assert tokens_of_input(BYTES, tmp_path, replace=False)[0].digest == first.digest
    stdin_of(monkeypatch, "abd")
    assert tokens_of_input(BYTES, tmp_path)[0].digest != first.digest


def test_a_run_on_standard_input_goes_on_with_nothing_there_and_with_nothing_else(tmp_path, monkeypatch):
    def run(text, **more):
        stdin_of(monkeypatch, text)
        given = {"steps": 2, "batch_size": 1, "length": 16, "report_to": "none", "device": "cpu"}
        return train("mamba-tiny", "-", tmp_path, overrides=["d_model=16", "layers=mamba"], **given | more)

    def stop(step, loss):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run("some text to train on", on_step=stop, save_every=1)
    with pytest.raises(DifferentRun, match=r"another text than that of standard input\. Use another folder"):
        run("some other text")
    with pytest.raises(ValueError, match="standard input can be read once only"):
        run("some text to train on", val="-")
    assert run("").resumed_from == 0 and run("some text to train on").resumed_from == 2
    assert run("some other text", resume=False).resumed_from == 0


@forks
def test_of_several_processes_the_first_reads_standard_input(tmp_path):
    said = FORK.Queue()

    def read(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        sys.stdin = io.TextIOWrapper(io.BytesIO(b"some text" if rank == 0 else b""))
        said.put((rank, tokens_of_input(BYTES, tmp_path)[0].digest))

    several = [FORK.Process(target=read, args=(rank,)) for rank in (1, 0)]
    several[0].start()
    time.sleep(0.5)
    assert several[0].is_alive() and said.empty(), "the second waits"
    several[1].start()
    found = dict(said.get(timeout=60) for _ in range(2))
    assert found[0] == found[1] != ""


def test_the_bar_counts_bytes_of_all_files(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(lines(*({"text": "x" * 1000} for _ in range(2000))))
    seen = []
    monkeypatch.setattr(tokenized, "_BATCH", 1 << 20)
    monkeypatch.setattr(tokenized._Bar, "show", lambda self, read: seen.append((read, self.size)))
    tokens_at(tmp_path, BYTES, None)
    total = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert len(seen) == 6 and seen == sorted(seen) and seen[-1] == (total, total)


def test_folders_that_are_made_at_once_are_made_by_one(tmp_path):
    def make(folder):
        (folder / "a").write_text("a")
        sealed.seal(folder, {"n": 1})

    for _ in range(2):
        (facts, _), there = sealed.kept(tmp_path / "it", make, sealed.unseal)
    assert facts == {"n": 1} and there
    shutil.rmtree(tmp_path / "it")
    with pytest.raises(NotWhole):
        sealed.unseal(tmp_path / "it")
