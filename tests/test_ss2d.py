"""SS2D against VMamba's layer as it is published: four scans over flipped and transposed copies, one pixel after another, in float64."""

import dataclasses
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

import hybridzoo as zoo
from hybridzoo.kernels import Seq, dispatch
from hybridzoo.kernels.scan import steps as blocks
from hybridzoo.layers import SS2D, OptionError
from hybridzoo.layers.orders import paths_of, ranks_of
from hybridzoo.zoo.registry import build_mixer, check_mixer_options

VANILLA = {"ssm_ratio": 2.0, "d_state": 16, "gate": True, "conv_bias": True}
VARIANTS = {
    "v05_noz": {},
    "v05_noz, wide": {"ssm_ratio": 2.0},
    "vanilla": VANILLA,
    "nozact": VANILLA | {"gate_activation": None, "d_state": 2},
    "oact": {"gate": True, "out_activation": "gelu"},
    "without convolution and norm": {"d_conv": 0, "out_norm": None, "d_state": 3},
    "5 x 5": {"d_conv": 5, "dt_rank": 3},
    "two": {"directions": 2},
    "one": {"directions": 1},
    "columns only": {"directions": ["columns-back", "columns"]},
}


def maps(mixer, x, h, w):
    return mixer(x, seq=Seq.from_grid((h, w), len(x), h * w))


def random(mixer, seed=0):
    """No parameter at a value that hides its use."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return mixer


# there and back of an (b, d, h, w) map, as copies of it
COPIES = {
    "rows": (lambda m: m.flatten(2), lambda y, h, w: y.unflatten(2, (h, w))),
    "columns": (lambda m: m.mT.flatten(2), lambda y, h, w: y.unflatten(2, (w, h)).mT),
    "rows-back": (lambda m: m.flatten(2).flip(-1), lambda y, h, w: y.flip(-1).unflatten(2, (h, w))),
    "columns-back": (lambda m: m.mT.flatten(2).flip(-1), lambda y, h, w: y.flip(-1).unflatten(2, (w, h)).mT),
}


def vmamba(o, p, x, h, w):
    """The published formulas, channels first, of options, parameters by name and (b, h w, d)."""
    u, z = F.linear(x, p["in_proj.weight"]), None
    if o.gate:
        u, z = u.chunk(2, dim=-1)
        z = F.silu(z) if o.gate_activation else z
    d, n, r = o.d_inner, o.d_state, o.dt_rank
    u = u.mT.unflatten(2, (h, w))
    if o.d_conv:
        u = F.conv2d(u, p["conv2d.weight"], p.get("conv2d.bias"), padding=(o.d_conv - 1) // 2, groups=d)
    u, total = F.silu(u), 0.0
    for k, name in enumerate(o.directions):
        there, back = COPIES[name]
        s = there(u)  # (b, d, l)
        dt, B, C = torch.einsum("bdl,cd->bcl", s, p["x_proj_weight"][k]).split([r, n, n], 1)
        dt = F.softplus(torch.einsum("brl,dr->bdl", dt, p["dt_projs_weight"][k]) + p["dt_projs_bias"][k][:, None])
        A, D = -torch.exp(p["A_logs"][k * d : (k + 1) * d]), p["Ds"][k * d : (k + 1) * d]
        state, ys = s.new_zeros(len(x), d, n), []
        for t in range(h * w):
            step = dt[:, :, t, None]
            state = torch.exp(step * A) * state + step * B[:, None, :, t] * s[:, :, t, None]
            ys.append((state * C[:, None, :, t]).sum(-1) + D * s[:, :, t])
        total = total + back(torch.stack(ys, -1), h, w)
    y = total.flatten(2).mT
    if "out_norm.weight" in p:
        y = F.layer_norm(y, (d,), p["out_norm.weight"], p["out_norm.bias"])
    y = F.gelu(y) if o.out_activation else y
    return F.linear(y if z is None else y * z, p["out_proj.weight"])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("h", "w"), [(5, 7), (1, 6), (6, 1), (4, 4)])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_are_vmambas(options, h, w, backend, monkeypatch):
    monkeypatch.setenv("HYBRIDZOO_BACKEND", backend)
    monkeypatch.setitem(blocks.BLOCK, "cpu", 1)
    mixer = random(SS2D(12, dtype=torch.float64, **options))
    x = torch.randn(2, h * w, 12, dtype=torch.float64, requires_grad=True)
    names, leaves = zip(*mixer.named_parameters(), strict=True)
    y, want = maps(mixer, x, h, w), vmamba(mixer, dict(zip(names, leaves, strict=True)), x, h, w)
    torch.testing.assert_close(y, want, atol=1e-10, rtol=1e-10)
    weight = torch.randn_like(y)
    got, wanted = (torch.autograd.grad((m * weight).sum(), [x, *leaves]) for m in (y, want))
    for name, a, b in zip(("x", *names), got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    "options",
    [{}, VANILLA, {"directions": ["columns-back", "rows"], "d_state": 4}, {"directions": ["window2-columns", "rows"]}],
)
def test_our_cuda_kernels_walk_the_same_way(options, emulated, monkeypatch):
    h, w = 3, 5
    mixer = random(SS2D(16, **options))
    x = torch.randn(2, h * w, 16, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    want = maps(mixer, x, h, w)
    wanted = torch.autograd.grad(want.sin().sum(), leaves)
    # as on a GPU
    for op in ("selective_scan", "paths"):
        able = dataclasses.replace(dispatch.TABLES[op]["cuda"], refuse=lambda facts: None)
        monkeypatch.setitem(dispatch.TABLES[op], "cuda", able)
    assert dispatch.choose("selective_scan", device="cpu").name == "cuda"
    got = maps(mixer, x, h, w)
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got.sin().sum(), leaves), wanted, atol=1e-4, rtol=1e-4)


def exchanged(mixer, pairs, turn):
    """A twin with its directions' weights exchanged, and its filters turned."""
    twin = SS2D(12, d_state=3, gate=True, dtype=torch.float64)
    state = mixer.state_dict()
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
        state[name] = state[name][pairs]
    for name in ("A_logs", "Ds"):
        state[name] = state[name].unflatten(0, (4, -1))[pairs].flatten(0, 1)
    state["conv2d.weight"] = turn(state["conv2d.weight"])
    twin.load_state_dict(state)
    return twin


def test_a_transposed_image_exchanges_rows_and_columns_and_half_a_turn_there_and_back():
    h, w = 5, 8
    mixer = random(SS2D(12, d_state=3, gate=True, dtype=torch.float64))
    x = torch.randn(2, h, w, 12, dtype=torch.float64)
    y = maps(mixer, x.flatten(1, 2), h, w).unflatten(1, (h, w))
    turned = exchanged(mixer, [1, 0, 3, 2], lambda f: f.mT)
    got = maps(turned, x.transpose(1, 2).flatten(1, 2), w, h).unflatten(1, (w, h)).transpose(1, 2)
    torch.testing.assert_close(got, y, atol=1e-12, rtol=1e-12)
    half = exchanged(mixer, [2, 3, 0, 1], lambda f: f.flip(2, 3))
    got = maps(half, x.flip(1, 2).flatten(1, 2), h, w).unflatten(1, (h, w)).flip(1, 2)
    torch.testing.assert_close(got, y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("options", "vanilla"), [({}, False), ({"ssm_ratio": 2.0}, False), (VANILLA, True)])
@pytest.mark.parametrize("d", [96, 128, 768])
def test_shapes_and_numbers_are_the_published_ones(options, vanilla, d):
    with torch.device("meta"):
        mixer = SS2D(d, **options)
    D, N, R = mixer.d_inner, mixer.d_state, math.ceil(d / 16)
    shapes = {
        "in_proj.weight": (2 * D if vanilla else D, d),
        "conv2d.weight": (D, 1, 3, 3),
        "conv2d.bias": (D,),
        "x_proj_weight": (4, R + 2 * N, D),
        "dt_projs_weight": (4, D, R),
        "dt_projs_bias": (4, D),
        "A_logs": (4 * D, N),
        "Ds": (4 * D,),
        "out_norm.weight": (D,),
        "out_norm.bias": (D,),
        "out_proj.weight": (d, D),
    }
    if not vanilla:
        del shapes["conv2d.bias"]
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == shapes
    block = (2 if vanilla else 1) * d * D + 9 * D + D * vanilla + 4 * (R + 2 * N) * D + 4 * D * R + 8 * D + 4 * D * N
    assert sum(p.numel() for p in mixer.parameters()) == block + 2 * D + D * d
    # MACs of the projections and the convolution twice, and the field's count of the scan
    macs = (2 if vanilla else 1) * d * D + 9 * D + 4 * (R + 2 * N) * D + 4 * D * R + D * d
    assert mixer.flops(49) == 2 * macs + 4 * D * (9 * N + 1)


def test_initial_values():
    torch.manual_seed(0)
    mixer = SS2D(256, **VANILLA)
    assert abs(mixer.in_proj.weight.std() - 0.02) < 1e-3 and abs(mixer.out_proj.weight.std() - 0.02) < 1e-3
    assert torch.equal(-mixer.A_logs.exp()[3].round(), -torch.arange(1.0, 17)) and bool((mixer.Ds == 1).all())
    dt = F.softplus(mixer.dt_projs_bias)
    assert 1e-3 - 1e-6 < dt.min() and dt.max() < 0.1 + 1e-6 and abs(dt.log().mean() - math.log(1e-2)) < 0.1
    assert not torch.equal(mixer.dt_projs_bias[0], mixer.dt_projs_bias[1])
    for p, bound in ((mixer.dt_projs_weight, 16**-0.5), (mixer.conv2d.weight, 1 / 3), (mixer.x_proj_weight, 512**-0.5)):
        assert 0.95 * bound < p.abs().max() <= bound and abs(p.mean()) < 0.05 * bound
    assert not SS2D(16).A_logs.any()
    half = SS2D(16, dtype=torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == set(SS2D.fp32_parameters) == set(SS2D.no_decay_parameters)


@pytest.mark.parametrize("h", [1, 2, 5, 6])
@pytest.mark.parametrize("w", [1, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_windows_one_after_another(h, w, size):
    def walk(h, w):
        inside = [(i, j) for i in range(size) for j in range(size)]
        corners = [(i, j) for i in range(0, h, size) for j in range(0, w, size)]
        every = [(a + i, b + j) for a, b in corners for i, j in inside]
        return [(i, j) for i, j in every if i < h and j < w]

    names = [f"window{size}-{way}" for way in ("rows", "columns", "rows-back", "columns-back")]
    rows, columns, back, columns_back = (p.tolist() for p in paths_of(names, (h, w)))
    assert rows == [i * w + j for i, j in walk(h, w)]
    assert columns == [i * w + j for j, i in walk(w, h)]
    assert back == rows[::-1] and columns_back == columns[::-1]
    (rank,) = ranks_of(names[1:2], (h, w))
    assert [columns.index(t) for t in range(h * w)] == rank.tolist()
    plain = [r.tolist() for r in ranks_of(["rows", "columns-back"], (h, w))]
    p_1 = [(t % h) * w + t // h for t in range(h * w)]
    assert plain == [list(range(h * w)), [p_1[::-1].index(t) for t in range(h * w)]]


def test_what_each_number_of_directions_sees():
    def seen(t, **options):
        return SS2D(4, **options).reach(15, (3, 5))[t].reshape(3, 5).int().tolist()

    assert seen(6, directions=1, d_conv=0) == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert seen(6, directions=1) == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert seen(6, directions=["columns"], d_conv=0) == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert all(bool(SS2D(4, directions=k).reach(15, (3, 5)).all()) for k in (2, 4))
    with pytest.raises(ValueError, match=r"SS2D: what an output depends on is a matter of the map. Pass grid=\(h, w\)"):
        SS2D(4).reach(15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 3}, r"directions: 3 is none of 1, 2, 4. Or list the orders: 'rows'"),
        ({"directions": []}, r"directions: \[\] is neither a number nor a list of orders"),
        ({"directions": "rows"}, r"directions: 'rows' is neither a number nor a list"),
        ({"directions": True}, r"directions: True is neither a number nor a list"),
        ({"directions": ["rows", "diagonal"]}, r"directions: unknown order 'diagonal'. Known: 'rows', 'columns'"),
        ({"directions": ["window0-rows"]}, r"directions: unknown order 'window0-rows'"),
        ({"directions": [4]}, r"directions: unknown order 4"),
        ({"d_conv": 4}, r"d_conv: 4 has no middle, or nothing around it. Use 3, 5, ..., or 0"),
        ({"d_conv": 1}, r"d_conv: 1 has no middle"),
        ({"d_conv": -3}, r"d_conv: -3 has no middle"),
        ({"ssm_ratio": 1.03}, r"ssm_ratio: 1.03 \* d_model = 12.36 is no number of channels. Use 1 or 2"),
        ({"ssm_ratio": 0.0}, r"ssm_ratio: 0.0 \* d_model = 0.0 is no number of channels"),
        ({"ssm_ratio": -1.0}, r"ssm_ratio: -1.0 \* d_model = -12.0 is no number of channels"),
        ({"d_state": 0}, r"d_state: 0 is not a size"),
        ({"dt_rank": 0}, r"dt_rank: 0 is not a size"),
        ({"gate_activation": "relu"}, r"gate_activation: unknown value 'relu'. Known: 'silu', None"),
        ({"out_norm": "rmsnorm"}, r"out_norm: unknown value 'rmsnorm'. Known: 'layernorm', None"),
        ({"out_activation": "silu"}, r"out_activation: unknown value 'silu'. Known: 'gelu', None"),
        ({"out_norm_eps": 0.0}, r"out_norm_eps: 0.0 is not positive"),
        ({"dt_max": 1e-4}, r"dt_max: 0.0001 is below dt_min"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(OptionError, match=message):
        SS2D(12, **options)
    with pytest.raises(zoo.ConfigError, match=r"mixer\.[a-z_]+ \(ss2d\): "):
        build_mixer(check_mixer_options({"type": "ss2d", **options}, "mixer"), "mixer", d_model=12)


def test_options_that_agree_compute_the_same():
    def effective(**options):
        return SS2D.effective_options(check_mixer_options({"type": "ss2d", **options}, "mixer"), 96)

    four = ["rows", "columns", "rows-back", "columns-back"]
    assert effective() == effective(directions=four, dt_rank=6, dt_max=0.2, ssm_ratio=1, gate_activation=None)
    assert effective(gate=True) != effective(gate=True, gate_activation=None)
    assert effective(d_conv=0) == effective(d_conv=0, conv_bias=True) != effective()
    assert effective(directions=four[::-1]) != effective()


def test_what_is_no_map_is_refused_by_name():
    mixer, x = SS2D(8), torch.randn(1, 6, 8)
    with pytest.raises(ValueError, match=r"SS2D: mixes maps, and got rows of 6 tokens. Pass seq=Seq.from_grid"):
        mixer(x)
    with pytest.raises(ValueError, match=r"SS2D: seq describes \(1, 8\) tokens, the input has \(1, 6\)"):
        mixer(x, seq=Seq.from_grid((2, 4), 1, 8))
    grid = Seq.from_grid((2, 3), 1, 6)
    for call, capability in (
        (lambda: mixer(x, seq=Seq.from_mask(torch.tensor([[0, 1, 1, 1, 1, 1]]))), "padding"),
        (lambda: mixer(x, seq=Seq.from_cu_seqlens([0, 2, 6], 1, 6)), "packing"),
        (lambda: mixer(x, seq=grid, return_state=True), "state"),
        (lambda: mixer(x, (), grid), "state"),
    ):
        with pytest.raises(NotImplementedError, match=rf"SS2D does not support '{capability}' \(it declares: grid\)"):
            call()
    with pytest.raises(zoo.ConfigError, match=r"needs 'causal'.*SS2D does not support 'causal'"):
        zoo.build("mamba-tiny", ["mixers.mamba={type: ss2d}"])


def test_hooks_and_adapters_on_projections_are_called():
    h, w, called = 3, 4, []
    mixer = random(SS2D(12, **VANILLA))
    x = torch.randn(2, h * w, 12)
    want = maps(mixer, x, h, w)
    handles = [m.register_forward_hook(lambda m, *_: called.append(m)) for m in (mixer.in_proj, mixer.conv2d)]
    torch.testing.assert_close(maps(mixer, x, h, w), want)
    assert called == [mixer.in_proj, mixer.conv2d]
    for handle in handles:
        handle.remove()

    class Twice(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    mixer.in_proj = Twice(mixer.in_proj)
    twin = SS2D(12, **VANILLA)
    twin.load_state_dict({name.replace("base.", ""): p for name, p in mixer.state_dict().items()})
    with torch.no_grad():
        twin.in_proj.weight.mul_(2)
    torch.testing.assert_close(maps(mixer, x, h, w), maps(twin, x, h, w))


class OnImages(nn.Module):
    """As a model calls it: rows out of images, and their size with them."""

    def __init__(self, options):
        super().__init__()
        self.mixer = random(SS2D(12, **options))

    def forward(self, images):
        b, _, h, w = images.shape
        return self.mixer(images.flatten(2).mT, seq=Seq.from_grid((h, w), b, h * w))


@pytest.mark.parametrize("options", [{}, {"directions": ["window2-rows", "columns"], "gate": True}])
def test_one_graph_for_images_of_any_size_and_an_export_too(options):
    net, graphs = OnImages(options), []
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(net, (torch.randn(2, 12, 6, 10),), dynamic_shapes={"images": free}).module()

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counted)
    for b, h, w in ((2, 6, 10), (3, 5, 7), (2, 11, 4), (4, 9, 9)):
        images = torch.randn(b, 12, h, w)
        want = net(images)
        torch.testing.assert_close(exported(images), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(compiled(images), want, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("options", [{}, VANILLA])
def test_transforms_of_torch_go_through_plain_pytorch(options):
    net, images, tangent = OnImages(options), torch.randn(2, 12, 3, 4), torch.randn(2, 12, 3, 4)

    def loss(images):
        return net(images).sin().sum()

    leaf = images.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(images), want, atol=1e-5, rtol=1e-4)
    _, along = torch.func.jvp(loss, (images,), (tangent,))
    torch.testing.assert_close(along, (want * tangent).sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.func.vmap(net)(images[:, None])[:, 0], net(images), atol=1e-5, rtol=1e-5)


def measured(options, h=24, w=32, d=32):
    """Tensors of a map's size and more that a layer keeps for its backward, and those it allocates in either pass."""
    mixer, x = SS2D(d, **options), torch.randn(2, h * w, d, requires_grad=True)
    seq, whole, kept = Seq.from_grid((h, w), 2, h * w), 2 * h * w * mixer.d_inner * 4, {}

    def pack(t):
        if t.untyped_storage().nbytes() >= whole:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    def allocations(fn):
        with profile(profile_memory=True) as prof:
            out = fn()
        events = prof.profiler.kineto_results.events()
        return sum(e.name() == "[memory]" and e.nbytes() >= whole for e in events), out

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward, y = allocations(lambda: mixer(x, seq=seq))
    gy = torch.ones_like(y)
    backward, _ = allocations(lambda: torch.autograd.grad(y, [x, *mixer.parameters()], gy))
    return len(kept), forward, backward


@pytest.mark.parametrize("options", [{}, {"gate": True, "d_state": 2}], ids=["no gate", "gate"])
def test_four_directions_take_no_more_tensors_than_one(options, monkeypatch):
    monkeypatch.setitem(blocks.SWEEP, "cpu", 1)
    monkeypatch.setitem(blocks.BLOCK, "cpu", 1)
    # a low rank: what all directions read at a token is smaller than the token
    one, four = (measured(options | {"directions": k, "dt_rank": 1}) for k in (1, 4))
    assert four == one
    # kept: the input, before and behind the convolution and behind SiLU, the sum of the scans and its norm; with a gate, that before and
    # behind SiLU, and the product. Made: what each operation gives, forward and backward, once, and nothing else
    assert four == ((9, 9, 12) if options else (6, 6, 7))


def test_memory_for_the_backward_is_linear_in_the_map():
    def kept(h, w):
        mixer, x = SS2D(32, d_state=4), torch.randn(1, h * w, 32, requires_grad=True)
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            maps(mixer, x, h, w)
        weights = sum(p.numel() for p in mixer.parameters())
        return sum(s.nbytes() for s in storages.values()) / 4 - weights

    assert kept(32, 64) / kept(32, 32) == pytest.approx(2, rel=0.02)
