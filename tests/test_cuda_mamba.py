"""A Mamba layer as one node of autograd, its kernels run on the CPU (tests/emulator), beside the calls of its parts and float64."""

import copy
import shutil

import pytest
import torch
from layer_runs import error, run, two_rows
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hybridzoo.kernels import dispatch
from hybridzoo.kernels.conv import op as conv_op
from hybridzoo.kernels.norm import op as kernels_norm
from hybridzoo.kernels.scan import op as scan_op
from hybridzoo.layers import Mamba, RMSNorm, mamba, norm, one_node

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture
def ways(emulated, monkeypatch):
    """Chooses how layers run: ``True`` as one node, ``False`` part by part, with the CUDA kernels either way."""
    for module in (scan_op, conv_op, kernels_norm):
        monkeypatch.setattr(module, "choose", lambda op, **facts: dispatch.TABLES[op]["cuda"])
    nodes, apply = [], mamba.mamba_layer

    def counted(*args):
        nodes.append(args)
        return apply(*args)

    monkeypatch.setattr(mamba, "mamba_layer", counted)

    def choose(as_one):
        nodes.clear()
        monkeypatch.setattr(one_node, "ours", lambda *_, **__: as_one)
        return nodes

    return choose


CASES = {
    "float32": {},
    "bfloat16": {"dtype": BF16},
    "autocast": {"autocast": BF16},
    "float16 autocast": {"autocast": torch.float16},
    "biases": {"bias": True, "autocast": BF16},
    "no bias of the filter": {"conv_bias": False, "d_conv": 2},
    "odd sizes": {"d_model": 21, "expand": 1, "dt_rank": 3, "d_state": 3, "autocast": BF16},
    "normed": {"bcdt_norm": True, "autocast": BF16},
    "normed, not learned": {"bcdt_norm": True, "bcdt_norm_affine": False, "dtype": BF16, "bcdt_norm_eps": 0.1},
    "states that are not kept": {"d_state": 20, "autocast": BF16},
    "one token": {"l": 1},
    "packed": {"seq": "packed", "autocast": BF16},
    "padded": {"seq": "padded"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case, ways):
    options = dict(case)
    l, kind, autocast = options.pop("l", 40), options.pop("seq", None), options.pop("autocast", None)
    layer = Mamba(**{"d_model": 16, "d_state": 4, **options})
    for p in layer.parameters():
        if p.dim() == 1 and p.dtype.is_floating_point and p is not layer.dt_proj.bias:
            nn.init.uniform_(p, 0.5, 1.5)
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
        for module in (scan_op, conv_op):
            patch.setattr(module, "choose", lambda op, **facts: dispatch.TABLES[op]["reference"])
        patch.setattr(kernels_norm, "choose", lambda op, **facts: dispatch.TABLES[op]["torch"])
        _, want = run(exact, x.double(), seq)
    assert grads.keys() == want.keys()
    for name, g in grads.items():
        assert (g.dtype, g.shape) == (parts[name].dtype, parts[name].shape), name
        # whatever rounding the parts do, the node does no more of it, but not at the same places
        assert error(g, want[name]) <= 1.1 * error(parts[name], want[name]) + 1e-6, name


def test_run_twice_the_bits_are_the_same(ways):
    layer, x = Mamba(16), torch.randn(2, 40, 16)
    ways(True)
    (_, first), (_, second) = run(layer, x, autocast=BF16), run(layer, x, autocast=BF16)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("frozen", ["in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj", ""])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, ways):
    layer, x = Mamba(16, bias=True), torch.randn(2, 9, 16)
    ways(True)
    _, want = run(layer, x)
    for name, p in layer.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    _, got = run(layer, x)
    assert "x" in got and len(got) < len(want)
    assert all(torch.equal(g, want[name]) for name, g in got.items())


def test_an_input_without_gradient(ways):
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    ways(True)
    _, want = run(layer, x)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for name, p in layer.named_parameters():
        assert error(p.grad, want[name].double()) < 1e-5


def test_weights_from_outside(ways):
    layer, x = Mamba(16), torch.randn(2, 9, 16)
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
        self.norm, self.mixer = RMSNorm(d), Mamba(d)
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


def test_the_norm_of_a_changed_residual_stream_is_refused(ways):
    branch, x = Branch(16), torch.randn(2, 9, 16, requires_grad=True)
    ways(True)
    stream = x * 1
    with torch.autocast("cpu", BF16):
        y = branch(stream)
    with torch.no_grad():
        stream.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


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
    layer, x = Mamba(16), torch.randn(2, 9, 16, requires_grad=True)
    ways(True)
    (gx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative\. Use backend='reference', or HYBRIDZOO_BACKEND=reference"):
        gx.sum().backward()
    (gx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.autograd.grad((gx + x.square()).sum(), x)


def test_a_backward_under_another_autocast(ways):
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    ways(True)
    _, want = run(layer, x)
    y = layer(x)
    with torch.autocast("cpu", BF16):
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    assert all(error(p.grad, want[name].double()) < 1e-5 for name, p in layer.named_parameters())


@pytest.mark.parametrize("name", ["conv1d.weight", "D"])
def test_parameters_changed_before_the_backward_are_an_error(name, ways):
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    ways(True)
    loss = layer(x).sum()
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_that_do_not_fit_are_an_error(ways):
    ways(True)
    with pytest.raises(ValueError, match=r"Mamba: seq describes \(2, 40\) tokens, the input has \(2, 9\)"):
        Mamba(16)(torch.randn(2, 9, 16), seq=two_rows("packed", 2, 40))


def hooked(layer):
    layer.x_proj.register_forward_hook(lambda *_: None)


def hooked_before(layer):
    layer.out_proj.register_forward_pre_hook(lambda *_: None)


def hooked_behind(layer):
    layer.conv1d.register_full_backward_hook(lambda *_: None)


def replaced(layer):
    layer.in_proj = nn.utils.parametrizations.weight_norm(layer.in_proj)


def wrapped(layer):
    layer.dt_proj.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hooked, "x_proj has hooks"),
        (hooked_before, "out_proj has hooks"),
        (hooked_behind, "conv1d has hooks"),
        (replaced, "in_proj is of type ParametrizedLinear, not Linear"),
        (wrapped, "dt_proj has hooks, or a forward of its own"),
    ],
)
def test_what_has_to_be_called_is_called(change, why):
    layer = Mamba(16)
    assert layer._why_called() is None
    change(layer)
    assert layer._why_called().startswith(why)


def test_when_it_is_taken(ways):
    layer, x = Mamba(16, bcdt_norm=True), torch.randn(2, 9, 16)
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
    layer.b_norm.eps = 0.1
    assert taken() == 0
    for norm_ in (layer.dt_norm, layer.c_norm):
        norm_.eps = 0.1
    assert taken() == 1 and nodes[0][-1] == 0.1
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


def test_hooks_on_all_modules_are_called():
    layer, handle = Mamba(16), nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert layer._why_called() == "there are hooks on all modules"
    finally:
        handle.remove()
    assert layer._why_called() is None
    normed = Mamba(16, bcdt_norm=True)
    assert normed._why_called() is None
    normed.b_norm.register_forward_hook(lambda *_: None)
    assert normed._why_called().startswith("b_norm has hooks")


@pytest.mark.parametrize("wish", ["cuda", "modules", "chunked"])
def test_a_backend_that_is_asked_for(wish, monkeypatch):
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    want = layer(x)
    monkeypatch.setenv(dispatch.ENV, wish)
    if wish == "cuda":
        with pytest.raises(
            dispatch.BackendError, match=r"^causal_conv1d \(HYBRIDZOO_BACKEND=cuda\): the CUDA kernels need"
        ):
            layer(x)
    else:
        assert torch.equal(layer(x), want)


def test_the_choice_and_its_reason(monkeypatch):
    def verdict(**facts):
        return next((name, why) for name, chosen, why in dispatch.explain("mamba_layer", **facts) if chosen)

    assert verdict(device="cpu")[0] == "modules"
    for op in ("selective_scan", "causal_conv1d"):
        ours = dispatch.Backend("cuda", "ours", lambda facts: None)
        monkeypatch.setitem(
            dispatch.TABLES, op, {"cuda": ours, **{k: v for k, v in dispatch.TABLES[op].items() if k != "cuda"}}
        )
    assert verdict(device="cuda")[0] == "cuda"
    monkeypatch.setenv(dispatch.ENV, "chunked")
    assert (
        dispatch.explain("mamba_layer", device="cuda")[0][2]
        == "selective_scan is not by our kernels (backend: chunked)"
    )
