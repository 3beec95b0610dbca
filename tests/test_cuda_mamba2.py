"""A Mamba-2 layer as one node of autograd, its kernels run on the CPU (tests/emulator), beside the calls of its parts and float64.

PyTorch's chunks stand in for the kernels of SSD, which have tests of their own, but where it is said: they take an emulator long.
"""

import copy
import math
import shutil

import pytest
import torch
from layer_runs import error, run, two_rows
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hybridzoo.kernels import dispatch
from hybridzoo.kernels.conv import op as conv_op
from hybridzoo.kernels.norm import gated
from hybridzoo.kernels.norm import op as norm_op
from hybridzoo.kernels.ssd import chunked
from hybridzoo.kernels.ssd import cuda as ssd_forward
from hybridzoo.kernels.ssd import cuda_backward as ssd_backward
from hybridzoo.kernels.ssd import op as ssd_op
from hybridzoo.kernels.ssd.inputs import SsdInputs, SsdOptions
from hybridzoo.layers import Mamba2, RMSNorm, mamba2, norm, one_node

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
OPS = (ssd_op, conv_op, gated, norm_op)


def forward_in_chunks(i, options, save):
    with torch.no_grad():
        out, last = chunked.ssd(i, options)
    return out, last, out.new_zeros(1) if save else None


def backward_in_chunks(i, options, gout, glast, saved, into):
    assert saved.shape == (1,) and glast is None
    leaves = [m if m is None else m.detach().requires_grad_() for m in i[:8]]
    with torch.enable_grad():
        out, _ = chunked.ssd(SsdInputs(*leaves, *i[8:]), options)
    found = iter(torch.autograd.grad(out, [m for m in leaves if m is not None], gout))
    grads = SsdInputs(*(None if m is None else next(found) for m in leaves), None)
    for to, g in zip(into, (grads.x, grads.dt, grads.B, grads.C, grads.z), strict=True):
        if to is not None:
            to.copy_(g)
    return grads


@pytest.fixture
def ways(emulated, monkeypatch, request):
    """Chooses how layers run: ``True`` as one node, ``False`` part by part; the CUDA kernels of convolution and norm either way."""
    scan = getattr(request, "param", "chunked")
    if scan == "chunked":
        monkeypatch.setattr(ssd_forward, "forward", forward_in_chunks)
        monkeypatch.setattr(ssd_backward, "backward", backward_in_chunks)
    for module in OPS:
        name = scan if module is ssd_op else "cuda"
        monkeypatch.setattr(module, "choose", lambda op, name=name, **facts: dispatch.TABLES[op][name])
    nodes, apply = [], mamba2.mamba2_layer

    def counted(*args):
        nodes.append(args)
        return apply(*args)

    monkeypatch.setattr(mamba2, "mamba2_layer", counted)

    def choose(as_one):
        nodes.clear()
        monkeypatch.setattr(one_node, "ours", lambda *_, **__: as_one)
        return nodes

    return choose


def layer_of(**options):
    layer = Mamba2(**{"d_model": 16, "headdim": 8, "d_state": 8, **options})
    for name, p in layer.named_parameters():
        if p.dim() == 1 and name not in layer.fp32_parameters:
            nn.init.uniform_(p, 0.5, 1.5)
    return layer


CASES = {
    "float32": {},
    "bfloat16, groups": {"dtype": BF16, "ngroups": 2},
    "autocast": {"autocast": BF16},
    "biases": {"bias": True, "autocast": BF16},
    "no bias of the filter": {"conv_bias": False, "autocast": BF16},
    "the norm first": {"norm_before_gate": True, "autocast": BF16},
    "no norm": {"rmsnorm": False, "autocast": BF16},
    "a skip per channel, limits": {"D_has_hdim": True, "dt_limit": (0.01, 0.05), "rmsnorm": False},
    "odd sizes": {"d_model": 21, "expand": 1, "headdim": 7, "d_state": 3, "autocast": BF16},
    "multipliers around": {"in_multiplier": 0.5, "out_multiplier": 2.0},
    "one token": {"l": 1},
    "packed": {"seq": "packed", "autocast": BF16},
    "padded": {"seq": "padded", "bias": True},
}


def compare(options, ways):
    options = dict(options)
    l, kind, autocast = options.pop("l", 40), options.pop("seq", None), options.pop("autocast", None)
    layer = layer_of(**options)
    x, seq = torch.randn(2, l, layer.in_proj.in_features, dtype=options.get("dtype")), two_rows(kind, 2, l)
    nodes = ways(True)
    y, grads = run(layer, x, seq, autocast)
    assert len(nodes) == 1
    ways(False)
    parts_y, parts = run(layer, x, seq, autocast)
    valid = slice(None) if seq is None else seq.valid
    assert torch.equal(y[valid], parts_y[valid])
    exact = copy.deepcopy(layer).double()
    with pytest.MonkeyPatch.context() as patch:
        for module in OPS:
            plain = "torch" if module in (gated, norm_op) else "reference"
            patch.setattr(module, "choose", lambda op, plain=plain, **facts: dispatch.TABLES[op][plain])
        _, want = run(exact, x.double(), seq)
    assert grads.keys() == want.keys()
    for name, g in grads.items():
        assert (g.dtype, g.shape) == (parts[name].dtype, parts[name].shape), name
        # whatever rounding the parts do, the node does no more of it, but not at the same places
        assert error(g, want[name]) <= 1.1 * error(parts[name], want[name]) + 1e-6, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case, ways):
    compare(case, ways)


@pytest.mark.parametrize("ways", ["cuda"], indirect=True)
@pytest.mark.parametrize(("case", "l"), [("autocast", 70), ("no norm", 70), ("autocast", 1), ("no norm", 1)])
def test_with_the_kernels_of_ssd(case, l, ways):
    compare(CASES[case] | {"headdim": 16, "d_state": 16, "l": l}, ways)


def test_gradients_of_ssd_go_into_slices_of_one_tensor(emulated):
    b, l, h, p, g, n = 2, 70, 4, 16, 2, 16
    x, B, C = torch.randn(b, l, h, p).to(BF16), *torch.randn(2, b, l, g, n).to(BF16)
    dt, A, bias = torch.randn(b, l, h).to(BF16), -torch.rand(h), torch.randn(h)
    options, gout = SsdOptions(True), torch.randn(b, l, h, p).to(BF16)
    for z in (None, torch.randn(b, l, h, p).to(BF16)):
        i = SsdInputs(x, dt, A, B, C, torch.randn(h), z, bias)
        _, _, saved = ssd_forward.forward(i, options, True)
        want = ssd_backward.backward(i, options, gout, None, saved)
        sizes = [8, h * p, g * n, g * n, h * p, h, 4]
        wide = torch.full((b, l, sum(sizes)), 7.0).to(BF16)
        before, *slices, behind = wide.split(sizes, -1)
        gx, gB, gC, gz = (m.unflatten(-1, (k, -1)) for m, k in zip(slices[:4], (h, g, g, h), strict=True))
        into = gx, slices[4], gB, gC, None if z is None else gz
        found = ssd_backward.backward(i, options, gout, None, saved, into=into)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert all(a is b for a, b in zip(into, (found.x, found.dt, found.B, found.C, found.z), strict=True))
        # what lies beside them is left alone
        assert all((m == 7).all() for m in (before, behind, *([gz] if z is None else [])))


def test_run_twice_the_bits_are_the_same(ways):
    layer, x = layer_of(), torch.randn(2, 40, 16)
    ways(True)
    (_, first), (_, second) = run(layer, x, autocast=BF16), run(layer, x, autocast=BF16)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("frozen", ["in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj", ""])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, ways):
    layer, x = layer_of(bias=True), torch.randn(2, 9, 16)
    ways(True)
    _, want = run(layer, x)
    for name, p in layer.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    _, got = run(layer, x)
    assert "x" in got and len(got) < len(want)
    assert all(torch.equal(g, want[name]) for name, g in got.items())


def test_an_input_without_gradient(ways):
    layer, x = layer_of(), torch.randn(2, 9, 16)
    ways(True)
    _, want = run(layer, x)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for name, p in layer.named_parameters():
        assert error(p.grad, want[name].double()) < 1e-5


def test_weights_from_outside(ways):
    layer, x = layer_of(), torch.randn(2, 9, 16)
    raw = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    ways(True)
    y = functional_call(layer, {name: 2 * p for name, p in raw.items()}, x)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    grads = torch.autograd.grad(y.square().sum(), list(raw.values()))
    want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert all(torch.equal(g, 2 * w) for g, w in zip(grads, want, strict=True))


class Branch(nn.Module):
    """A norm, a layer, and the residual stream past both."""

    def __init__(self, d):
        super().__init__()
        self.norm, self.mixer = RMSNorm(d), layer_of(d_model=d)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x, seq=None):
        h, past = self.norm(x, BF16, branch=True)
        return past + self.mixer(h, seq=seq)


def test_the_norm_in_front_is_formed_again(ways, monkeypatch):
    branch, x, norms, forward = Branch(16), torch.randn(2, 40, 16), [], norm.branch_rms_norm
    monkeypatch.setattr(norm, "branch_rms_norm", lambda *a, **kw: norms.append(1) or forward(*a, **kw))
    nodes = ways(True)
    _, got = run(branch, x, autocast=BF16)
    assert len(nodes) == 1 and len(norms) == 2
    monkeypatch.setattr(one_node, "recipe", lambda x: None)
    _, want = run(branch, x, autocast=BF16)
    assert len(norms) == 3 and all(torch.equal(got[name], want[name]) for name in want)


def kept(module, l):
    """Bytes that autograd keeps, other than parameters, of every tensor once."""
    x, held = torch.randn(1, l, 64, requires_grad=True), {}
    own = {p.untyped_storage().data_ptr() for p in (x, *module.parameters())}
    pack = lambda m: held.update({m.untyped_storage().data_ptr(): m}) or m  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda m: m), torch.autocast("cpu", BF16):
        module(x)
    return sum(m.untyped_storage().nbytes() for at, m in held.items() if at not in own)


def test_of_what_grows_with_the_length_the_first_product_alone_is_kept(ways, monkeypatch):
    layer = layer_of(d_model=64, headdim=16, d_state=16)
    # hooks such as this test's have nodes keep their inputs: here the cast one
    ways(True)
    each = (kept(layer, 128) - kept(layer, 64)) / 64
    assert each == 2 * (layer.in_proj.out_features + 64)
    ways(False)
    assert (kept(layer, 128) - kept(layer, 64)) / 64 > 1.8 * each


def test_the_graph_may_be_used_again_only_if_it_is_kept(ways):
    branch, x = Branch(16), torch.randn(2, 9, 16, requires_grad=True)
    ways(True)
    with torch.autocast("cpu", BF16):
        loss = branch(x).square().sum()
    leaves = [x, *branch.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_a_second_derivative_is_an_error(ways):
    layer, x = layer_of(), torch.randn(2, 9, 16, requires_grad=True)
    ways(True)
    (gx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative\. Use backend='reference', or HYBRIDZOO_BACKEND=reference"):
        gx.sum().backward()


def test_a_backward_under_another_autocast(ways):
    layer, x = layer_of(), torch.randn(2, 9, 16)
    ways(True)
    _, want = run(layer, x)
    y = layer(x)
    with torch.autocast("cpu", BF16):
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    assert all(error(p.grad, want[name].double()) < 1e-5 for name, p in layer.named_parameters())


@pytest.mark.parametrize("name", ["conv1d.weight", "D", "norm.weight"])
def test_parameters_changed_before_the_backward_are_an_error(name, ways):
    layer, x = layer_of(), torch.randn(2, 9, 16)
    ways(True)
    loss = layer(x).sum()
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_that_do_not_fit_are_an_error(ways):
    ways(True)
    with pytest.raises(ValueError, match=r"Mamba2: seq describes \(2, 40\) tokens, the input has \(2, 9\)"):
        layer_of()(torch.randn(2, 9, 16), seq=two_rows("packed", 2, 40))


def hooked(layer):
    layer.norm.register_forward_hook(lambda *_: None)


def replaced(layer):
    layer.in_proj = nn.utils.parametrizations.weight_norm(layer.in_proj)


def wrapped(layer):
    layer.out_proj.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hooked, "norm has hooks"),
        (replaced, "in_proj is of type ParametrizedLinear, not Linear"),
        (wrapped, "out_proj has hooks, or a forward of its own"),
    ],
)
def test_what_has_to_be_called_is_called(change, why):
    layer = layer_of()
    assert layer._why_called() is None
    change(layer)
    assert layer._why_called().startswith(why)


def test_what_the_node_cannot_do():
    assert layer_of(d_ssm=16)._why_called() == "there is an MLP beside the scan"
    assert layer_of(multipliers=(1.0, 1.0, 1.0, 1.0, 2.0))._why_called() == "the projections have multipliers"
    assert layer_of(in_multiplier=2.0, rmsnorm=False, dt_limit=(0.0, math.inf))._why_called() is None


def test_when_it_is_taken(ways):
    layer, x = layer_of(), torch.randn(2, 9, 16)
    nodes = ways(True)

    def taken(run=lambda layer, x: layer(x)):
        nodes.clear()
        run(layer, x)
        return len(nodes)

    assert taken() == 1 and taken(lambda layer, x: layer(x, return_state=True)) == 0
    assert taken(lambda layer, x: layer(x, layer.init_state(2))) == 0
    assert taken(lambda layer, x: checkpoint(layer, x, use_reentrant=False)) == 1
    with torch.no_grad():
        assert taken() == 0
    layer.requires_grad_(False)
    assert taken() == 0 and taken(lambda layer, x: layer(x.requires_grad_())) == 1
    # F.linear refuses what is of different types, as it does without
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(x.bfloat16())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant, ways):
    branch, x = Branch(16), torch.randn(2, 40, 16, requires_grad=True)
    ways(True)

    def run(x):
        with torch.autocast("cpu", BF16):
            return branch(x)

    results = []
    for y in (run(x), checkpoint(run, x, use_reentrant=reentrant)):
        results.append([y, *torch.autograd.grad(y.square().sum(), x, retain_graph=True)] if not reentrant else [y])
        y.square().sum().backward()
        results[-1] += [p.grad for p in branch.parameters()]
        branch.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_choice_and_its_reason(monkeypatch):
    def verdict(**facts):
        return next((name, why) for name, chosen, why in dispatch.explain("mamba2_layer", **facts) if chosen)

    assert verdict(device="cpu")[0] == "modules"
    asked = {}
    for op in ("ssd", "causal_conv1d", "gated_rms_norm"):
        ours = dispatch.Backend("cuda", "ours", lambda facts, op=op: asked.update({op: facts}))
        monkeypatch.setitem(dispatch.TABLES, op, {**dispatch.TABLES[op], "cuda": ours})
    assert verdict(device="cuda", normed=True)[0] == "cuda" and asked["ssd"]["grad"]
    monkeypatch.setenv(dispatch.ENV, "chunked")
    assert dispatch.explain("mamba2_layer", device="cuda")[0][2] == "ssd is not by our kernels (backend: chunked)"
