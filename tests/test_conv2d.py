"""The gated convolution against a plain loop over pixels in float64, and timm's block where timm is installed."""

import pytest
import torch
from torch import nn

from hybridzoo.kernels import Seq
from hybridzoo.layers import GatedConv2d
from hybridzoo.layers.conv2d import around

ACTIVATIONS = {"gelu": nn.functional.gelu, "silu": nn.functional.silu}
VARIANTS = {
    "mambaout": {"kernel_size": 7},
    "some channels": {"kernel_size": 3, "conv_ratio": 0.5},
    "all channels": {"kernel_size": 5, "expand": 2.0, "conv_ratio": 2.0, "activation": "silu", "bias": False},
}


def maps(mixer, x, h, w):
    return mixer(x, seq=Seq.from_grid((h, w), len(x), h * w))


def random(mixer):
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=0.5)
    return mixer


def loop(mixer, x, h, w):
    """Every pixel of (b, h * w, d) by itself, from the published formulas."""
    p, k, inner, conv = dict(mixer.named_parameters()), mixer.kernel_size, mixer.d_inner, mixer.d_conv
    zero = x.new_zeros(())
    z = x @ p["in_proj.weight"].t() + p.get("in_proj.bias", zero)
    gate, rest, c = z[..., :inner], z[..., inner : 2 * inner - conv], z[..., 2 * inner - conv :]
    out = []
    for row in range(h):
        for column in range(w):
            y = p.get("conv2d.bias", zero).expand(len(x), conv)
            for i in range(k):
                for j in range(k):
                    r, s = row + i - k // 2, column + j - k // 2
                    if 0 <= r < h and 0 <= s < w:
                        y = y + p["conv2d.weight"][:, 0, i, j] * c[:, r * w + s]
            out.append(y)
    value = torch.cat([rest, torch.stack(out, 1)], -1)
    return ACTIVATIONS[mixer.activation](gate) * value @ p["out_proj.weight"].t() + p.get("out_proj.bias", zero)


@pytest.mark.parametrize(("h", "w"), [(5, 7), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_equal_a_loop_over_pixels(options, h, w):
    mixer = random(GatedConv2d(12, dtype=torch.float64, **options))
    x = torch.randn(2, h * w, 12, dtype=torch.float64, requires_grad=True)
    y, want = maps(mixer, x, h, w), loop(mixer, x, h, w)
    torch.testing.assert_close(y, want, atol=1e-11, rtol=1e-11)
    leaves, weight = [x, *mixer.parameters()], torch.randn_like(y)
    for got, ref in zip(*(torch.autograd.grad((m * weight).sum(), leaves) for m in (y, want)), strict=True):
        torch.testing.assert_close(got, ref, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{"kernel_size": 7}, {"kernel_size": 3, "conv_ratio": 0.3, "expand": 1.9}], ids=str)
@pytest.mark.parametrize("d", [16, 96, 100])
def test_it_is_timms_block_of_mambaout(d, options):
    timm = pytest.importorskip("timm.models.mambaout")
    names = {"expand": "expansion_ratio"}
    theirs = timm.GatedConvBlock(d, norm_layer=nn.Identity, **{names.get(k, k): v for k, v in options.items()}).double()
    ours = random(GatedConv2d(d, dtype=torch.float64, **options))
    renamed = {"in_proj": "fc1", "conv2d": "conv", "out_proj": "fc2"}
    weights = {name.split(".")[0]: name for name in ours.state_dict()}
    assert set(weights) == set(renamed)
    theirs.load_state_dict(
        {f"{renamed[name.split('.')[0]]}.{name.split('.')[1]}": w for name, w in ours.state_dict().items()}
    )
    x = torch.randn(2, 5 * 9, d, dtype=torch.float64)
    want = theirs(x.unflatten(1, (5, 9))).flatten(1, 2) - x
    torch.testing.assert_close(maps(ours, x, 5, 9), want, atol=1e-11, rtol=1e-11)


def test_what_it_cannot_do_is_refused():
    mixer, x = GatedConv2d(16, kernel_size=3), torch.randn(1, 6, 16)
    with pytest.raises(
        ValueError, match=r"GatedConv2d: mixes maps, and got rows of 6 tokens\. Pass seq=Seq\.from_grid"
    ):
        mixer(x)
    for seq in (Seq.from_cu_seqlens([0, 2, 6], 1, 6), Seq.from_mask(torch.tensor([[1] * 5 + [0]]))):
        with pytest.raises(NotImplementedError, match=r"GatedConv2d does not support 'pack|padd"):
            mixer(x, seq=seq)
    with pytest.raises(ValueError, match=r"Pass grid=\(h, w\)"):
        mixer.reach(6)


def test_reach_is_what_the_filter_reads():
    assert around(3, (2, 3)).int().tolist()[0] == [1, 1, 0, 1, 1, 0]
    assert torch.equal(GatedConv2d(8, kernel_size=5).reach(12, (3, 4)), around(5, (3, 4)))


def test_projections_begin_as_those_of_vision_models_and_of_mamba():
    mixer = GatedConv2d(256, n_layer=16)
    for layer in (mixer.in_proj, mixer.out_proj):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and not layer.bias.any()
    assert mixer.conv2d.weight.abs().max().item() == pytest.approx(1 / 7, rel=0.01)
    small = GatedConv2d(256, n_layer=16, init_std=None).out_proj.weight
    assert small.abs().max().item() == pytest.approx(small.shape[1] ** -0.5 / 4, rel=0.01)
