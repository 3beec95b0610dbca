"""Derivatives of every kind against finite differences in float64: forward mode, torch.func's transforms, second ones; or an error."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as dual
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

import hybridzoo as zoo
from hybridzoo.kernels import (
    BackendError,
    Seq,
    causal_conv1d,
    causal_conv1d_update,
    cross_entropy,
    gated_rms_norm,
    layer_norm,
    rms_norm,
    selective_scan,
    selective_state_update,
    ssd,
    ssd_state_update,
)
from hybridzoo.layers import MLP, Attention, Mamba, Mamba2, MoE

D = torch.float64
SEQ = Seq.from_cu_seqlens([0, 2, 5], 1, 5)
pytestmark = pytest.mark.filterwarnings("ignore")


def rand(*shape):
    return torch.randn(*shape, dtype=D)


def scan(**options):
    dt, A, B, C = torch.rand(1, 5, 4, dtype=D), -torch.rand(4, 2, dtype=D), rand(1, 5, 2), rand(1, 5, 2)
    return lambda u: selective_scan(u, dt, A, B, C, torch.ones(4, dtype=D), u.sin(), **options)


def dual_form(**options):
    dt, A, B, C = torch.rand(1, 5, 2, dtype=D), -torch.rand(2, dtype=D), rand(1, 5, 1, 3), rand(1, 5, 1, 3)
    return lambda u: ssd(u.view(1, 5, 2, 2), dt, A, B, C, **options)


def conv(**options):
    return partial(causal_conv1d, weight=rand(4, 3), activation="silu", **options)


def one_step():
    state, dt, A, B, C = rand(5, 4, 2), torch.rand(5, 4, dtype=D), -torch.rand(4, 2, dtype=D), rand(5, 2), rand(5, 2)
    return lambda u: selective_state_update(state * u[0, 0, 0], u[0], dt, A, B, C)


def one_step_of_heads():
    state, dt, A, B, C = (
        rand(5, 2, 2, 3),
        torch.rand(5, 2, dtype=D),
        -torch.rand(2, dtype=D),
        rand(5, 1, 3),
        rand(5, 1, 3),
    )
    return lambda u: ssd_state_update(state * u[0, 0, 0], u[0].view(5, 2, 2), dt, A, B, C)


def one_step_of_the_filter():
    state, weight = rand(5, 2, 4), rand(4, 3)
    return lambda u: causal_conv1d_update(u[0], state * u[0, 0, 0], weight, activation="silu")


def layer(kind, **options):
    module = kind(4, **options).double()
    return lambda u: module(u, seq=SEQ)


FUNCTIONS = {
    "scan": scan,
    "scan, packed": lambda: scan(seq=SEQ),
    "scan, paths": lambda: scan(paths=[(1, 5, 0, 1, 0), (1, 5, 0, 1, 1)]),
    "ssd": dual_form,
    "ssd, packed": lambda: dual_form(seq=SEQ, chunk_size=2),
    "conv": conv,
    "norm": lambda: partial(rms_norm, weight=rand(4), eps=1e-5),
    "layer norm": lambda: partial(layer_norm, weight=rand(4), bias=rand(4), eps=1e-5),
    "gated norm": lambda: partial(gated_rms_norm, gate=rand(1, 5, 4), weight=rand(4), eps=1e-5, group_size=2),
    "loss": lambda: lambda u: cross_entropy(u[0], torch.tensor([0, 3, 1, -100, 2]))[0],
    "step": one_step,
    "step of heads": one_step_of_heads,
    "step of the filter": one_step_of_the_filter,
    "mamba": lambda: layer(Mamba, d_state=2, bcdt_norm=True),
    "mamba2": lambda: layer(Mamba2, d_state=2, headdim=4),
    "attention": lambda: layer(Attention, nheads=2, nheads_kv=1, qk_norm=True),
    "window": lambda: layer(Attention, nheads=2, window=2, d_conv=2),
    "mlp": lambda: layer(MLP, d_intermediate=4),
    "moe": lambda: layer(MoE, d_intermediate=4, num_experts=2, top_k=1),
}


def differences(f, u, v, step=1e-6):
    with torch.no_grad():
        return (f(u + step * v) - f(u - step * v)) / (2 * step)


def close(got, want):
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode(name):
    f, u, v = FUNCTIONS[name](), rand(1, 5, 4), rand(1, 5, 4)
    want = differences(f, u, v)
    close(jvp(f, (u,), (v,))[1], want)
    with dual.dual_level():
        close(dual.unpack_dual(f(dual.make_dual(u, v))).tangent, want)
    if name in ("scan", "conv", "attention"):
        close((jacfwd(f)(u).flatten(-3) @ v.flatten()).view_as(want), want)
    if name in ("scan", "ssd, packed"):
        close(linearize(f, u)[1](v), want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_and_second_derivatives(name, monkeypatch):
    f, u, v = FUNCTIONS[name](), rand(1, 5, 4), rand(1, 5, 4)
    weight = torch.randn(f(u).shape, dtype=D)

    def loss(u):
        return (f(u).sin() * weight).sum()

    gradient = grad(loss)
    torch.testing.assert_close((gradient(u) * v).sum(), differences(loss, u, v), atol=1e-7, rtol=1e-6)
    want = differences(gradient, u, v)
    torch.testing.assert_close(jvp(gradient, (u,), (v,))[1], want, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(grad(lambda u: (gradient(u) * v).sum())(u), want, atol=1e-7, rtol=1e-6)
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "reference")
    leaf = u.clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (twice,) = torch.autograd.grad((once * v).sum(), leaf)
    torch.testing.assert_close(twice, want, atol=1e-7, rtol=1e-6)
    if name in ("scan", "ssd", "conv", "mamba2", "attention", "moe"):
        both = (hessian(loss)(u), jacrev(gradient)(u))
        torch.testing.assert_close(*both)
        torch.testing.assert_close((both[0].view(20, 20) @ v.flatten()).view_as(want), want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", ["scan", "ssd", "conv", "norm", "layer norm", "mamba", "mamba2", "attention"])
def test_vmap(name):
    f, u = FUNCTIONS[name](), rand(3, 1, 5, 4)
    torch.testing.assert_close(vmap(f)(u), torch.stack([f(x) for x in u]))


def test_gradients_of_single_samples():
    module, x = Mamba(4, d_state=2).double(), rand(3, 1, 5, 4)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        want = torch.autograd.grad(module(x[i]).square().sum(), list(module.parameters()))
        for g, w in zip(each.values(), want, strict=True):
            torch.testing.assert_close(g[i], w)


@pytest.mark.parametrize("name", ["mamba-tiny", "zamba2-tiny", "jamba-tiny", "samba-tiny"])
def test_models(name, monkeypatch):
    model = zoo.build(name, dtype=D).eval()
    x, v = rand(1, 7, model.cfg.d_model), rand(1, 7, model.cfg.d_model)
    close(
        jvp(lambda x: model(inputs_embeds=x).logits, (x,), (v,))[1],
        differences(lambda x: model(inputs_embeds=x).logits, x, v),
    )
    labels = torch.randint(1, 256, (1, 7))

    def loss(x):
        return model(inputs_embeds=x, labels=labels).loss

    torch.testing.assert_close((grad(loss)(x) * v).sum(), differences(loss, x, v), atol=1e-7, rtol=1e-5)
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "reference")
    leaf = x.clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (twice,) = torch.autograd.grad((once * v).sum(), leaf)

    def directional(x):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(loss(leaf), leaf)[0]

    close(twice, differences(directional, x, v))


@pytest.mark.parametrize("name", ["scan", "ssd", "conv"])
def test_what_a_kernel_has_not_is_refused(name):
    u = rand(1, 5, 4).requires_grad_()
    function = {"scan": scan, "ssd": dual_form, "conv": conv}[name]
    f, able = function(backend="chunked"), function(backend="reference")
    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* Use backend='reference'"):
        jvp(f, (u,), (u,))
    for transform in (lambda: grad(lambda u: f(u).sum())(u), lambda: vmap(f)(u[None])):
        with pytest.raises(BackendError, match=r"torch.func's transforms .* Use backend='reference'"):
            transform()
    (once,) = torch.autograd.grad(f(u).square().sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no derivative\. Use backend='reference', or HYBRIDZOO_BACKEND"):
        once.sum().backward()
    assert jvp(able, (u,), (u,))[1].abs().max() > 0


def test_reference_is_known_to_every_op(monkeypatch):
    x = rand(2, 4).requires_grad_()
    assert torch.equal(rms_norm(x, None, 1e-5, backend="reference"), rms_norm(x, None, 1e-5))
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "chunked")
    with pytest.raises(NotImplementedError, match=r"selective_scan \(HYBRIDZOO_BACKEND=chunked\): forward-mode"):
        jvp(scan(), (rand(1, 5, 4),), (rand(1, 5, 4),))


def test_fused_attention_says_what_has_a_second_derivative(monkeypatch):
    module, x = Attention(8, nheads=2, nheads_kv=1), torch.randn(1, 5, 8, requires_grad=True)

    def twice():
        (once,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return torch.autograd.grad((once + x.square()).sum(), x)[0]

    with pytest.raises(NotImplementedError, match=r"attention: .* Use backend='reference', or HYBRIDZOO_BACKEND="):
        twice()
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "reference")
    assert (twice() - 2).abs().max() > 1e-4


def test_a_description_outlives_the_transform_that_read_it_first():
    module, seq = Attention(4, nheads=2).double(), Seq.from_cu_seqlens([0, 2, 5], 1, 5)
    x = rand(1, 5, 4)
    first = hessian(lambda x: module(x, seq=seq).sin().sum())(x)
    assert torch.equal(jacrev(grad(lambda x: module(x, seq=seq).sin().sum()))(x).isfinite(), first.isfinite())
    assert seq.side_by_side is seq.side_by_side
