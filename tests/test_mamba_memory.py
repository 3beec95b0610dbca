"""What a Mamba layer keeps for its backward, and that forming the rest again changes no bit of a gradient."""

import contextlib
import copy
import shutil

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hybridzoo.kernels import dispatch
from hybridzoo.kernels.conv import op as conv_op
from hybridzoo.kernels.scan import op as scan_op
from hybridzoo.layers import Mamba, RMSNorm, Seq, mamba, recompute

BF16 = torch.bfloat16
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
BACKENDS = ["chunked", "reference", pytest.param("cuda", marks=needs_compiler)]


@pytest.fixture
def backend(request, monkeypatch):
    """The named backend for scan and convolution; CUDA's through the emulator."""
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    for module in (scan_op, conv_op):
        monkeypatch.setattr(module, "choose", lambda op, **facts: dispatch.TABLES[op][request.param])
    return request.param


@pytest.fixture
def formed(monkeypatch):
    """The names of what the backward formed again, in order."""
    names, tensor = [], recompute.Recipe.tensor

    def counted(self):
        if self.value is None:
            names.append(self.form.__name__)
        return tensor(self)

    monkeypatch.setattr(recompute.Recipe, "tensor", counted)
    return names


class Storages(TorchDispatchMode):
    """The memory that operations have made, other than these tensors' own."""

    def __init__(self, *others):
        super().__init__()
        self.made, self.others = {}, {StorageWeakRef(x.untyped_storage()).cdata for x in others}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self.others:
                    self.made[ref.cdata] = ref, storage.nbytes()
        return out

    def alive(self):
        return sum(size for ref, size in self.made.values() if not ref.expired())


@contextlib.contextmanager
def keeping():
    """Autograd keeps everything, as without recomputation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba, "recomputing", lambda: contextlib.nullcontext(lambda x: x))
        yield


def gradients(layer, loss, *inputs):
    leaves = [*inputs, *(p for p in layer.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, leaves)


def both_ways(layer, run, *inputs):
    """Gradients of ``run(layer, *inputs)``, formed again and kept, from the same random state."""
    state, results = torch.get_rng_state(), []
    for way in (contextlib.nullcontext, keeping):
        torch.set_rng_state(state)
        with way():
            loss = run(layer, *inputs)
        results.append([loss, *gradients(layer, loss, *inputs)])
    return results


def assert_same_bits(results):
    for x, y in zip(*results, strict=True):
        assert torch.isfinite(x).all() and torch.equal(x, y)


def squares(layer, x):
    return layer(x).float().square().sum()


def under_autocast(layer, x):
    with torch.autocast("cpu", BF16):
        return squares(layer, x)


def with_a_state(layer, x):
    before = layer.init_state(x.shape[0])
    before = before.map(torch.ones_like)
    y, middle = layer(x, before, return_state=True)
    y2, after = layer(x.flip(1), middle, return_state=True)
    return sum(m.square().sum() for m in (y, y2, after.conv, after.ssm))


def packed(layer, x):
    doc = torch.tensor([[0] * 3 + [1] * 30 + [-1] * 7, [0] * 33 + [1] * 7])
    return (layer(x, seq=Seq.from_documents(doc)) * (doc >= 0)[..., None]).square().sum()


def padded(layer, x):
    seq = Seq.from_mask(torch.arange(40) < torch.tensor([[40], [9]]))
    return (layer(x, seq=seq) * seq.valid[..., None]).square().sum()


CASES = {
    "float32": (squares, {}),
    "bfloat16": (squares, {"dtype": BF16}),
    "autocast": (under_autocast, {}),
    "normed, autocast": (under_autocast, {"bcdt_norm": True}),
    "states": (with_a_state, {"bcdt_norm": True, "bcdt_norm_affine": False}),
    "packed": (packed, {}),
    "padded": (padded, {"d_conv": 2}),
    "odd channels": (squares, {"d_model": 21, "expand": 1}),
}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("run", "options"), CASES.values(), ids=CASES)
def test_gradients_are_the_same_bits(run, options, backend, formed):
    layer = Mamba(**{"d_model": 16, "d_state": 4, **options})
    x = torch.randn(2, 40, layer.in_proj.in_features, dtype=options.get("dtype"), requires_grad=True)
    assert_same_bits(both_ways(layer, run, x))
    # the reference keeps dt in forms of its own
    again = ["_filter"] if backend == "reference" else ["_filter", "_project"]
    assert sorted(formed) == sorted(again * (2 if run is with_a_state else 1))


def kept(layer, l, way):
    x = torch.randn(1, l, layer.in_proj.in_features, requires_grad=True)
    storages = Storages(x, *layer.parameters())
    with way(), storages, torch.autocast("cpu", BF16):
        y = layer(x)
    held = storages.alive() - y.untyped_storage().nbytes()
    y.sum().backward()
    del y
    x.grad = None
    layer.zero_grad()
    assert storages.alive() == 0
    return held


@pytest.mark.parametrize("backend", BACKENDS[::2], indirect=True)
def test_bytes_kept_per_token(backend):
    d, n = 64, 16
    layer = Mamba(d, d_state=n, dt_rank=4)
    # the inputs of in_proj 2, x and z 8, states 4, outputs 4; then what x_proj gives
    expected = 18 + 2 * (4 + 2 * n) / d
    for way, more in ((contextlib.nullcontext, 0), (keeping, 8)):
        each = (kept(layer, 128, way) - kept(layer, 64, way)) / (64 * d)
        assert each == expected + more


class Branch(torch.nn.Module):
    """A norm, a layer, and the residual stream past both."""

    def __init__(self, d, **options):
        super().__init__()
        self.norm, self.mixer = RMSNorm(d), Mamba(d, d_state=16, dt_rank=4, **options)
        self.in_proj = self.mixer.in_proj

    def forward(self, x):
        h, past = self.norm(x, BF16 if torch.is_autocast_enabled("cpu") else None, branch=True)
        return past + self.mixer(h)


@pytest.mark.parametrize("backend", BACKENDS[::2], indirect=True)
@pytest.mark.parametrize("run", [squares, under_autocast])
def test_the_norm_in_front_is_formed_again(run, backend, formed):
    branch, x = Branch(16), torch.randn(2, 40, 16, requires_grad=True)
    torch.nn.init.uniform_(branch.norm.weight)
    assert_same_bits(both_ways(branch, run, x))
    assert sorted(formed) == ["_filter", "_normed", "_project"]


def test_the_norm_of_a_changed_residual_stream_is_refused():
    branch, x = Branch(16), torch.randn(2, 9, 16, requires_grad=True)
    stream = x * 1
    y = branch(stream)
    with torch.no_grad():
        stream.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS[::2], indirect=True)
def test_bytes_kept_per_token_behind_a_norm(backend):
    d, branch = 64, Branch(64)
    # what the norm itself keeps is the same either way; the input of in_proj is 2, convolution and step sizes 8
    each, more = (
        (kept(branch, 128, way) - kept(branch, 64, way)) / (64 * d) for way in (contextlib.nullcontext, keeping)
    )
    assert more - each == 10


def test_the_graph_may_be_used_again(formed):
    layer, x = Mamba(16), torch.randn(2, 9, 16, requires_grad=True)
    loss = squares(layer, x)
    leaves = [x, *layer.parameters()]
    (first,) = torch.autograd.grad(loss, layer.A_log, retain_graph=True)
    runs = [torch.autograd.grad(loss, leaves, retain_graph=i == 0) for i in range(2)]
    with keeping():
        expected = torch.autograd.grad(squares(layer, x), leaves)
    assert_same_bits((runs[0], expected))
    assert_same_bits((runs[1], expected))
    names = ["x", *(name for name, _ in layer.named_parameters())]
    assert torch.equal(first, expected[names.index("A_log")])
    # the first backward forms them, and the graph has them from then on
    assert formed == ["_filter", "_project"]


def test_a_layer_used_twice():
    layer, x = Mamba(16), torch.randn(2, 9, 16, requires_grad=True)
    assert_same_bits(both_ways(layer, lambda layer, x: squares(layer, layer(x)), x))


@pytest.mark.parametrize("early_stop", [True, False])
def test_inside_a_checkpoint_all_is_left_to_it(early_stop, formed):
    layer, x, calls = Mamba(16), torch.randn(2, 9, 16, requires_grad=True), []
    layer.x_proj.register_forward_hook(lambda *_: calls.append(1))

    def run(layer, x):
        return checkpoint(squares, layer, x, use_reentrant=False, early_stop=early_stop, preserve_rng_state=False)

    storages = Storages(x, *layer.parameters())
    with storages:
        loss = run(layer, x)
    assert storages.alive() == loss.untyped_storage().nbytes()
    got = [loss, *gradients(layer, loss, x)]
    assert (len(calls), formed) == (2, [])
    with keeping():
        loss = squares(layer, x)
    assert_same_bits((got, [loss, *gradients(layer, loss, x)]))


def test_under_other_hooks_all_is_left_to_them(formed):
    layer, x, seen = Mamba(16), torch.randn(2, 9, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        loss = squares(layer, x)
    got = gradients(layer, loss, x)
    assert torch.Size((2, 9, 32)) in seen and formed == []
    with keeping():
        assert_same_bits((got, gradients(layer, squares(layer, x), x)))


def test_hooks_run_once_and_may_change_what_they_see(formed):
    layer, x, calls = Mamba(16), torch.randn(2, 9, 16, requires_grad=True), []
    layer.x_proj.register_forward_hook(lambda *_: calls.append("x_proj"))
    layer.dt_proj.register_forward_hook(lambda module, args, out: out * 2)
    layer.conv1d.register_forward_hook(lambda module, args, out: (out[0].mul_(0.5), out[1]))
    results = both_ways(layer, squares, x)
    assert_same_bits(results)
    assert calls == ["x_proj"] * 2 and formed == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("targets", [["x_proj"], ["dt_proj"], ["x_proj", "dt_proj"]], ids="-".join)
def test_adapters(targets, dropout, formed):
    config = LoraConfig(r=2, lora_dropout=dropout, init_lora_weights=False, target_modules=targets)
    layer = inject_adapter_in_model(config, Mamba(16, bcdt_norm=True)).train()
    x = torch.randn(2, 9, 16, requires_grad=True)
    assert_same_bits(both_ways(layer, under_autocast, x))
    # what an adapter adds up is not what the projection made
    assert formed == ["_filter"] + ([] if "dt_proj" in targets else ["_project"])


def test_parameters_from_outside(formed):
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    other = copy.deepcopy(layer)
    mine = {name: (2 * p.detach()).requires_grad_() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(mine[name])
    got = torch.autograd.grad(functional_call(layer, mine, x).square().sum(), list(mine.values()))
    assert len(formed) == 2
    with keeping():
        assert_same_bits((got, torch.autograd.grad(squares(other, x), list(other.parameters()))))


@pytest.mark.parametrize("name", ["conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "D"])
def test_parameters_changed_before_the_backward_are_an_error(name):
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    loss = squares(layer, x)
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_projection_changed_under_autocast_is_an_error():
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    loss = under_autocast(layer, x)
    with torch.no_grad():
        layer.dt_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation after the forward\. Change parameters"):
        loss.backward()


def test_second_derivatives():
    layer, x = Mamba(4, d_state=2).double(), torch.randn(1, 3, 4, dtype=torch.double, requires_grad=True)

    def twice(layer, x):
        loss = layer(x).square().sum()
        return torch.autograd.grad(loss, layer.out_proj.weight, create_graph=True)[0].square().sum()

    got, want = both_ways(layer, twice, x)
    assert_same_bits((got, want))


def test_without_gradients_nothing_is_remembered():
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    seen = []
    layer.conv1d.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)(x)
    assert len(seen) == 2 and not any(hasattr(u, "_recipe") for u in seen)


def test_a_torch_without_the_names_keeps_everything(formed, monkeypatch):
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    squares(Mamba(16), torch.randn(2, 9, 16)).backward()
    assert formed == []
