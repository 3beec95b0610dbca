"""Rows of stored tokens: how documents are laid out, what a row says, and in which order rows are read."""

import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import hybridzoo as zoo
from hybridzoo.zoo.corpus import packing
from hybridzoo.zoo.corpus.lanes import Lanes
from hybridzoo.zoo.corpus.packing import Layout, best_fit, layout_of
from hybridzoo.zoo.corpus.piece import Piece
from hybridzoo.zoo.corpus.rows import StoredRows
from hybridzoo.zoo.corpus.store import TokenStore, TokenWriter
from hybridzoo.zoo.tokenizer import ByteTokenizer
from hybridzoo.zoo.train.data import Rows, pack
from hybridzoo.zoo.train.examples import examples_from, lanes_from
from hybridzoo.zoo.train.options import TrainOptions
from hybridzoo.zoo.train.order import InOrder, Shuffled
from hybridzoo.zoo.train.run import train

QUIET = {"report_to": "none", "device": "cpu"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """New folders, for examples of which there are many in a test."""
    root = tmp_path_factory.mktemp("stores")
    numbers = itertools.count()
    return lambda: root / str(next(numbers))


def stored(folder, documents):
    folder.mkdir()
    ids = [np.array(d, dtype=np.int64) for d in documents]
    with TokenWriter(folder, 0, 1000, 256) as writer:
        writer.add([Piece("there", part, True, 0) for part in ids], ids)
        writer.close()
    return TokenStore(folder)


def laid(store, length, how):
    layout = layout_of(store, length, how)
    return layout, StoredRows(store, layout, how == "documents")


DOCUMENTS = st.lists(st.lists(st.integers(1, 250), min_size=1, max_size=25), min_size=1, max_size=30)


def naive_best_fit(sizes, room):
    free = []
    for size in sorted(sizes, reverse=True):
        fitting = [(left, box) for box, left in enumerate(free) if left >= size]
        box = min(fitting)[1] if fitting else len(free)
        free += [] if fitting else [room]
        free[box] -= size
    return len(free)


@given(
    st.integers(1, 30).flatmap(
        lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), min_size=1, max_size=60))
    )
)
@settings(max_examples=300, deadline=None)
def test_boxes_are_those_of_the_plain_loop(case):
    room, sizes = case
    boxes = best_fit(np.array(sizes), room)
    filled = np.bincount(boxes, weights=sizes)
    assert filled.max() <= room and filled.min() > 0 and len(filled) == naive_best_fit(sizes, room)


@given(DOCUMENTS, st.integers(2, 12), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_packed_rows_hold_every_token_once_and_cut_nothing_that_fits(places, documents, length, window):
    before, packing._WINDOW = packing._WINDOW, window
    try:
        store = stored(places(), documents)
        if all(len(d) + 1 <= 1 for d in documents):
            return
        layout, rows = laid(store, length, "documents")
    finally:
        packing._WINDOW = before
    # the pieces that a document has to be cut into, known without laying anything out
    whole = [[0, *d] for d in documents]
    wanted = [tuple(d[i : i + length]) for d in whole for i in range(0, len(d), length)]
    found = []
    for row in map(rows.__getitem__, range(len(rows))):
        ids, labels, documents_of = (row[k].tolist() for k in ("input_ids", "labels", "documents"))
        assert len(ids) == length and sorted(set(documents_of) - {-1}) == list(range(max(documents_of) + 1))
        assert documents_of == sorted(documents_of, key=lambda d: d if d >= 0 else 99), "in order, the rest at the end"
        assert max(documents_of) + 1 + (-1 in documents_of) <= layout.most
        for number in range(max(documents_of) + 1):
            at = [i for i, d in enumerate(documents_of) if d == number]
            found.append(tuple(ids[i] for i in at))
            assert labels[at[0]] == -100 and [labels[i] for i in at[1:]] == [ids[i] for i in at[1:]]
        assert all(ids[i] == 0 and labels[i] == -100 for i, d in enumerate(documents_of) if d < 0)
    assert sorted(found) == sorted(wanted)
    chosen = [n for n in range(len(rows)) if (rows[n]["labels"] != -100).any()]
    assert list(layout.chosen) == chosen


@given(DOCUMENTS, st.integers(2, 12), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_a_stream_is_that_of_pack(places, documents, length, window):
    before, packing._WINDOW = packing._WINDOW, window
    try:
        _, rows = laid(stored(places(), documents), length, "stream")
    finally:
        packing._WINDOW = before
    table = Rows(pack(documents, length))
    assert len(rows) == len(table)
    for ours, theirs in zip(
        map(rows.__getitem__, range(len(rows))), map(table.__getitem__, range(len(table))), strict=True
    ):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_padded_rows_hold_a_document_each(places):
    store = stored(places(), [[1, 2], [3, 4, 5, 6, 7], [8]])
    _, rows = laid(store, 4, "padded")
    assert [r["input_ids"].tolist() for r in map(rows.__getitem__, range(4))] == [
        [0, 1, 2, 0], [0, 3, 4, 5], [6, 7, 0, 0], [0, 8, 0, 0],
    ]  # fmt: skip
    assert rows[0]["labels"].tolist() == [0, 1, 2, -100] and "documents" not in rows[0]


def test_tokens_that_are_only_read_are_no_targets(places):
    store = stored(places(), [[5, ~6, 7], [~8, ~9], [1, 2]])
    layout, rows = laid(store, 4, "padded")
    assert list(layout.chosen) == [0, 2]
    assert rows[0]["input_ids"].tolist() == [0, 5, 6, 7] and rows[0]["labels"].tolist() == [0, 5, -100, 7]
    _, rows = laid(store, 4, "documents")
    assert sorted(r["labels"].tolist() for r in map(rows.__getitem__, range(len(rows))))[0] == [-100] * 4


def test_a_layout_is_kept_and_made_again_when_it_is_damaged(places, monkeypatch):
    store = stored(places(), [[1] * n for n in range(1, 40)])
    layout = layout_of(store, 16, "documents")
    monkeypatch.setattr(packing, "_write", None)
    assert layout_of(store, 16, "documents").rows.tolist() == layout.rows.tolist()
    monkeypatch.undo()
    pieces, file = layout.pieces.tolist(), store.folder / "documents-16" / "pieces.bin"
    file.write_bytes(file.read_bytes()[:-16])
    again = layout_of(store, 16, "documents")
    assert again.pieces.tolist() == pieces and isinstance(again, Layout)


def test_documents_of_real_lengths_leave_next_to_nothing_empty(places):
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(6, 1.2, 5000).astype(int) + 1, 10_000)
    store = stored(places(), [np.ones(n, int) for n in sizes])
    shares = {
        how: len(store.tokens) / (len(layout_of(store, 512, how)) * 512) for how in ("documents", "stream", "padded")
    }
    assert shares["documents"] > 0.995 > shares["stream"] > shares["padded"] and shares["padded"] < 0.8


# from a path to a training


def options(**given):
    return TrainOptions(**{"length": 64, "report_to": "none"} | given)


@pytest.fixture
def texts(tmp_path):
    from pydoc_data.topics import topics

    documents = [text[:400] for text in list(topics.values())[:60]] + [next(iter(topics.values()))[:1500]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return tmp_path / "texts.jsonl", documents


@pytest.fixture
def small():
    return zoo.build("jamba-tiny", ["d_model=32", "layers=mamba moe attention mlp"])


def test_examples_say_what_they_are(texts, small):
    path, documents = texts
    examples = examples_from(path, small, options())
    assert examples.tokens == sum(len(d.encode()) + 1 for d in documents) and examples.length == 64
    item = examples[3]
    assert set(item) == {"input_ids", "labels", "documents", "row"} and item["row"].shape == ()
    again = examples.rows[int(item["row"])]
    assert all(torch.equal(again[k], item[k]) for k in again) and item["documents"].dtype == torch.int64
    most = max(len(row["documents"].unique()) for row in map(examples.rows.__getitem__, range(len(examples.rows))))
    assert examples.documents == most
    assert "61 documents" in examples.about[0] and "padding" in examples.about[1]
    others = [examples_from(path, small, options(packing=how)) for how in ("stream", "padded")]
    assert {e.documents for e in others} == {None} and {len(e.about) for e in others} == {2}
    assert examples_from(path, small, options(length=32)).digest != examples.digest
    assert examples_from(path, small, options()).digest == examples.digest


def test_workers_are_sent_no_tokens(texts, small):
    examples = examples_from(texts[0], small, options())
    sent = pickle.dumps(examples)
    again = pickle.loads(sent)
    assert len(sent) < 4000 < examples.tokens
    assert all(torch.equal(again[7][k], examples[7][k]) for k in examples[7])


def test_a_table_is_as_it_was(tmp_path, small):
    table = np.arange(256, dtype=np.uint8).reshape(4, 64)
    np.save(tmp_path / "t.npy", table)
    for data in (table, tmp_path / "t.npy"):
        examples = examples_from(data, small, options(length=None))
        assert examples.documents is None and set(examples[1]) == {"input_ids", "labels", "row"} and not examples.about
        assert examples[2]["labels"].tolist() == table[2].tolist()
    with pytest.raises(ValueError, match="rows of 64 tokens, asked for 32"):
        examples_from(tmp_path / "t.npy", small, options(length=32))
    np.save(tmp_path / "flat.npy", np.array([1, 2, 300, 4]))
    with pytest.raises(ValueError, match=r"flat\.npy: holds id 300, .*vocabulary of 256"):
        examples_from(tmp_path / "flat.npy", small, options())
    wide = zoo.build("mamba-tiny", ["d_model=16", "layers=mamba", "vocab_size=512"])
    assert examples_from(tmp_path / "flat.npy", wide, options()).tokens == 5
    with pytest.raises(
        ValueError,
        match=r"token id 300, in document 1 of .*flat\.npy, is outside .* of 256. Set vocab_size, to at least 301",
    ):
        examples_from(tmp_path / "flat.npy", small, options())


def test_the_loss_of_packed_rows_is_that_of_the_documents_alone(texts, small):
    path, documents = texts
    small = small.double().eval().requires_grad_(False)
    examples = examples_from(path, small, options(length=512))
    total = count = 0.0
    for i in range(len(examples)):
        item = examples[i]
        targets = int((item["labels"] != -100).sum())
        seq_idx = item["documents"][None]
        # balance is of a batch, and not of a document
        out = small(item["input_ids"][None], labels=item["labels"][None], seq_idx=seq_idx)
        total, count = total + float(out.loss - out.aux_loss) * targets, count + targets
    alone = tokens = 0.0
    for text in documents:
        ids = torch.tensor([0, *ByteTokenizer().encode(text)])
        for piece in ids.split(512):
            if len(piece) > 1:
                out = small(piece[None], labels=piece[None])
                alone, tokens = alone + float(out.loss - out.aux_loss) * (len(piece) - 1), tokens + len(piece) - 1
    assert count == tokens and total / count == pytest.approx(alone / tokens, abs=1e-9)


def test_the_order_is_that_of_accelerate_without_a_list():
    from accelerate.data_loader import SeedableRandomSampler

    data = type("Data", (), {"epoch": 0, "__len__": lambda self: 10_001})()
    ours, theirs = Shuffled(data, 7), SeedableRandomSampler(range(10_001), data_seed=7)
    for epoch in range(3):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_pass_skips_what_was_read_in_every_process(processes):
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    class Numbers(torch.utils.data.Dataset):
        epoch = 0

        def __len__(self):
            return 37

        def __getitem__(self, i):
            return i

        def set_epoch(self, epoch):
            self.epoch = epoch

    for index in range(processes):

        def loader(index=index):
            data = Numbers()
            made = DataLoader(data, batch_size=4, sampler=Shuffled(data, 5))
            return prepare_data_loader(
                made, num_processes=processes, process_index=index, put_on_device=False, use_seedable_sampler=True
            )

        whole = loader()
        whole.set_epoch(2)
        batches = [b.tolist() for b in whole]
        rest = skip_first_batches(loader(), 3)
        rest.set_epoch(2)
        assert [b.tolist() for b in rest] == batches[3:] and len(batches) > 4


def test_workers_change_nothing_and_a_run_is_continued_exactly(texts, tmp_path):
    cfg = zoo.config("jamba-tiny", ["d_model=16", "layers=mamba attention"])
    given = {"steps": 14, "batch_size": 8, "length": 128, "lr": 1e-3, "save_every": 5, "seed": 3} | QUIET
    runs = [train(cfg, texts[0], tmp_path / str(workers), workers=workers, **given) for workers in (0, 2)]
    weights = [b"".join(p.detach().numpy().tobytes() for p in run.model.parameters()) for run in runs]
    assert [e["loss"] for e in runs[0].history] == [e["loss"] for e in runs[1].history] and weights[0] == weights[1]

    def stop(step, loss):
        if step == 9:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(cfg, texts[0], tmp_path / "cut", on_step=stop, **given)
    # in the second pass: the first has 23 rows, 3 batches
    resumed = train(cfg, texts[0], tmp_path / "cut", workers=1, **given)
    assert resumed.resumed_from == 5
    assert b"".join(p.detach().numpy().tobytes() for p in resumed.model.parameters()) == weights[0]
    assert [e["loss"] for e in resumed.history] == [e["loss"] for e in runs[0].history]


def test_a_run_on_a_path_is_another_with_another_packing(texts, tmp_path):
    cfg = zoo.config("mamba-tiny", ["d_model=16", "layers=mamba"])
    given = {"steps": 2, "batch_size": 2, "length": 64} | QUIET
    train(cfg, texts[0], tmp_path / "run", **given)
    with pytest.raises(ValueError, match=r"another packing \(documents there, stream now\)"):
        train(cfg, texts[0], tmp_path / "run", packing="stream", **given)
    assert train(cfg, texts[0], tmp_path / "run", **given).resumed_from == 2


# streams side by side


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_lanes_continue_and_read_every_token_once(places, sizes, length, lanes, seed):
    numbers = itertools.count(1)
    store = stored(places(), [[next(numbers) for _ in range(size)] for size in sizes])
    try:
        data = Lanes(store, length, lanes, seed)
    except ValueError as e:
        assert "too few for" in str(e)
        return
    assert len(data) % lanes == 0 and len(data) < len(data.rows) + lanes
    for epoch in range(2):
        first = epoch * len(data)
        items = [data[first + i] for i in range(len(data))]
        seen = {}
        for lane in range(lanes):
            before = None
            for item in items[lane::lanes]:
                ids, labels, real = item["input_ids"], item["labels"], item["documents"] == 0
                assert len(ids) == length and len(labels) == length + 1 and bool((real.long().diff() <= 0).all())
                seen[int(item["row"])] = item
                if before is not None and not item["starts"]:
                    # it goes on: the target behind the row before is what is read first
                    assert before["labels"][-1] == ids[0] == labels[0] != -100
                elif before is not None:
                    assert int(before["row"]) + 1 in data.rows.ends, "it was the last of its document"
                before = item
            assert items[lane]["starts"]
        assert len(seen) == len(data.rows), "every row is read"
        # each token is predicted once, but for the separator that a document begins with
        targets = [t for item in seen.values() for t in item["labels"][1:].tolist() if t != -100]
        assert sorted(targets) == sorted(store.tokens[store.tokens != 0].tolist())
        reads = [t for item in seen.values() for t in item["input_ids"][item["documents"] == 0].tolist() if t]
        assert len(reads) == len(set(reads))


def test_lanes_are_dealt_to_processes_in_turn(texts, small):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    data = lanes_from(texts[0], small, options(length=32), lanes=6, seed=1)
    assert "6 streams" in data.about[-1] and data.documents is None
    order = InOrder(data)
    order.set_epoch(1)
    for process in range(2):
        shard = BatchSamplerShard(BatchSampler(order, 3, drop_last=False), num_processes=2, process_index=process)
        batches = [[data[i] for i in batch] for batch in shard]
        assert len(batches) == data.steps and {len(b) for b in batches} == {3}
        for before, after in itertools.pairwise(batches):
            for a, b in zip(before, after, strict=True):
                assert bool(b["starts"]) or a["labels"][-1] == b["input_ids"][0]
    with pytest.raises(ValueError, match="do not continue each other"):
        lanes_from(np.ones((2, 3), int), small, options(), 1)
