"""Descriptions of rows: offsets in whatever holds integers, padding that is cleared, documents that the host knows."""

import array
import dataclasses

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.kernels import Seq

OFFSETS = [0, 4, 4, 9]


@pytest.mark.parametrize(
    "given",
    [OFFSETS, tuple(OFFSETS), np.array(OFFSETS), np.array(OFFSETS, np.int32), torch.tensor(OFFSETS, dtype=torch.int32)],
    ids=lambda x: type(x).__name__,
)
def test_offsets_come_in_many_forms(given):
    model = zoo.build("jamba-tiny").eval()
    ids = torch.randint(1, 256, (1, 9))
    want = model(ids, cu_seqlens=torch.tensor(OFFSETS)).logits
    assert torch.equal(model(ids, cu_seqlens=given).logits, want)
    assert Seq.from_cu_seqlens(given, 1, 9).documents() == [(0, 0, 4), (0, 4, 9)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.0, 9.0], r"dtype torch.float32, expected integers"),
        (torch.tensor([False, True]), r"dtype torch.bool, expected integers"),
        (np.array([0, 9], complex), r"dtype torch.complex128, expected integers"),
        ("0,9", r"str is not \(n \+ 1,\) integers"),
        ([[0], [4, 9]], r"list is not \(n \+ 1,\) integers"),
        ([], r"expected shape \(n \+ 1,\) with n >= 1, got \(0,\)"),
        ([[0, 9]], r"expected shape \(n \+ 1,\) with n >= 1, got \(1, 2\)"),
        ([0, 6, 4, 9], r"runs from 0 to 9, falls from 6 to 4, the row has 9 tokens"),
        (np.array([1, 9]), r"runs from 1 to 9, the row has 9 tokens"),
        ([0, 8], r"runs from 0 to 8, the row has 9 tokens"),
    ],
)
def test_offsets_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=f"cu_seqlens: .*{message}"):
        Seq.from_cu_seqlens(given, 1, 9)


def test_an_array_of_bytes_is_one_of_integers():
    assert Seq.from_cu_seqlens(array.array("i", OFFSETS), 1, 9).documents() == [(0, 0, 4), (0, 4, 9)]


def test_padding_is_cleared_once():
    seq = Seq.from_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    x = torch.full((2, 3, 2), float("nan"))
    x[:, 1:] = x[1] = 1.0
    aligned = seq.align(x)
    assert torch.equal(aligned, torch.ones(2, 3, 2).index_put((torch.tensor(0), torch.tensor(2)), torch.zeros(2)))
    cleared = seq.cleared
    assert cleared.clear(x) is x and cleared.cleared is cleared
    assert torch.equal(seq.align(torch.tensor([[7, 8, 9]] * 2)), torch.tensor([[8, 9, 7], [7, 8, 9]]))
    assert Seq.from_cu_seqlens([0, 3], 1, 3).cleared.clear(x[:1]).isnan().any()


def test_maps_have_one_size_and_no_padding():
    seq = Seq.from_grid((2, 3), 4, 6)
    assert seq.grid == (2, 3) and seq.lengths.tolist() == [6] * 4 and bool(seq.valid.all()) and not seq.resets.any()
    x = torch.randn(4, 6, 2)
    assert seq.align(x) is x and seq.restore(x) is x and seq.cleared.grid == (2, 3) and seq.marks() == (None, None)
    for wrong in ((2, 4), (0, 6), (-2, -3)):
        h, w = wrong
        with pytest.raises(ValueError, match=f"grid: {h} x {w} is a map of {h * w} tokens, the rows have 6"):
            Seq.from_grid(wrong, 4, 6)
    padded, packed = Seq.from_mask(torch.tensor([[0, 1, 1, 1, 1, 1]])), Seq.from_cu_seqlens([0, 2, 6], 1, 6)
    for rows, name in ((padded, "padded"), (packed, "packed")):
        with pytest.raises(ValueError, match=f"grid: rows that are {name} are no maps of 2 x 3"):
            dataclasses.replace(rows, grid=(2, 3))


def test_documents_side_by_side():
    seq = Seq.from_documents(torch.tensor([[0] * 5 + [1] * 2 + [2] * 4 + [-1], [0] * 12]))
    assert seq.documents() == [(0, 0, 5), (0, 5, 7), (0, 7, 11), (1, 0, 12)]
    batches, place = seq.side_by_side
    assert batches[0] == (1, 0, 12) and batches[2] == (0, 5, 7)
    assert batches[1].tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 10]]
    tokens = torch.cat([torch.arange(12, 24), batches[1].flatten(), torch.arange(5, 7), torch.tensor([-1])])
    want = torch.arange(24).view(2, 12)
    want[0, 11] = -1
    assert torch.equal(tokens[place], want)


def test_documents_that_the_host_described_are_known_wherever_the_tokens_are():
    doc = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 2, 2, 2]])
    seq = Seq.from_documents(doc, "meta")
    assert seq.doc.is_meta and seq.resets.is_meta
    assert (
        seq.documents()
        == Seq.from_documents(doc).documents()
        == [(0, 0, 2), (0, 2, 5), (1, 0, 1), (1, 1, 3), (1, 3, 6)]
    )
    assert seq.side_by_side[1].shape == (2, 6)
    assert Seq.from_documents(seq.doc, "meta").documents() is None


DOC = [[0, 0, 0, 1, 1, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1]]
STARTS = [0, 3, 5, 6, 8, 9, 16]


def test_offsets_of_documents():
    doc = torch.tensor(DOC)
    seq = Seq.from_documents(doc)
    assert seq.offsets.tolist() == STARTS and seq.offsets.dtype == torch.int32 and seq.longest == 7
    bounded = Seq.from_documents(doc, most=5)
    assert bounded.offsets.tolist() == STARTS + [16] * 4 and bounded.longest == 7
    assert Seq.from_cu_seqlens(OFFSETS, 1, 9).offsets.tolist() == OFFSETS
    assert Seq.from_cu_seqlens(OFFSETS, 1, 9).longest == 5
    sent = Seq.from_documents(doc, "meta", most=5)
    assert sent.offsets.shape == (11,) and sent.offsets.is_meta and sent.longest == 7
    assert Seq.from_documents(sent.doc).offsets is None and Seq.from_documents(sent.doc, most=3).offsets.shape == (7,)


def test_rows_expanded_from_one_are_read_as_their_copies():
    row = torch.tensor([[0, 0, 1, 1, 1, -1]])
    for most in (None, 4):
        got, want = (Seq.from_documents(doc, most=most) for doc in (row.expand(3, 6), row.repeat(3, 1)))
        assert torch.equal(got.offsets, want.offsets) and torch.equal(got.resets, want.resets)
        assert torch.equal(got.pos, want.pos)


def test_offsets_found_without_asking():
    doc = torch.tensor(DOC)
    found = torch.compile(lambda doc: Seq.from_documents(doc, most=4).offsets, fullgraph=True, backend="aot_eager")(doc)
    assert found.dtype == torch.int32 and found.tolist() == STARTS + [16] * 2
    assert torch.compile(lambda d: Seq.from_documents(d).offsets is None, fullgraph=True, backend="eager")(doc)


def test_more_documents_than_said_are_refused():
    with pytest.raises(
        ValueError, match=r"most: a row holds 4 documents, its padding counted as one, and most is 3. Pass 4"
    ):
        Seq.from_documents(torch.tensor(DOC), most=3)
    with pytest.raises(ValueError, match="most: 0 documents in a row"):
        Seq.from_documents(torch.tensor(DOC), most=0)


def test_a_model_takes_a_description():
    model = zoo.build("jamba-tiny").eval()
    ids, doc = torch.randint(1, 256, (2, 8)), torch.tensor(DOC)
    want = model(ids, labels=ids, seq_idx=doc)
    for most in (None, 4, 7):
        got = model(ids, labels=ids, seq=Seq.from_documents(doc, most=most))
        assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    assert torch.equal(
        model(ids, seq=Seq.from_mask(mask), state=model.init_state(2)).logits,
        model(ids, attention_mask=mask, state=model.init_state(2)).logits,
    )


def test_the_adapter_hands_a_description_on():
    pytest.importorskip("transformers")
    from hybridzoo.zoo.hf import HybridZooForCausalLM

    model = zoo.build("jamba-tiny").eval()
    ids, seq = torch.randint(1, 256, (2, 8)), Seq.from_documents(torch.tensor(DOC), most=4)
    adapter = HybridZooForCausalLM.wrap(model).eval()
    got, want = adapter(ids, labels=ids, seq=seq), model(ids, labels=ids, seq=seq)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)


def test_a_description_of_other_rows_is_refused():
    model, ids, seq = (
        zoo.build("mamba-tiny"),
        torch.zeros(2, 9, dtype=torch.long),
        Seq.from_documents(torch.tensor(DOC)),
    )
    with pytest.raises(ValueError, match=r"seq: describes rows of shape \(2, 8\), the tokens have \(2, 9\)"):
        model(ids, seq=seq)
    with pytest.raises(ValueError, match="seq: is on meta, the tokens are on cpu"):
        model(ids[:, :8], seq=Seq.from_documents(torch.tensor(DOC), "meta"))
    with pytest.raises(ValueError, match="seq_idx, seq: say the same in two ways"):
        model(ids[:, :8], seq=seq, seq_idx=torch.tensor(DOC))
    with pytest.raises(ValueError, match="state, seq: a packed row starts every document afresh"):
        model(ids[:, :8], seq=seq, state=model.init_state(2))
