"""Mamba and Mamba-2 in both directions over a row, against a plain loop over time for each, Vim's formula, and separate layers on flipped rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hybridzoo as zoo
from hybridzoo.kernels import Seq
from hybridzoo.layers import Mamba, Mamba2, OptionError
from hybridzoo.layers.directions import RowConv1d
from hybridzoo.layers.turning import reordered, turning

D, MAMBA2 = 16, {"d_state": 5, "headdim": 8, "chunk_size": 4}
WAYS = [
    {"directions": 2, "tie_directions": tie, "conv_padding": padding}
    for tie in ("none", "all")
    for padding in ("causal", "same")
]
PACKED = Seq.from_documents(torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, -1], [0, 1, 1, 1, 2, 2, 2, 2, 2]]))
SPANS = [(0, 0, 5), (0, 5, 6), (0, 6, 8), (1, 0, 1), (1, 1, 4), (1, 4, 9)]


def drawn(kind, **options):
    """A layer in float64 with nothing at a value that hides its use."""
    layer = kind(D, **(MAMBA2 if kind is Mamba2 else {"d_state": 3}), **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def worst(a, b):
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


# --------------------------------------------------------------------------------------- a loop over time for each direction


def filtered(x, weight, bias, back, same):
    """The convolution of one row (l, d), tap by tap and token by token."""
    k, y = weight.shape[-1], []
    for t in range(len(x)):
        total = torch.zeros_like(x[0]) if bias is None else bias
        for j in range(k):
            # the last tap reads the token itself, the others those that this way has passed; or they stand around it
            at = t + j - (k - 1) // 2 if same else t + (k - 1 - j if back else j - k + 1)
            if 0 <= at < len(x):
                total = total + weight[:, 0, j] * x[at]
        y.append(total)
    return F.silu(torch.stack(y))


def scanned(u, dt, A, B, C, back):
    """``h = exp(dt A) h + dt B u`` and ``y = C h`` of one row, (l, d) with A (d, n), B and C (l, d, n)."""
    h, ys = torch.zeros_like(A), {}
    for t in range(len(u))[:: -1 if back else 1]:
        h = torch.exp(dt[t][:, None] * A) * h + (dt[t] * u[t])[:, None] * B[t]
        ys[t] = (h * C[t]).sum(-1)
    return torch.stack([ys[t] for t in range(len(u))])


def mamba_way(p, x, options, back):
    own = "_b" if back and options["tie_directions"] == "none" else ""
    same, r = options["conv_padding"] == "same", p[f"dt_proj{own}.weight"].shape[1]
    u, z = F.linear(x, p["in_proj.weight"], p.get("in_proj.bias")).chunk(2, -1)
    u = filtered(u, p[f"conv1d{own}.weight"], p.get(f"conv1d{own}.bias"), back, same)
    given = F.linear(u, p[f"x_proj{own}.weight"], p.get(f"x_proj{own}.bias"))
    dt, B, C = given.split([r, 3, 3], -1)
    dt = F.softplus(F.linear(dt, p[f"dt_proj{own}.weight"], p[f"dt_proj{own}.bias"])) + options.get("dt_offset", 0.0)
    A, skip = -p[f"A{own}_log"].exp(), p[f"D{own}"]
    B, C = (m[:, None].expand(-1, len(A), -1) for m in (B, C))
    return (scanned(u, dt, A, B, C, back) + skip * u) * F.silu(z)


def mamba_loop(p, x, options):
    y = mamba_way(p, x, options, False) + mamba_way(p, x, options, True)
    return F.linear(
        y / (2 if options.get("combine_directions") == "mean" else 1), p["out_proj.weight"], p.get("out_proj.bias")
    )


def mamba2_loop(p, x, options):
    h, n, same = 4, 5, options["conv_padding"] == "same"
    z, xBC, raw = F.linear(x, p["in_proj.weight"], p.get("in_proj.bias")).split([8 * h, 8 * h + 2 * n, h], -1)
    total = 0
    for back in (False, True):
        own = "_b" if back and options["tie_directions"] == "none" else ""
        u, B, C = filtered(xBC, p[f"conv1d{own}.weight"], p.get(f"conv1d{own}.bias"), back, same).split(
            [8 * h, n, n], -1
        )
        A, skip, dt = (
            m.repeat_interleave(8, -1)
            for m in (-p[f"A{own}_log"].exp(), p[f"D{own}"], F.softplus(raw + p[f"dt_bias{own}"]))
        )
        B, C = (m[:, None].expand(-1, 8 * h, -1) for m in (B, C))
        total = total + scanned(u, dt, A[:, None].expand(-1, n), B, C, back) + skip * u
    y = total / (2 if options.get("combine_directions") == "mean" else 1) * F.silu(z)
    if "norm.weight" in p:
        y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * p["norm.weight"]
    return F.linear(y, p["out_proj.weight"], p.get("out_proj.bias"))


LOOPS = {Mamba: mamba_loop, Mamba2: mamba2_loop}
EXTRAS = {
    Mamba: [
        {},
        {
            "combine_directions": "mean",
            "bias": True,
            "x_proj_bias": True,
            "dt_offset": 0.05,
            "d_conv": 3,
            "conv_bias": False,
        },
    ],
    Mamba2: [
        {},
        {"combine_directions": "mean", "bias": True, "d_conv": 3, "conv_bias": False},
        {"rmsnorm": False, "d_conv": 1},
    ],
}
JUDGED = [(kind, ways | extra) for kind in LOOPS for ways, extra in itertools.product(WAYS, EXTRAS[kind])]


def id_of(value):
    return (
        "-".join(str(v) for v in value.values()) if isinstance(value, dict) else getattr(value, "__name__", str(value))
    )


@pytest.mark.parametrize(("kind", "options"), JUDGED, ids=id_of)
def test_both_directions_are_a_loop_over_time_for_each(kind, options):
    layer = drawn(kind, **options)
    for length in (1, 2, 11):
        x = torch.randn(2, length, D, dtype=torch.float64, requires_grad=True)
        p = dict(layer.named_parameters())
        want = torch.stack([LOOPS[kind](p, row, options) for row in x])
        got, weight = layer(x), torch.randn_like(want)
        assert worst(got, want) < 1e-12
        leaves = [x, *p.values()]
        grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want)]
        for name, a, b in zip(["x", *p], *grads, strict=True):
            assert worst(a, b) < 1e-10, name


@pytest.mark.parametrize(("kind", "options"), JUDGED, ids=id_of)
def test_documents_of_a_row_and_their_gradients_are_those_of_the_loop(kind, options):
    layer, x = drawn(kind, **options), torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    p, weight = dict(layer.named_parameters()), torch.randn(2, 9, D, dtype=torch.float64)
    got = layer(x, seq=PACKED)
    want = torch.zeros_like(got)
    for row, start, end in SPANS:
        want[row, start:end] = LOOPS[kind](p, x[row, start:end], options)
    assert worst(got, want) < 1e-12
    grads = [torch.autograd.grad((y * weight).sum(), [x, *p.values()]) for y in (got, want)]
    for name, a, b in zip(["x", *p], *grads, strict=True):
        assert worst(a, b) < 1e-10, name


@pytest.mark.parametrize(("kind", "options"), JUDGED, ids=id_of)
def test_padded_rows_and_their_gradients_are_those_of_the_loop(kind, options):
    layer, lengths = drawn(kind, **options), [9, 4, 1]
    seq = Seq.from_mask(torch.arange(9) < torch.tensor(lengths)[:, None])
    x = torch.randn(3, 9, D, dtype=torch.float64, requires_grad=True)
    p, weight = dict(layer.named_parameters()), torch.randn(3, 9, D, dtype=torch.float64)
    # what stands at padding does not count, be it NaN
    got = layer(torch.where(seq.valid[..., None], x, float("nan")), seq=seq)
    want = torch.zeros_like(got)
    for row, length in enumerate(lengths):
        want[row, :length] = LOOPS[kind](p, x[row, :length], options)
    assert worst(got, want) < 1e-12
    grads = [torch.autograd.grad((y * weight).sum(), [x, *p.values()]) for y in (got, want)]
    for name, a, b in zip(["x", *p], *grads, strict=True):
        assert worst(a, b) < 1e-10, name


# ------------------------------------------------------------------------------------------ layers that are published so


def one_way(kind, layer, own, **options):
    """A layer in one direction, of a part of the weights."""
    single = drawn(kind, **options)
    weights = {}
    for name in single.state_dict():
        first, dot, rest = name.partition(".")
        twin = "A_b_log" if name == "A_log" else f"{first}_b{dot}{rest}"
        weights[name] = layer.state_dict()[twin if own and twin in layer.state_dict() else name]
    single.load_state_dict(weights)
    return single


@pytest.mark.parametrize("tie", ["none", "all"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(Mamba, {}), (Mamba, {"bcdt_norm": True, "d_state": 3}), (Mamba2, {"rmsnorm": False})],
    ids=id_of,
)
def test_two_layers_one_of_them_on_flipped_rows(kind, options, tie):
    options = {name: value for name, value in options.items() if name != "d_state"}
    layer = drawn(kind, directions=2, tie_directions=tie, combine_directions="mean", **options)
    there, back = (one_way(kind, layer, own, **options) for own in (False, True))
    x = torch.randn(3, 13, D, dtype=torch.float64)
    # Vim's "bimamba v2" with "div2": the sum of both, halved, in front of the projection that they share
    assert worst(layer(x), (there(x) + back(x.flip(1)).flip(1)) / 2) < 1e-12


def test_names_and_shapes_are_vims():
    layer = Mamba(192, directions=2, combine_directions="mean")
    own = {
        "conv1d": (384, 1, 4), "x_proj": (44, 384), "dt_proj": (384, 12),
    }  # fmt: skip
    keys = {"in_proj.weight": (768, 192), "out_proj.weight": (192, 384)}
    for end in ("", "_b"):
        keys |= {f"{name}{end}.weight": shape for name, shape in own.items()}
        keys |= {f"conv1d{end}.bias": (384,), f"dt_proj{end}.bias": (384,), f"A{end}_log": (384, 16), f"D{end}": (384,)}
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == keys
    # Vim-Ti: 24 of them with a norm each, and what is around them (arXiv:2401.09417; the count is of the published file)
    blocks = 24 * (sum(p.numel() for p in layer.parameters()) + 192)
    assert blocks + (3 * 256 + 1) * 192 + (197 + 1) * 192 + 192 + 193 * 1000 == 7_148_008


def test_one_set_of_parameters_is_that_of_one_direction():
    for kind, options in ((Mamba, {"d_state": 3}), (Mamba2, MAMBA2)):
        names = [kind(D, directions=n, tie_directions="all", **options).state_dict().keys() for n in (1, 2)]
        assert names[0] == names[1]


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_a_way_back_starts_like_a_way_there_and_is_pinned_like_it(kind):
    layer = (kind(D, d_state=4, directions=2) if kind is Mamba else kind(D, directions=2, **MAMBA2)).bfloat16()
    pinned = {name for name, p in layer.named_parameters() if p.dtype == torch.float32}
    assert pinned == set(layer.fp32_parameters) == set(layer.no_decay_parameters) and len(pinned) == 6
    assert {"A_b_log", "D_b"} <= pinned and (layer.D_b == 1).all()
    decayed, _ = zoo.param_groups(layer)
    assert not {id(layer.get_parameter(name)) for name in pinned} & {id(p) for p in decayed["params"]}
    if kind is Mamba:
        assert torch.equal(layer.A_b_log, layer.A_log) and not torch.equal(layer.dt_proj_b.bias, layer.dt_proj.bias)
    else:
        assert (
            0 <= layer.A_b_log.min() and layer.A_b_log.max() <= 2.78 and not torch.equal(layer.dt_bias_b, layer.dt_bias)
        )
    assert not kind(D, headdim=8).fp32_parameters[3:] if kind is Mamba2 else not kind(D).fp32_parameters[3:]


# ---------------------------------------------------------------------------------------------------- what it is made of


def test_turning_turns_every_document_in_its_place():
    x = torch.arange(18.0).view(2, 9, 1)
    turned = turning(PACKED)(x)[..., 0].tolist()
    assert turned == [[4, 3, 2, 1, 0, 5, 7, 6, 8], [9, 12, 11, 10, 17, 16, 15, 14, 13]]
    assert torch.equal(turning(PACKED)(turning(PACKED)(x)), x) and torch.equal(turning(None)(x), x.flip(1))
    padded = Seq.from_mask(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert turning(padded)(torch.arange(12.0).view(3, 4, 1))[..., 0].tolist() == [
        [2, 1, 0, 3],
        [7, 6, 5, 4],
        [8, 9, 10, 11],
    ]
    assert turning(Seq.from_documents(torch.zeros(2, 0, dtype=torch.long)))(torch.ones(2, 0, 3)).shape == (2, 0, 3)


def test_orders_and_their_gradients_are_those_of_indexing():
    x, weight = torch.randn(2, 2, 9, 3, dtype=torch.float64)
    x.requires_grad_()
    rows = torch.stack([torch.randperm(9) for _ in range(2)])
    for order in (rows[0], rows):
        index = order.expand(2, 9)[..., None].expand_as(x)
        got, want = reordered(x, order, order.argsort(-1)), torch.gather(x, 1, index)
        assert torch.equal(got, want)
        (a,), (b,) = (torch.autograd.grad((y * weight).sum(), x) for y in (got, want))
        assert torch.equal(a, b)
        torch.autograd.gradgradcheck(lambda x: reordered(x.sin(), order, order.argsort(-1)).sin(), x)  # noqa: B023
        _, tangent = torch.func.jvp(lambda x: reordered(x, order, order.argsort(-1)), (x.detach(),), (weight,))  # noqa: B023
        assert torch.equal(tangent, weight.gather(1, index))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_the_filter_is_torchs_convolution_with_other_padding(k, same, mirrored):
    conv = RowConv1d(6, k, True, same).double()
    conv.reset_parameters()
    before = (k - 1) // 2 if same else k - 1
    weight, sides = conv.weight, (before, k - 1 - before)
    if mirrored:
        weight, sides = weight.flip(-1), sides[::-1]

    def plain(x):
        return F.silu(F.conv1d(F.pad(x.mT, sides), weight, conv.bias, groups=6)).mT

    x = torch.randn(2, 9, 6, dtype=torch.float64)
    assert worst(conv(x, mirrored=mirrored), plain(x)) < 1e-14
    packed = conv(x, PACKED, mirrored=mirrored)
    for row, start, end in SPANS:
        assert worst(packed[row : row + 1, start:end], plain(x[row : row + 1, start:end])) < 1e-14


class Moved(TorchDispatchMode):
    """The sizes of everything that is flipped, gathered or scattered."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("flip", "roll", "index", "gather", "scatter")):
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", ["causal", "same"])
@pytest.mark.parametrize("tie", ["none", "all"])
def test_mambas_rows_are_read_from_the_end_where_they_are(tie, padding):
    layer = Mamba(D, d_state=2, directions=2, tie_directions=tie, conv_padding=padding)
    x = torch.randn(2, 70, D, requires_grad=True)
    with Moved() as moved:
        layer(x).sum().backward()
    # filters are, at most
    assert all(size <= layer.conv1d.weight.numel() for size in moved.sizes)


@pytest.mark.parametrize("options", [{}, {"bcdt_norm": True}], ids=id_of)
def test_backends_agree(options, monkeypatch):
    layer, x = Mamba(D, d_state=3, directions=2, **options).double(), torch.randn(2, 40, D, dtype=torch.float64)
    results = []
    for backend in ("chunked", "reference"):
        monkeypatch.setenv("HYBRIDZOO_BACKEND", backend)
        results.append(layer(x))
    assert worst(*results) < 1e-12


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
@pytest.mark.parametrize("ways", WAYS, ids=id_of)
def test_compiled_in_one_graph(kind, ways):
    layer = drawn(kind, **ways)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    for seq in (None, PACKED, Seq.from_mask(torch.tensor([[1] * 9, [1] * 4 + [0] * 5]))):
        grads = [torch.autograd.grad(run(x, seq=seq).square().sum(), x)[0] for run in (layer, compiled)]
        assert worst(grads[1], grads[0]) < 1e-12


def test_nothing_of_a_document_that_is_not_finite_gets_into_another():
    seq, x = Seq.from_cu_seqlens([0, 13, 30, 44], 1, 44), torch.randn(1, 44, D, dtype=torch.float64)
    others = [*range(13), *range(30, 44)]
    for kind, ways in itertools.product((Mamba, Mamba2), WAYS):
        layer = drawn(kind, **ways)
        want = layer(x, seq=seq)[:, others]
        for value, at in ((float("nan"), 20), (float("inf"), 13), (-float("inf"), 29)):
            damaged = x.clone()
            damaged[0, at, 0] = value
            damaged.requires_grad_()
            y = layer(damaged, seq=seq)[:, others]
            (grad,) = torch.autograd.grad(y.square().sum(), damaged)
            assert torch.equal(y, want) and grad[:, others].isfinite().all()


# ------------------------------------------------------------------------------------------------- what surrounds a layer


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_every_part_is_called_as_the_module_that_it_is(kind):
    layer = drawn(kind, directions=2, **({"bcdt_norm": True} if kind is Mamba else {}))
    calls = []
    for name, part in layer.named_children():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    layer(torch.randn(1, 5, D, dtype=torch.float64))
    assert sorted(calls) == sorted(name for name, _ in layer.named_children())


@pytest.mark.parametrize(
    "layer", [Mamba(32, directions=2), Mamba2(32, headdim=16, directions=2), Mamba(32, reverse_complement=True)]
)
def test_lora_on_any_projection_learns(layer):
    peft = pytest.importorskip("peft")
    linears = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
    model = peft.get_peft_model(layer, peft.LoraConfig(target_modules=linears, init_lora_weights=False))
    model(torch.randn(2, 5, 32)).square().sum().backward()
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert len(adapters) >= 2 * len(linears) and all(p.grad is not None and p.grad.any() for p in adapters)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_there_is_no_state_and_who_asks_is_told_which_option_it_was(kind):
    layer = kind(32, headdim=16, directions=2) if kind is Mamba2 else kind(32, directions=2)
    x, none = torch.randn(1, 3, 32), layer.init_state(1, 3)
    assert none == () and layer.state_bytes(100) == 0 and layer.capabilities == {"packing", "padding"}
    for ask in (lambda: layer(x, return_state=True), lambda: layer(x, none), lambda: layer.step(x[:, 0], none)):
        with pytest.raises(NotImplementedError, match=rf"{kind.__name__} with directions: 2 .* Use directions: 1"):
            ask()
    strands = kind(32, reverse_complement=True, **({"headdim": 8} if kind is Mamba2 else {}))
    with pytest.raises(NotImplementedError, match="with reverse_complement"):
        strands(x, return_state=True)


def test_a_causal_language_model_refuses_both_directions():
    with pytest.raises(
        zoo.ConfigError,
        match=r"mixers.mamba \(mamba\).*causal language model needs 'causal'.*directions: 2.*Use directions: 1",
    ):
        zoo.config("jamba-tiny", ["mixers.mamba.directions=2"])


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"directions": 3}, "directions", "unknown value 3. Known: 1, 2"),
        ({"directions": 2, "tie_directions": "some"}, "tie_directions", "Known: 'none', 'all'"),
        ({"directions": 2, "combine_directions": "product"}, "combine_directions", "Known: 'sum', 'mean'"),
        ({"directions": 2, "conv_padding": "valid"}, "conv_padding", "Known: 'causal', 'same'"),
        ({"conv_padding": "same"}, "conv_padding", "takes directions: 2"),
        ({"d_model": 33, "reverse_complement": True}, "reverse_complement", "d_model = 33 is odd"),
    ],
)
@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_options_that_cannot_work_are_named(kind, options, field, message):
    with pytest.raises(OptionError) as e:
        kind(**{"d_model": 32} | options)
    assert e.value.field == field and message in e.value.message


def test_an_offset_of_step_sizes_is_not_negative():
    with pytest.raises(OptionError, match=r"dt_offset: -0\.1 is negative"):
        Mamba(32, dt_offset=-0.1)


def test_options_without_an_effect_are_none():
    for kind, rest in ((Mamba, {}), (Mamba2, {})):
        options = zoo.zoo.registry.check_mixer_options({"type": kind.__name__.lower(), **rest}, "mixer")
        effective = kind.effective_options(options, 32)
        assert effective["tie_directions"] is effective["combine_directions"] is None
        effective = kind.effective_options(options | {"directions": 2}, 32)
        assert (effective["tie_directions"], effective["combine_directions"]) == ("none", "sum")
