"""The built-in text and its split, packing, mixing, and reading files."""

import codecs
import difflib
import io
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.zoo.corpus.places import check_path
from hybridzoo.zoo.tokenizer import ByteTokenizer
from hybridzoo.zoo.train.data import Rows, fingerprint, mix, pack, read_documents, rows_from, rows_with_targets, topics

encode = ByteTokenizer().encode


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def split():
    return topics()


def test_topics_are_all_there_and_split_by_document(split):
    from pydoc_data.topics import topics as source

    assert sorted(split["train"] + split["validation"]) == sorted(source.values())
    share = sum(map(len, split["validation"])) / sum(map(len, source.values()))
    assert 0.05 < share <= 0.1
    assert topics() == split


def paragraphs(documents):
    return {" ".join(p.split()) for d in documents for p in re.split(r"\n\s*\n", d) if len(p) > 80}


def test_no_paragraph_stands_on_both_sides_of_the_split(split):
    assert not paragraphs(split["train"]) & paragraphs(split["validation"])


def test_no_paragraph_has_a_near_copy_on_the_other_side(split):
    # judged by characters, where the split goes by words: the closest pairs by trigrams are then compared in full
    def trigrams(p):
        return {p[i : i + 3] for i in range(len(p) - 2)}

    train = [(p, trigrams(p)) for p in sorted(paragraphs(split["train"]))]
    for held_out in sorted(paragraphs(split["validation"])):
        grams = trigrams(held_out)
        for other, theirs in train:
            if len(grams & theirs) > 0.8 * len(grams | theirs):
                assert difflib.SequenceMatcher(None, held_out, other, autojunk=False).ratio() < 0.9, (held_out, other)


def test_fingerprint_sees_bytes_and_boundaries():
    assert fingerprint(["ab", "c"]) == fingerprint(["ab", "c"])
    assert len({fingerprint(d) for d in (["ab", "c"], ["a", "bc"], ["abc"], ["ab", "d"])}) == 4


def test_pack_joins_documents_and_fills_the_last_row():
    assert pack([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], 6).tolist() == [
        [0, 1, 2, 3, 0, 4],
        [0, 5, 6, 7, 8, 9],
        [10, -1, -1, -1, -1, -1],
    ]


def test_pack_never_cuts_a_document_that_fits():
    assert pack([[1, 2, 3], [4, 5, 6]], 6).tolist() == [[0, 1, 2, 3, -1, -1], [0, 4, 5, 6, -1, -1]]


@given(st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1).filter(any), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_pack_loses_and_adds_nothing(documents, length):
    stream = pack(documents, length).reshape(-1)
    assert stream[stream >= 0].tolist() == [i for d in documents if d for i in [0, *d]]


def test_rows_do_not_predict_what_is_marked_or_empty():
    row = Rows(np.array([[0, 5, ~7, -1]]))[0]
    assert row["input_ids"].tolist() == [0, 5, 7, 0] and row["labels"].tolist() == [0, 5, -100, -100]
    assert row["input_ids"].dtype == torch.int64


def test_mix_draws_in_proportion_and_repeats_only_what_is_short():
    a, b = np.arange(40).reshape(20, 2), np.full((3, 2), -7)
    rows = mix([(a, 1), (b, 2)], 30, seed=1)
    ours = rows[rows[:, 0] >= 0]
    assert len(ours) == 10 and len(rows) == 30 and len(np.unique(ours, axis=0)) == 10
    assert (mix([(a, 1), (b, 2)], 30, seed=1) == rows).all() and (mix([(a, 1), (b, 2)], 30, seed=2) != rows).any()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no source"),
        ([(np.zeros((1, 3)), 1), (np.zeros((1, 4)), 1)], "rows of 3 and of 4"),
        ([(np.zeros((1, 3)), 0)], "must be positive"),
    ],
    ids=["none", "lengths", "share"],
)
def test_mix_refuses(sources, message):
    with pytest.raises(ValueError, match=message):
        mix(sources, 2)


def test_read_documents_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("héllo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    np.save(tmp_path / "c.npy", np.array([3, 4], np.uint16))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.md").write_text("# d")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    found = [list(d) for d in read_documents(tmp_path, encode)]
    assert found == [encode("héllo\n"), encode("one"), encode("two"), [3, 4], encode("# d")]
    assert [list(d) for d in read_documents(tmp_path / "a.txt", encode)] == [encode("héllo\n")]


def test_a_table_of_tokens_is_taken_as_it_is(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert rows_from(tmp_path / "t.npy", 3, encode).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="rows of 3 tokens, asked for 4"):
        rows_from(tmp_path / "t.npy", 4, encode)
    np.save(tmp_path / "s.npy", np.arange(1, 4))
    assert rows_from(tmp_path / "s.npy", 2, encode).tolist() == [[0, 1], [2, 3]]


def test_lines_end_at_newlines_alone_and_marks_of_encodings_are_no_text(tmp_path):
    # every character that str.splitlines cuts at; the control characters raw, as sloppy writers leave them
    odd = ["a\u2028b\u2029c\x85d", "a\x0bb\x0cc\x1cd\x1de\x1ef"]
    lines = b"".join(b'{"text": "%s"}\r\n' % text.encode() for text in odd)
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + lines)
    (tmp_path / "b.TXT").write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo\rthree\n")
    (tmp_path / ".hidden.txt").write_bytes(b"\xff")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "copy.jsonl").write_bytes(lines)
    found = list(read_documents(tmp_path, str))
    assert found == [*odd, "one\ntwo\nthree\n"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", ">i4", np.int64, np.uint64])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_from_elsewhere_are_read_by_value(tmp_path, dtype, version):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 200, (6, 4))
    for order in "CF":
        with open(tmp_path / "t.npy", "wb") as f:
            np.lib.format.write_array(f, np.asarray(ids, dtype=dtype, order=order), version=version)
        table = rows_from(tmp_path / "t.npy", None, encode)
        assert [Rows(table)[i]["labels"].tolist() for i in range(6)] == ids.tolist()
        with open(tmp_path / "t.npy", "wb") as f:
            np.lib.format.write_array(f, np.asarray(ids.reshape(-1), dtype=dtype), version=version)
        packed = rows_from(tmp_path / "t.npy", 5, encode)
        assert packed.dtype == np.int32 and packed.tolist() == pack([ids.reshape(-1).tolist()], 5).tolist()


def test_ids_that_need_64_bits_keep_them():
    assert pack([[1, 2**40]], 3).tolist() == [[0, 1, 2**40]]
    for wrong in ([2**64 - 1], [2**70], [1.5]):
        with pytest.raises(ValueError, match=r"none of any vocabulary|Token ids are integers"):
            pack([wrong], 3)


def test_rows_with_nothing_to_predict_are_known():
    table = np.array([[1, 2, 3], [1, ~2, ~3], [~1, ~2, 3], [~1, ~2, ~3]])
    assert rows_with_targets(table).tolist() == [0, 2]
    assert rows_with_targets(table[:2].astype(np.uint16)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.txt", None, FileNotFoundError, "no such file or folder"),
        ("missing.npy", None, FileNotFoundError, "no such file"),
        ("empty.txt", b" \n", ValueError, "is empty"),
        ("latin.txt", b"caf\xe9", ValueError, "not UTF-8 text .byte 3 is 0xe9"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": 1}\n', ValueError, "line 2"),
        ("list.jsonl", b"[1]\n", ValueError, "line 1"),
        ("number.jsonl", b'{"text": 1}\n', ValueError, "is the number 1"),
        ("bad.npy", b"nothing", ValueError, "not a NumPy array"),
        ("", b"", ValueError, "holds no file that ends in"),
        (
            "other.jsonl",
            b'{"text": "a"}\n{"content": "x", "id": 1}\n',
            ValueError,
            "line 2: .*its keys: 'content', 'id'",
        ),
        (
            "byte.jsonl",
            b'{"text": "a"}\n{"text": "b\xe9"}\n',
            ValueError,
            r"line 2: is not UTF-8 text \(byte 25 is 0xe9\)",
        ),
        ("marked.txt", b"\xef\xbb\xbfab\xff", ValueError, "byte 5 is 0xff"),
        ("sixteen.txt", "text".encode("utf-16"), ValueError, "is UTF-16 text. Convert it: iconv"),
        ("half.jsonl", b'{"text": "a\\ud800"}\n', ValueError, "line 1: .*half of a surrogate pair"),
        ("blank.jsonl", b"\n\r\n", ValueError, "is empty"),
        ("null.jsonl", b'{"text": null}\n', ValueError, "is null"),
        ("objects.npy", npy(np.array([{}])), ValueError, "not a NumPy array of numbers"),
        ("cut.npy", npy(np.arange(99))[:-9], ValueError, "not a NumPy array of numbers .it is cut short"),
        ("float.npy", npy(np.zeros(3)), ValueError, "holds float64"),
        ("span.npy", npy(np.zeros(3, "m8[s]")), ValueError, "holds timedelta64"),
        ("zip.npy", b"PK\x03\x04" + bytes(40), ValueError, "not a NumPy array of numbers .File is not a zip file"),
        (
            "minus.npy",
            npy(np.zeros((8, 8), int)).replace(b"(8, 8)", b"(8,-8)"),
            ValueError,
            "not a NumPy array of numbers",
        ),
        ("cube.npy", npy(np.zeros((2, 2, 2), int)), ValueError, r"of shape \(2, 2, 2\)"),
    ],
    ids=lambda x: x if isinstance(x, str) and "." in x and " " not in x else "",
)
def test_unreadable_data_is_named(tmp_path, name, content, error, message):
    if content is not None and name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as e:
        rows_from(tmp_path / name, 8, encode)
    assert str(tmp_path / name) in str(e.value)


def test_a_path_that_is_mistyped_leads_to_the_one_that_was_meant(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "corpus.jsonl").write_text('{"text": "a"}')
    for typo in (tmp_path / "textes" / "corpus.jsonl", tmp_path / "texts" / "corpsu.jsonl"):
        with pytest.raises(FileNotFoundError) as e:
            check_path(typo)
        assert f"Did you mean {str(tmp_path / 'texts' / 'corpus.jsonl')!r}?" in str(e.value)
    with pytest.raises(ValueError, match=r"there are \.bin"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.bin").touch()
        list(read_documents(tmp_path / "other", encode))


def test_an_archive_of_arrays_is_not_taken_for_one(tmp_path):
    with open(tmp_path / "z.npy", "wb") as f:
        np.savez(f, a=np.arange(3))
    with pytest.raises(ValueError, match="an archive of several"):
        rows_from(tmp_path / "z.npy", 2, encode)


def test_tokens_that_are_no_integers_are_refused(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros(3))
    with pytest.raises(ValueError, match="float64"):
        rows_from(tmp_path / "f.npy", 2, encode)


HEADERS = {
    "unclosed": "(" * 9000,
    "truth for a size": "{'descr': '<i4', 'fortran_order': False, 'shape': (True,)}",
    "a digit too many": "{'descr': '<i4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}",
    "larger than memory": "{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904, 4)}",
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_whatever_a_numpy_file_s_header_says_it_is_one_error(tmp_path, header):
    file = tmp_path / "a.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64))
    with pytest.raises(ValueError, match=r"a\.npy: is not a NumPy array of numbers"):
        list(read_documents(file, encode))
    file.write_bytes(b"PK\x03\x04" + bytes(50))
    with pytest.raises(ValueError, match=r"a\.npy: is not a NumPy array of numbers"):
        list(read_documents(file, encode))


def test_what_is_said_of_a_file_is_printable_and_short(tmp_path):
    file = tmp_path / "a\x1b]0;title\x07.jsonl"
    file.write_text(json.dumps({"k" * 900_000: 1}))
    with pytest.raises(ValueError, match="its keys") as caught:
        list(read_documents(file, encode))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000
