"""States by prefix: the logits of a tree that has kept nothing, to the bit, within a budget."""

import os
import threading
import time

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.models.prefix_tree import PrefixTree

exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
MIXERS = {
    "mamba": {"type": "mamba", "d_state": 4}, "mamba2": {"type": "mamba2", "d_state": 8, "headdim": 8},
    "attention": {"type": "attention", "nheads": 2}, "window": {"type": "attention", "nheads": 2, "window": 5},
}  # fmt: skip


@pytest.fixture(scope="module", params=["mamba mamba2", "attention window", "mamba attention mamba2 + window"])
def model(request):
    torch.manual_seed(0)
    used = {name: MIXERS[name] for name in request.param.replace("+", " ").split()}
    return zoo.build({"vocab_size": 12, "d_model": 16, "layers": request.param, "mixers": used}).eval()


def leaves(state):
    found = []
    state.map(lambda t: found.append(t) or t)
    return found


@torch.no_grad()
@pytest.mark.parametrize("times", [60, pytest.param(10_000, marks=exhaustive)])
def test_texts_are_read_as_by_a_tree_that_has_kept_nothing(model, times):
    rng = torch.Generator().manual_seed(1)
    tree, texts, fresh = PrefixTree(model, max_bytes=40_000, chunk=4), [[1, 2, 3]], {}

    def draw(n):
        return int(torch.randint(0, n, (1,), generator=rng))

    reused = 0
    for _ in range(times):
        text = texts[draw(len(texts))]
        if draw(3) == 0:
            text = text[: 1 + draw(len(text))]  # rolled back, or a fork
        text = (text + [draw(3) for _ in range(draw(7))])[:40]
        texts = [*texts[-12:], text]
        found, key = tree.read(text), tuple(text)
        if key not in fresh:
            fresh[key] = PrefixTree(model, chunk=4).read(text)
        want = fresh[key]
        assert torch.equal(found.logits, want.logits)
        assert all(torch.equal(a, b) for a, b in zip(leaves(found.state), leaves(want.state), strict=True))
        assert tree.nbytes <= 40_000 and tree.nbytes == sum(node.nbytes for node in tree._nodes)
        # the caller's own: to step on it changes nothing
        model.step(torch.tensor([1]), found.state)
        reused += found.reused
    assert reused > times and len(fresh) > times // 4


@torch.no_grad()
def test_logits_are_those_of_the_model_and_the_state_goes_on(model):
    text = torch.randint(0, 12, (23,), generator=torch.Generator().manual_seed(2))
    tree = PrefixTree(model, chunk=4)
    first = tree.read(text[:22])
    again = tree.read(text)
    assert (first.reused, again.reused, len(tree)) == (0, 20, 5)
    whole = model(text[None], return_state=True)
    torch.testing.assert_close(again.logits, whole.logits[:, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.step(text[22:], first.state), whole.logits[:, -1], atol=1e-5, rtol=1e-4)
    ways = again.state.reorder(torch.tensor([0, 0]))
    more = model.generate(torch.tensor([[3], [5]]), 6, state=ways)
    for row, token in enumerate((3, 5)):
        alone = model.generate(torch.cat([text, torch.tensor([token])])[None], 6)
        assert more[row, 1:].tolist() == alone[0, 24:].tolist()


@torch.no_grad()
def test_the_least_recently_used_goes_first_and_ends_before_beginnings(model):
    texts = [[i] * 12 for i in range(4)]
    size = PrefixTree(model, chunk=4)
    size.read(texts[0])
    tree = PrefixTree(model, max_bytes=2 * size.nbytes, chunk=4)
    for text in (texts[0], texts[1], texts[0], texts[2]):
        tree.read(text)
    assert tree.read(texts[0]).reused == 12 and tree.read(texts[1]).reused < 12
    assert PrefixTree(model, max_bytes=0, chunk=4).read(texts[0]).reused == 0
    tree.clear()
    assert (len(tree), tree.nbytes, tree.read(texts[0]).reused) == (0, 0, 0)


def test_threads_share_a_tree(model, monkeypatch):
    texts = [[i % 3, 1, 2, 3] * 3 + [i] for i in range(6)]
    fresh = [PrefixTree(model, chunk=4).read(text).logits for text in texts]
    tree = PrefixTree(model, max_bytes=2 * PrefixTree(model, chunk=4).read(texts[0]).state.nbytes, chunk=4)
    forward, wrong = tree._forward, []

    def slow(*given):
        time.sleep(0.002)  # others come in between
        return forward(*given)

    monkeypatch.setattr(tree, "_forward", slow)

    def work(first):
        try:
            for i in range(20):
                at = (first + 5 * i) % len(texts)
                wrong.extend([at] if not torch.equal(tree.read(texts[at]).logits, fresh[at]) else [])
        except Exception as e:  # which a thread would keep to itself
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert tree.nbytes == sum(node.nbytes for node in tree._nodes) <= tree.max_bytes


def test_attention_keeps_each_token_once():
    torch.manual_seed(0)
    cfg = {
        "vocab_size": 12,
        "d_model": 16,
        "layers": "attention attention",
        "mixers": {"attention": MIXERS["attention"]},
    }
    model = zoo.build(cfg).eval()
    sizes = []
    for length in (40, 80, 160):
        tree = PrefixTree(model, chunk=4)
        tree.read([i % 12 for i in range(length)])
        sizes.append(tree.nbytes)
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 4 * sizes[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: PrefixTree(m, max_bytes=-1), "max_bytes=-1"), (lambda m: PrefixTree(m, chunk=0), "chunk=0"),
        (lambda m: PrefixTree(m).read([1.5]), "expected integers, got torch.float32"), (lambda m: PrefixTree(m).read([]), r"got \(0,\)"), (lambda m: PrefixTree(m).read(torch.ones(1, 3)), r"got \(1, 3\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make(zoo.build("mamba-tiny"))
