"""Image models: stages from a config, against the published sizes, a plain re-statement of the parts, and what a user does with them."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hybridzoo as zoo
from hybridzoo.kernels.seq import Seq
from hybridzoo.layers.patches import Downsample, Stem, to_image, to_tokens
from hybridzoo.zoo.models.block import Stream
from hybridzoo.zoo.models.features import FeatureMaps
from hybridzoo.zoo.models.macs import macs
from hybridzoo.zoo.models.redraw import redraw
from hybridzoo.zoo.models.stats import stats
from hybridzoo.zoo.registry import ConfigError

# parameters with a head of 1,000 classes, and the README's GMACs at 224 pixels (MzeroMiko/VMamba)
PUBLISHED = {
    "vanilla-vmamba-tiny": (22_893_448, 5.63), "vanilla-vmamba-small": (44_417_416, 11.23), "vanilla-vmamba-base": (76_254_056, 18.02),
    "vmamba-tiny-s2l5": (30_705_832, 4.85), "vmamba-small-s2l15": (50_147_752, 8.71), "vmamba-base-s2l15": (88_557_800, 15.35),
    "vmamba-tiny-s1l8": (30_249_064, 4.90), "vmamba-small-s1l20": (49_012_840, 8.61), "vmamba-base-s1l20": (86_614_504, 15.21),
}  # fmt: skip
MICRO = {
    "task": "image_classification", "n_classes": 5, "in_channels": 3, "image_size": 16, "d_model": 8,
    "stages": [{"layers": "ss2d mlp"}, {"layers": "(ss2d mlp) * 2"}, {"layers": "ss2d"}],
    "mixers": {"ss2d": {}, "mlp": {"expand": 2, "gated": False, "activation": "gelu", "bias": True}},
}  # fmt: skip


def micro(*overrides, **changes):
    torch.manual_seed(0)
    return zoo.build(MICRO, list(overrides), **changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_as_published(name):
    model = zoo.build(name, device="meta")
    params, gmac = PUBLISHED[name]
    assert model.num_params() == params == stats(model).params
    # fvcore's counts, of which the README keeps two digits
    assert macs(model).total / 1e9 == pytest.approx(gmac, rel=2e-3)


def test_every_vision_config_is_listed_by_its_task():
    assert set(PUBLISHED) <= set(zoo.list_models("v*", "image_classification")) <= set(zoo.list_models())
    assert not set(PUBLISHED) & set(zoo.list_models(task="causal_lm"))
    with pytest.raises(ValueError, match=r"unknown task\. Known: causal_lm, image"):
        zoo.list_models(task="vision")


def restated(model, x):
    """The published structure from the model's own parts, in the words of the reference: pre-norm blocks, maps between them."""
    grid, y = None, None
    stem = model.backbone.embedding
    y = F.gelu(stem.norm1(stem.conv1(x).permute(0, 2, 3, 1)))
    y = stem.norm2(stem.conv2(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    features = []
    for spec, block in zip(model.specs, model.backbone.layers, strict=True):
        if spec.stage > len(features):
            features.append(y)
            part = model.backbone.downsample[spec.stage - 1]
            y = part.norm(part.proj(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        grid = y.shape[1:3]
        rows = block.norm(y).flatten(1, 2)
        seq = Seq.from_grid(tuple(grid), *rows.shape[:2])
        y = y + block.mixer(rows, seq=seq).unflatten(1, grid)
    features.append(y)
    return model.head(model.backbone.norm_f(y).mean((1, 2))), features


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (5, 9), (1, 1), (4, 40)])
def test_logits_maps_and_gradients_are_the_published_structures(size):
    model = micro(dtype=torch.float64).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 4])
    out = model(x, labels)
    want, features = restated(model, x)
    torch.testing.assert_close(out.logits, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.loss, F.cross_entropy(want, labels).to(out.loss.dtype), rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(out.logits.square().sum(), [x, *model.parameters()])
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), [x, *model.parameters()]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    maps = model.forward_features(x, return_stages=True)
    for one, feature, d, stride in zip(
        maps, features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        torch.testing.assert_close(one, feature.permute(0, 3, 1, 2), rtol=1e-10, atol=1e-10)
        assert one.shape == (2, d, *(math.ceil(side / stride) for side in size))
        assert one.is_contiguous(memory_format=torch.channels_last) or min(one.shape[2:]) == 1
    last = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(last), want, rtol=1e-10, atol=1e-10)
    assert model.forward_head(last, pre_logits=True).shape == (2, 32)


def test_the_stem_and_what_makes_maps_smaller_are_torchs():
    x = torch.randn(2, 3, 14, 10)
    for patch, want in ((1, (14, 10)), (2, (7, 5)), (4, (4, 3))):
        stem = Stem(3, 8, "conv", patch)
        y, grid = stem(x)
        assert grid == want == stem.grid(14, 10) and y.shape == (2, want[0] * want[1], 8)
    stem = Stem(3, 8, "patch", 4, None, "middle", (3, 2))
    y, grid = stem(x)
    patches = F.conv2d(x, stem.proj.weight, stem.proj.bias, 4).flatten(2).mT
    want = torch.cat([patches[:, :3], stem.class_token.expand(2, -1, -1), patches[:, 3:]], 1) + stem.pos_embed
    torch.testing.assert_close(y, want)
    assert grid == (3, 2) and stem.index(6) == 3
    # of another size: the positions of pixels are interpolated, the class token's is kept
    y, grid = stem(torch.zeros(1, 3, 8, 24))
    moved = torch.cat([stem.pos_embed[:, :3], stem.pos_embed[:, 4:]], 1).unflatten(1, (3, 2)).permute(0, 3, 1, 2)
    moved = F.interpolate(moved, (2, 6), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(y[:, 6], (stem.class_token + stem.pos_embed[:, 3:4])[:, 0])
    torch.testing.assert_close(y[:, [0, 1, 7]] - stem.proj.bias, moved[:, [0, 1, 6]])
    tokens = torch.randn(2, 5 * 3, 4)
    image = to_image(tokens, (5, 3))
    assert torch.equal(to_tokens(image)[0], tokens) and image.data_ptr() == tokens.data_ptr()
    for kind, want in (("conv", (3, 2)), ("conv2", (3, 2)), ("merge", (3, 2))):
        y, grid = Downsample(4, 8, kind)(tokens, (5, 3))
        assert grid == want and y.shape == (2, 6, 8)
    part = Downsample(4, 8, "merge")
    padded = F.pad(image, (0, 1, 0, 1))
    parts = [padded[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]  # Swin's order
    want = part.proj(part.norm(torch.cat(parts, 1).permute(0, 2, 3, 1))).flatten(1, 2)
    torch.testing.assert_close(part(tokens, (5, 3))[0], want)


def test_overrides_reach_the_network():
    model = zoo.build(
        "vmamba-tiny-s1l8", ["n_classes=10", "in_channels=1", "image_size=28", "drop_path=0.4"], device="meta"
    )
    assert model.head.out_features == 10 and model.backbone.embedding.conv1.in_channels == 1
    assert model.backbone.layers[-1].drop == pytest.approx(0.4) and model.usual_size == 28
    narrow = zoo.build(
        "vmamba-tiny-s1l8", ["d_model=32", "stages.2.layers=ss2d", "stages[3].d_model=200"], device="meta"
    )
    assert narrow.widths == [32, 64, 128, 200] and len(narrow.specs) == 4 + 4 + 1 + 4
    assert zoo.config("vmamba-tiny-s1l8", d_model=48).stages == zoo.config("vmamba-tiny-s1l8").stages


def test_depth_is_dropped_as_the_reference_drops_it():
    model = zoo.build("vmamba-tiny-s1l8", device="meta")
    want = np.linspace(0, 0.2, 14)  # by block of the reference, whose scan and MLP have the same rate
    assert [block.drop for block in model.backbone.layers] == pytest.approx([rate for rate in want for _ in "ab"])
    model = micro("drop_path=0.9").train()
    x = torch.randn(64, 3, 8, 8)
    assert not torch.equal(model(x).logits, model(x).logits)
    assert torch.equal(model.eval()(x).logits, model(x).logits)
    block = model.train().backbone.layers[-1]
    rows = torch.randn(4096, 1, 32)
    added = block.mixer(block.norm(rows), seq=Seq.from_grid((1, 1), 4096, 1))
    stream = block._written(Stream(rows), rows, added, None)
    share = (stream.add.abs().sum((1, 2)) == 0).float().mean()
    assert share == pytest.approx(0.9, abs=0.03)
    kept = stream.add.abs().sum((1, 2)) > 0
    torch.testing.assert_close(stream.add[kept], added[kept] / (1 - 0.9), rtol=1e-4, atol=1e-5)


def test_a_head_is_replaced_and_removed():
    model = micro()
    body = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("head")}
    model.reset_head(3, ["a", "b", "c"])
    assert model.head.weight.shape == (3, 32) and model.cfg.n_classes == 3 and list(model.cfg.labels) == ["a", "b", "c"]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in body.items())
    x = torch.randn(2, 3, 16, 16)
    model.reset_head(0)
    assert torch.equal(model(x).logits, model.forward_head(model.forward_features(x))) and model(x).logits.shape == (
        2,
        32,
    )
    with pytest.raises(ValueError, match=r"labels: the model has no head \(n_classes = 0\)\. Call reset_head"):
        model(x, torch.tensor([0, 1]))
    assert zoo.build(MICRO, n_classes=0).num_params() == sum(p.numel() for p in body.values())
    with pytest.raises(ConfigError, match="n_classes: is -1, outside 0"):
        model.reset_head(-1)
    with pytest.raises(ConfigError, match=r"labels: names 1 classes, and n_classes is 2"):
        model.reset_head(2, ["a"])


def test_losses_are_torchs():
    model = micro()
    x, hard = torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 2])
    soft = torch.rand(3, 5).softmax(1)
    logits = model(x).logits
    torch.testing.assert_close(model(x, hard).loss, F.cross_entropy(logits, hard))
    torch.testing.assert_close(model(x, soft).loss, F.cross_entropy(logits, soft))
    smoothed = model(x, hard, label_smoothing=0.1).loss
    torch.testing.assert_close(smoothed, F.cross_entropy(logits, hard, label_smoothing=0.1))
    parts = sum(model(x[i : i + 1], hard[i : i + 1], num_items=3).loss for i in range(3))
    torch.testing.assert_close(parts, model(x, hard).loss)


def test_experts_have_their_losses():
    model = micro(
        "mixers.mlp=null",
        mixers={"mlp": {"type": "moe", "d_intermediate": 16, "num_experts": 4, "top_k": 2}, "ss2d": {}},
    )
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 2])
    out = model(x, labels)
    assert out.aux_loss > 0 and len(out.router) == 3
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels) + out.aux_loss)


def test_checkpointing_is_the_same():
    model = micro().train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for m in (model, twin):
        m(x, labels).loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_stages_are_frozen_and_freed():
    model = micro()
    model.freeze(2)
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in free if name.startswith("backbone")} == {"layers", "norm_f"}
    assert all(name.split(".")[2] == "6" for name in free if name.startswith("backbone.layers"))
    model.freeze(0)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"freeze: 4 of 3 stages\. Use 0 to 3\."):
        model.freeze(4)


def test_a_detectors_backbone_gives_maps():
    net = FeatureMaps(micro(), [1, -1])
    maps = net(torch.randn(2, 3, 33, 20))
    assert net.channels == [16, 32] and net.strides == [8, 16] and [m.shape[1] for m in maps] == [16, 32]
    assert [tuple(m.shape[2:]) for m in maps] == [(5, 3), (3, 2)]
    assert {"outnorm1.weight", "outnorm2.weight"} <= set(net.state_dict())
    torch.testing.assert_close(maps[0].mean(1), torch.zeros(2, 5, 3), atol=1e-5, rtol=0)
    plain = FeatureMaps(net.model, norm=False)(torch.ones(1, 3, 16, 16))
    assert len(plain) == 3 and all(
        torch.equal(a, b)
        for a, b in zip(plain, net.model.forward_features(torch.ones(1, 3, 16, 16), True), strict=True)
    )
    with pytest.raises(ValueError, match=r"FeatureMaps: stages \[3\] of 3\. Use some of -3 to 2\."):
        FeatureMaps(net.model, [3])


def test_a_class_token_is_what_the_head_reads():
    cfg = {
        "task": "image_classification", "n_classes": 4, "image_size": 16, "d_model": 8, "layers": "mlp * 2", "mixers": {"mlp": {}},
        "stem": {"type": "patch", "patch": 4, "norm": False}, "class_token": "middle", "pos_embed": True, "pool": "token",
        "norm": {"type": "rmsnorm"}, "residual_in_fp32": True,
    }  # fmt: skip
    model = zoo.build(cfg)
    out = model(torch.randn(2, 3, 16, 16))
    assert out.hidden.shape == (2, 17, 8)
    assert torch.equal(out.logits, model.head(out.hidden[:, 8]))
    maps = model.forward_features(torch.randn(2, 3, 20, 12), return_stages=True)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 5, 3)] and model(torch.randn(1, 3, 20, 12)).logits.shape == (1, 4)
    _, rest = (group["params"] for group in zoo.param_groups(model))
    assert all(
        any(p is q for q in rest) for p in (model.backbone.embedding.pos_embed, model.backbone.embedding.class_token)
    )
    with pytest.raises(ValueError, match="forward_head: the head reads the class token"):
        model.forward_head(maps[0])
    with pytest.raises(ConfigError, match="mixes maps, and with a class token"):
        zoo.build(cfg | {"layers": "ss2d", "mixers": {"ss2d": {}}})


def test_single_tensors_begin_as_in_a_new_model():
    model = micro()
    for p in model.parameters():
        nn.init.constant_(p, 7.0)
    redraw(model, [name for name, _ in model.named_parameters()])
    assert not any((p == 7).any() for p in model.parameters())
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.3) and (model.head.bias == 0).all()
    proj = model.backbone.downsample[0].proj
    assert proj.weight.abs().max() <= 1 / math.sqrt(8 * 9)


BAD = {
    "layers and stages": ({"layers": "ss2d"}, r"layers: is given beside stages"),
    "neither": ({"stages": []}, r"layers: is missing\. Say what stands where, by layers, or by stages"),
    "no mapping": ({"stages": ["ss2d"]}, r"stages\.0: found 'ss2d', expected a mapping"),
    "key": ({"stages": [{"layer": "ss2d"}]}, r"stages\.0\.layer: unknown key\. Did you mean 'layers'"),
    "width": ({"stages": [{"layers": "ss2d", "d_model": 0}]}, r"stages\.0\.d_model: is 0 and no number"),
    "mixer": ({"stages": [{"layers": "ss2d"}, {"layers": "ss3d"}]}, r"stages\.1\.layers: unknown mixer 'ss3d' in block 1"),
    "stem": ({"stem": {"type": "cnv"}}, r"stem\.type: unknown value 'cnv'\. Did you mean 'conv'"),
    "stem's key": ({"stem": {"size": 4}}, r"stem\.size: unknown key"),
    "stem's patch": ({"stem": {"patch": 8}}, r"stem\.patch: is 8, and a conv stem has patches of 1, 2 or 4"),
    "small": ({"stem": {"type": "patch", "patch": 32}}, r"image_size: is 16, less than a patch of 32"),
    "pool": ({"pool": "token"}, r"pool: is token, and there is none"),
    "token": ({"class_token": "middle"}, r"class_token: has no place in a map that stages make smaller"),
    "labels": ({"labels": ["a"]}, r"labels: names 1 classes, and n_classes is 5"),
    "drop": ({"drop_path": 1.0}, r"drop_path: is 1\.0, outside 0 to 0\.99"),
    "std": ({"image_std": [0.5, 0.0, 0.5]}, r"image_std: is \[0\.5, 0\.0, 0\.5\]"),
    "filter": ({"interpolation": "bicubci"}, r"interpolation: unknown value 'bicubci'\. Did you mean 'bicubic'"),
    "timm's word": ({"num_classes": 3}, r"num_classes: unknown key\. Did you mean 'n_classes'"),
    "text's key": ({"vocab_size": 3}, r"vocab_size: unknown key"),
    "shared": ({"stages": [{"layers": "ss2d@a"}, {"layers": "ss2d@a"}]}, r"label 'a' joins blocks 0 .* which have 8 and 16 channels"),
    "expand": ({"mixers": {"mlp": {"d_intermediate": 8, "expand": 2}, "ss2d": {}}}, r"mixers\.mlp\.expand .*beside d_intermediate = 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_one_helpful_error(case):
    changes, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        zoo.config({**MICRO, **changes})


def test_bad_images_are_refused():
    model = micro()
    for x, message in (
        (torch.randn(3, 16, 16), r"expected shape \(b, 3, h, w\), got \(3, 16, 16\)"),
        (torch.randn(1, 1, 16, 16), r"expected shape \(b, 3, h, w\), got \(1, 1, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "are torch.uint8. Divide by 255"),
        (torch.randn(1, 3, 0, 16), "images of 0 x 16 are smaller"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x)
    with pytest.raises(ValueError, match=r"labels: expected \(2,\) integers or \(2, 5\) probabilities, got \(3,\)"):
        model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"labels: are torch.int32\. .* labels\.long\(\)"):
        model(torch.randn(1, 3, 8, 8), torch.tensor([1], dtype=torch.int32))
    patch = micro("stem={type: patch, patch: 4}")
    with pytest.raises(ValueError, match="images of 3 x 16 are smaller than a patch of 4"):
        patch(torch.randn(1, 3, 3, 16))


def test_compiles_without_a_break():
    # of every kind of part one, as the compiler takes its time for each
    model = zoo.build(MICRO | {"stages": [{"layers": "ss2d mlp"}, {"layers": "ss2d"}]}).eval()
    # what was compiled before at other sizes would have these free, and torch's own compiler fails on a convolution of such
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    x = torch.randn(2, 3, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
