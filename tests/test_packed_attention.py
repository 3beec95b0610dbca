"""Attention by the offsets of documents: torch's varlen_attn and flash-attn, whose kernels are stood in for by a plain loop on the CPU."""

import dataclasses
import importlib.metadata
import math
import sys
import types

import pytest
import torch

from hybridzoo.kernels import Seq, dispatch
from hybridzoo.kernels.dispatch import choose, explain
from hybridzoo.layers import Attention

GPU = {"device": "cuda", "dtype": torch.bfloat16}
DOC = torch.tensor([[0] * 9 + [1] * 4 + [2] * 7 + [-1] * 3, [0] * 1 + [1] * 22])
OPTIONS = [
    {},
    {"window": 5},
    {"nheads_kv": 1, "softmax_scale": 0.3},
    {"window": 30, "d_conv": 3, "qk_norm": True},
    {"causal": False},
    {"causal": False, "window": 4, "rope": None},
    {"causal": False, "window": 1},
]


def documents(q, k, v, offsets, scale, span):
    """Of every document in rows (t, h, p): where it is, its operands with a key for every query head, and its weights (h, q, k)."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        wide = [x[a:b].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (q, k, v)]
        near = torch.arange(b - a)[:, None] - torch.arange(b - a)
        hidden = (near < -span[1] if span[1] >= 0 else False) | (near > span[0] if span[0] >= 0 else near > b - a)
        scores = torch.einsum("qhp,khp->hqk", *wide[:2]) * scale
        yield slice(a, b), *wide, scores.masked_fill(hidden, -math.inf).softmax(-1), scale


def loop(q, k, v, offsets, scale, span):
    out = torch.zeros_like(q)
    for rows, _, _, v_, weights, _ in documents(q, k, v, offsets, scale, span):
        out[rows] = torch.einsum("hqk,khp->qhp", weights, v_)
    return out


def gradients(g, q, k, v, offsets, scale, span):
    """By the formulas: what stands in for a kernel runs below autograd."""
    gq, gk, gv = (torch.zeros_like(x) for x in (q, k, v))
    for rows, q_, k_, v_, weights, factor in documents(q, k, v, offsets, scale, span):
        to_weights = torch.einsum("qhp,khp->hqk", g[rows], v_)
        to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True)) * factor
        gq[rows] = torch.einsum("hqk,khp->qhp", to_scores, k_)
        for into, wide in (
            (gk, torch.einsum("hqk,qhp->khp", to_scores, q_)),
            (gv, torch.einsum("hqk,qhp->khp", weights, g[rows])),
        ):
            into[rows] = wide.unflatten(1, (k.shape[1], -1)).sum(2)
    return gq, gk, gv


def forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options):
    span = options["window_size_left"], options["window_size_right"]
    assert span[1] in (0, span[0]) and is_causal == (span == (-1, 0)) and cum_seq_q.dtype == torch.int32
    assert max_q >= cum_seq_q.diff().max() and cum_seq_q[-1] == query.shape[0] and torch.equal(cum_seq_q, cum_seq_k)
    out, none = loop(query, key, value, cum_seq_q, options.get("scale"), span), torch.zeros(2, dtype=torch.uint64)
    return out, query.new_zeros(query.shape[1], query.shape[0]), none, none, none


def backward(grad_out, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *_, **options):
    span = options["window_size_left"], options["window_size_right"]
    return gradients(grad_out, q, k, v, cum_seq_q, options.get("scale"), span)


@pytest.fixture
def varlen(monkeypatch):
    """torch's varlen_attn, on the CPU and in float32 too: its own operators above kernels that it lacks there."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    table = dispatch.TABLES["attention"]

    def refuse(facts):
        return table_refuse(facts | GPU)

    table_refuse = table["varlen"].refuse
    monkeypatch.setattr("hybridzoo.layers.attend._has_flash", lambda: True)
    monkeypatch.setitem(table, "varlen", dataclasses.replace(table["varlen"], refuse=refuse))
    yield
    library._destroy()


def both(layer, x, seq, monkeypatch, name):
    """The layer's output and gradients, by ``name`` and by torch's scaled dot product."""
    results = []
    for wish in (name, "sdpa"):
        monkeypatch.setenv(dispatch.ENV, wish)
        inputs = [x.detach().requires_grad_(), *layer.parameters()]
        y = layer(inputs[0], seq=seq)
        results.append((y, torch.autograd.grad(y.square().sum(), inputs)))
    monkeypatch.delenv(dispatch.ENV)
    (y, grads), (want, wanted) = results
    torch.testing.assert_close(y[seq.valid], want[seq.valid], rtol=1e-5, atol=1e-5)
    for got, ref in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", [None, 4, 9])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen_equals_documents_one_by_one(options, most, varlen, monkeypatch):
    layer, x = Attention(32, 4, **{"nheads_kv": 2, **options}), torch.randn(2, 23, 32)
    both(layer, x, Seq.from_documents(DOC, most=most), monkeypatch, "varlen")


def test_varlen_takes_windows_of_rows_that_are_not_packed(varlen, monkeypatch):
    layer, x = Attention(32, 4, 2, window=5), torch.randn(2, 23, 32)
    seq = Seq.from_mask(torch.tensor([[1] * 20 + [0] * 3, [1] * 23]))
    both(layer, x, seq, monkeypatch, "varlen")
    assert choose("attention", window=True, **GPU).name == "varlen" != choose("attention", **GPU).name


@pytest.mark.parametrize("window", [None, 5])
def test_varlen_takes_rows_and_their_padding_where_nothing_hides_it(window, varlen, monkeypatch):
    layer, x = Attention(32, 4, 2, causal=False, window=window), torch.randn(3, 23, 32)
    seq = Seq.from_mask(torch.tensor([[0] * 3 + [1] * 20, [1] * 23, [1] + [0] * 22]))
    assert choose("attention", **layer.facts(torch.empty(3, 23, 4, 8), seq) | GPU).name == "varlen"
    both(layer, x, seq, monkeypatch, "varlen")
    compiled = torch.compile(lambda x, mask: layer(x, seq=Seq.from_mask(mask)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, seq.valid)[seq.valid], layer(x, seq=seq)[seq.valid])


def test_varlen_when_compiled(varlen):
    layer, x = Attention(32, 4, 2), torch.randn(2, 23, 32)
    compiled = torch.compile(
        lambda x, doc: layer(x, seq=Seq.from_documents(doc, most=4)), fullgraph=True, backend="aot_eager"
    )
    inputs = [x.requires_grad_(), *layer.parameters()]
    ys = compiled(x, DOC), layer(x, seq=Seq.from_documents(DOC, most=4))
    torch.testing.assert_close(*ys)
    for pair in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in ys), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_varlen_refuses_second_derivatives(varlen, monkeypatch):
    layer, seq = Attention(32, 4, 2), Seq.from_documents(DOC)
    x = torch.randn(2, 23, 32, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x, seq=seq).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: a kernel computes its gradient, which has no derivative"):
        g.square().sum().backward()
    monkeypatch.setenv(dispatch.ENV, "reference")
    (g,) = torch.autograd.grad(layer(x, seq=seq).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert x.grad.abs().max() > 0


class FlashAttention(torch.autograd.Function):
    """What both generations of flash-attn are to autograd."""

    @staticmethod
    def forward(ctx, q, k, v, offsets, scale, span):
        ctx.save_for_backward(q, k, v, offsets)
        ctx.rest = scale, span
        return loop(q, k, v, offsets, scale, span)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, offsets = ctx.saved_tensors
        return *gradients(grad, q, k, v, offsets, *ctx.rest), None, None, None


def as_flash_attn_reads(causal, window_size):
    """``causal`` overrides what is behind a query."""
    return window_size[0], 0 if causal else window_size[1]


def library(generation):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    ):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
        y = FlashAttention.apply(q, k, v, cu_seqlens_q, softmax_scale, as_flash_attn_reads(causal, window_size))
        return (y, None) if generation == 4 else y

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        b, l = q.shape[:2]
        offsets, flat = torch.arange(0, (b + 1) * l, l), (x.flatten(0, 1) for x in (q, k, v))
        span = as_flash_attn_reads(causal, window_size)
        y = FlashAttention.apply(*flat, offsets, softmax_scale, span).unflatten(0, (b, l))
        return (y, None) if generation == 4 else y

    return types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.fixture(params=[2, 4])
def flash(request, monkeypatch):
    """The name of a generation of flash-attn, whose functions are stood in for."""
    name, module = {2: ("flash_attn", "flash_attn"), 4: ("flash_attn_4", "flash_attn.cute")}[request.param]
    monkeypatch.setitem(sys.modules, module, library(request.param))
    table = dispatch.TABLES["attention"]
    monkeypatch.setitem(table, name, dataclasses.replace(table[name], refuse=lambda facts: None))
    return name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flash_attn_equals_documents_one_by_one(options, flash, monkeypatch):
    layer, x = Attention(32, 4, **{"nheads_kv": 2, **options}), torch.randn(2, 23, 32)
    both(layer, x, Seq.from_documents(DOC, most=5), monkeypatch, flash)
    both(layer, x, Seq.from_mask(torch.tensor([[1] * 20 + [0] * 3, [1] * 23])), monkeypatch, flash)


def test_flash_attn_refuses_second_derivatives(flash, monkeypatch):
    layer, seq = Attention(32, 4, 2), Seq.from_documents(DOC)
    monkeypatch.setenv(dispatch.ENV, flash)
    for rows in (None, seq):
        x = torch.randn(2, 23, 32, requires_grad=True)
        (g,) = torch.autograd.grad(layer(x, seq=rows).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="attention: a kernel computes its gradient"):
            g.square().sum().backward()


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"causal": False, "window": 3}], ids=str)
def test_damage_stays_in_its_document_where_tiles_reach_over_its_end(options, monkeypatch):
    """flash-attn 4 multiplies by zero what stands behind a document; here, all that stands in the row."""
    own = FlashAttention

    class Reaching(FlashAttention):
        @staticmethod
        def forward(ctx, q, k, v, offsets, scale, span):
            return own.forward(ctx, q, k, v, offsets, scale, span) + 0 * v.sum() + 0 * k.sum()

        @staticmethod
        def backward(ctx, grad):
            reach = 0 * grad.sum() + 0 * ctx.saved_tensors[0].sum()
            gq, gk, gv, *rest = own.backward(ctx, grad)
            return gq + reach, gk + reach, gv + reach, *rest

    monkeypatch.setitem(sys.modules, "flash_attn.cute", library(4))
    monkeypatch.setattr(sys.modules[__name__], "FlashAttention", Reaching)
    table = dispatch.TABLES["attention"]
    monkeypatch.setitem(table, "flash_attn_4", dataclasses.replace(table["flash_attn_4"], refuse=lambda facts: None))
    monkeypatch.setenv(dispatch.ENV, "flash_attn_4")
    layer, x, seq = Attention(32, 4, 2, **options), torch.randn(2, 23, 32), Seq.from_documents(DOC)
    others = DOC[0] != 1
    results = []
    for hurt in (None, "x", "g"):
        rows, g = x.clone(), torch.ones(2, 23, 32)
        if hurt:
            (rows if hurt == "x" else g)[0, 11] = math.nan
        rows.requires_grad_()
        y = layer(rows, seq=seq)
        results.append((y, *torch.autograd.grad(y, rows, g)))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got[0, others], want[0, others])
            torch.testing.assert_close(got[1], want[1])
        assert result[1][0, ~others].isnan().any()


REFUSALS = [
    ("varlen", {"dtype": torch.float32}, "varlen takes float16, bfloat16, got float32"),
    ("varlen", {"device": "cpu"}, "varlen needs CUDA tensors, got cpu"),
    ("varlen", {"packed": False}, "varlen is for packed rows and windows"),
    ("varlen", {"headdim": 60}, "varlen takes multiples of 8 as headdim, got 60"),
    ("varlen", {"headdim": 264}, "varlen takes headdim up to 256, got 264"),
    ("varlen", {"counted": False}, r"only the device knows them \(Seq.from_documents\(most=...\)\)"),
    ("varlen", {"window": True, "packed": False, "masked": True}, "varlen takes no mask, which a carried state needs"),
    ("varlen", {}, "varlen calls flash attention, without which this torch was built"),
    ("flash_attn", {"counted": False}, "flash_attn needs the offsets of documents"),
    ("flash_attn_4", {"dtype": torch.float32}, "flash_attn_4 takes float16, bfloat16, got float32"),
    ("flash_attn_4", {"headdim": 100}, "flash_attn_4 takes multiples of 8 as headdim, got 100"),
]


@pytest.mark.parametrize(("name", "facts", "reason"), REFUSALS)
def test_a_refusal_says_why(name, facts, reason, monkeypatch):
    for library in ("flash_attn", "flash_attn_4"):
        monkeypatch.setitem(dispatch.installed, library, True)
        monkeypatch.setitem(dispatch._tried, library, types.ModuleType(library))
    monkeypatch.setattr("hybridzoo.layers.attend._has_flash", lambda: reason != REFUSALS[7][2])
    with pytest.raises(dispatch.BackendError, match=reason):
        choose("attention", backend=name, **GPU | {"packed": True} | facts)


@pytest.mark.parametrize(
    ("capability", "headdim", "reason"),
    [
        ((8, 0), 128, "on compute capability 9.0 and later, this is 8.0"),
        ((10, 0), 192, "up to 128 on compute capability 10.0, got 192"),
    ],
)
def test_flash_attn_4_depends_on_the_gpu(capability, headdim, reason, monkeypatch):
    monkeypatch.setitem(dispatch.installed, "flash_attn_4", True)
    monkeypatch.setitem(dispatch._tried, "flash_attn_4", types.ModuleType("flash_attn.cute"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(dispatch.BackendError, match=reason):
        choose("attention", backend="flash_attn_4", headdim=headdim, **GPU)


def test_flash_attn_is_taken_where_it_was_measured_to_pay(monkeypatch):
    for name in ("flash_attn", "flash_attn_4"):
        monkeypatch.setitem(dispatch.installed, name, True)
        monkeypatch.setitem(dispatch._tried, name, types.ModuleType(name))
    monkeypatch.setattr("hybridzoo.layers.attend._has_flash", lambda: True)
    for headdim, length, taken in (
        (128, 4096, "flash_attn_4"),
        (128, 2048, "sdpa"),
        (64, 4096, "flash_attn_4"),
        (32, 4096, "sdpa"),
    ):
        assert choose("attention", headdim=headdim, length=length, **GPU).name == taken
    assert choose("attention", headdim=128, length=4096, packed=True, **GPU).name == "varlen"
    for length, taken in ((2048, "flash_attn_4"), (1024, "varlen")):
        assert choose("attention", headdim=64, length=length, window=True, **GPU).name == taken
    assert choose("attention", headdim=80, length=4096, window=True, **GPU).name == "varlen"
    assert choose("attention", headdim=128, length=4096, causal=False, **GPU).name == "sdpa"
    reasons = {name: reason for name, _, reason in explain("attention", headdim=128, length=4096, causal=False, **GPU)}
    assert "was measured to pay on causal attention alone" in reasons["flash_attn_4"]
    rows = {name: reason for name, _, reason in explain("attention", headdim=64, length=2048, **GPU)}
    assert (
        rows["flash_attn_4"] == "flash_attn_4 was measured to pay from headdim 64 and 4096 tokens on, here 64 and 2048"
    )
    assert "same generation" in rows["flash_attn"]
    assert choose("attention", backend="flash_attn_4", headdim=64, **GPU).name == "flash_attn_4"
    assert choose("attention", backend="flash_attn", headdim=64, **GPU).name == "flash_attn"
    monkeypatch.setenv(dispatch.ENV, "flash_attn")
    taken = [name for name, chosen, _ in explain("attention", **GPU) if chosen]
    assert taken == ["flash_attn"]


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("four", [False, True])
def test_generations_of_flash_attn_are_told_apart(two, four, tmp_path, monkeypatch):
    folder = tmp_path / "flash_attn"
    folder.mkdir()
    if two:
        (folder / "__init__.py").write_text("raise RuntimeError('not to be imported to be found')")
    if four:
        (folder / "cute").mkdir()
        (folder / "cute" / "__init__.py").touch()
        (tmp_path / "flash_attn_4-4.0.0b36.dist-info").mkdir()
        (tmp_path / "flash_attn_4-4.0.0b36.dist-info" / "METADATA").write_text(
            "Name: flash-attn-4\nVersion: 4.0.0b36\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    assert dispatch._find("flash_attn") is two and dispatch._find("flash_attn_4") is four
    if four:
        assert importlib.metadata.version("flash-attn-4") == "4.0.0b36"
