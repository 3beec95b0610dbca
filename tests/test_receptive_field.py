"""What a model sees: gradients against finite differences, known fields and plain loops; walks one by one; and how it is drawn."""

import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from command_line import invoke
from torch import nn

import hybridzoo as zoo
from hybridzoo.layers import SS2D
from hybridzoo.layers.base import Seq
from hybridzoo.layers.ss2d2 import SS2D2
from hybridzoo.zoo.images.explain import explain
from hybridzoo.zoo.models.receptive_field import central_share, effective_receptive_field, walks_of
from hybridzoo.zoo.report.cells import SHADES, heat_maps, pooled
from hybridzoo.zoo.report.explained import explained_page, explained_picture, explained_png, walk_name

ORDERS = ["rows", "columns", "rows-back", "columns-back", "window2-rows", "window2-columns-back"]


def one_layer(directions, **options):
    """Tokens are pixels, and nothing but an SS2D has to do with more than one of them; everything is drawn large enough to be seen."""
    model = zoo.build(
        {
            "task": "image_classification", "n_classes": 2, "in_channels": 1, "image_size": 6, "d_model": 8, "stages": [{"layers": "ss2d"}],
            "mixers": {"ss2d": {"directions": directions, **options}}, "stem": {"type": "patch", "patch": 1, "norm": False},
            "image_mean": [0.5], "image_std": [0.5],
        },
        dtype=torch.float64,
    )  # fmt: skip
    return loud(model)


def loud(module):
    """Fresh weights are so small that what passes through a scan is hardly there."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.5)
    return module


def test_the_field_of_a_convolution_is_its_kernel():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 5, padding=2)

        def forward_features(self, x, return_stages=False):
            return [self.conv(x)]

    net = Net()
    field = effective_receptive_field(net, torch.randn(2, 2, 9, 12))
    expected = np.zeros((9, 12))
    # the sum over what comes out, absolute, and summed over what goes in; the middle is pixel (4, 6)
    expected[2:7, 4:9] = np.abs(net.conv.weight.detach().numpy().sum(0)).sum(0)
    np.testing.assert_allclose(field.numpy(), expected / expected.max(), atol=1e-6)


def test_the_field_is_that_of_finite_differences():
    small = ["d_model=8", "mixers.mlp.init_std=0.3", "image_size=6", "drop_path=0.5"]
    model = zoo.build("vmamba-micro", small, dtype=torch.float64).train()
    next(model.parameters()).requires_grad_(False)
    images = torch.randn(2, 1, 6, 5, dtype=torch.float64)
    field = effective_receptive_field(model, images)
    assert model.training and [p.requires_grad for p in model.parameters()].count(False) == 1
    model.eval()
    expected = np.zeros((6, 5))
    for i, j in np.ndindex(6, 5):
        ends = []
        for step in (1e-5, -1e-5):
            moved = images.clone()
            moved[:, :, i, j] += step
            last = model.forward_features(moved, return_stages=True)[-1].detach()
            ends.append(last[:, :, last.shape[2] // 2, last.shape[3] // 2].sum(1))
        expected[i, j] = ((ends[0] - ends[1]) / 2e-5).abs().sum()
    np.testing.assert_allclose(field.numpy(), expected / expected.max(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("order", ORDERS)
def test_a_walk_sees_what_it_has_visited(order):
    h, w = 5, 6
    model = one_layer(ORDERS)
    field = effective_receptive_field(model, torch.randn(3, 1, h, w, dtype=torch.float64), walk=order)
    size, way, back = re.fullmatch(r"(?:window(\d)-)?(rows|columns)(-back)?", order).groups()

    def key(i, j):
        inside = (i, j) if way == "rows" else (j, i)
        if size is None:
            return inside
        n = int(size)
        window = (i // n, j // n) if way == "rows" else (j // n, i // n)
        return window, inside

    visits = sorted(np.ndindex(h, w), key=lambda p: key(*p), reverse=bool(back))
    seen = np.zeros((h, w), dtype=bool)
    for i, j in visits[: visits.index((h // 2, w // 2)) + 1]:
        seen[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2] = (
            True  # a token is what a convolution of 3 x 3 makes of its surroundings
        )
    assert np.array_equal(field.numpy() > 1e-14, seen)


@pytest.mark.parametrize("kind", [SS2D, SS2D2])
def test_the_walks_of_a_layer_add_up_and_leave_its_outputs(kind):
    h, w = 5, 4
    layer = loud(kind(8, d_state=2, gate=True, dtype=torch.float64))
    x = torch.randn(2, h * w, 8, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, h * w, 8, dtype=torch.float64)

    def gradient(through):
        layer.through = through
        y = layer(x, seq=Seq.from_grid((h, w), 2, h * w, x.device))
        return y.detach(), torch.autograd.grad((y * probe).sum(), x)[0]

    y, whole = gradient(None)
    _, rest = gradient(())
    parts = []
    for order in layer.directions:
        same, part = gradient((order,))
        torch.testing.assert_close(same, y, rtol=0, atol=1e-14)
        parts.append(part - rest)
        assert parts[-1].abs().max() > 1e-6
    torch.testing.assert_close(sum(parts) + rest, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(layer.directions)[1], whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("number", range(4))
def test_a_walk_alone_is_a_layer_of_that_direction(number):
    """Without a norm, outputs are a sum, and the gradient through one walk is that of a layer which has no other, and no skips."""
    h, w = 3, 5
    layer = loud(SS2D(8, out_norm=None, dtype=torch.float64))
    order = layer.directions[number]
    alone = SS2D(8, out_norm=None, directions=[order], dtype=torch.float64)
    mine = {name: p for name, p in layer.state_dict().items() if p.shape == alone.state_dict()[name].shape}
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
        mine[name] = layer.state_dict()[name][number : number + 1]
    mine["A_logs"], mine["Ds"] = layer.A_logs.detach()[8 * number : 8 * number + 8], torch.zeros(8)
    alone.load_state_dict(mine)
    x = torch.randn(1, h * w, 8, dtype=torch.float64, requires_grad=True)
    seq = Seq.from_grid((h, w), 1, h * w, x.device)

    def gradient(one, through):
        one.through = through
        return torch.autograd.grad(one(x, seq=seq)[:, h * w // 2].sum(), x)[0]

    torch.testing.assert_close(gradient(layer, (order,)) - gradient(layer, ()), gradient(alone, None))


def test_a_model_of_rows_and_a_class_token_has_a_field_and_no_walks():
    small = ["d_model=16", "layers=mamba * 2", "image_size=32", "stem.patch=8", "n_classes=2"]
    model = zoo.build("vim-tiny", small)
    field = effective_receptive_field(model, torch.randn(1, 3, 32, 24))
    assert walks_of(model) == () and field.shape == (32, 24) and field[16:24, 8:16].max() == 1


def test_what_has_no_field_is_an_error():
    with pytest.raises(ValueError, match="is one of causal_lm, and receptive fields are those of image models"):
        effective_receptive_field(zoo.build("mamba-tiny", ["d_model=16"]), torch.zeros(1, 1, 8, 8))
    model = one_layer(["rows", "columns"])
    assert walks_of(model) == ("rows", "columns")
    with pytest.raises(ValueError, match=r"no scan of the model goes in this order\. Its orders: rows, columns"):
        effective_receptive_field(model, torch.zeros(1, 1, 6, 6), walk="rows-back")
    nn.init.zeros_(model.backbone.embedding.proj.weight)
    with pytest.raises(ValueError, match="depends on no pixel"):
        effective_receptive_field(model, torch.zeros(1, 1, 6, 6))
    assert all(layer.through is None for layer in model.modules() if isinstance(layer, SS2D))


def test_the_share_of_the_middle_is_that_of_its_pixels():
    assert central_share(torch.ones(8, 8), 0.25) == 4 / 64 and central_share(torch.ones(8, 8), 0.5) == 16 / 64
    assert central_share(torch.ones(5, 8), 0.5) == 3 * 4 / 40 and central_share(torch.ones(1, 1), 0.25) == 1
    peak = torch.zeros(8, 8)
    peak[0, 0] = peak[4, 4] = 1
    assert central_share(peak, 0.5) == 0.5


# --- as data and as pictures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(3)
    model = zoo.build("vmamba-micro", ["d_model=8", "image_size=9"])
    return zoo.save(model, tmp_path_factory.mktemp("saved") / "micro")


def test_a_folder_is_explained_before_and_after(saved):
    result = explain(saved, size=12)
    before, after = result["states"]
    assert (before["name"], after["name"], result["size"], result["noise"]) == ("untrained", "trained", [12, 12], True)
    assert [f["walk"] for f in after["fields"]] == [None, "rows", "columns", "rows-back", "columns-back"]
    # the same noise through the model as it is
    x = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for field in after["fields"]:
        expected = effective_receptive_field(zoo.load(saved), x, walk=field["walk"])
        torch.testing.assert_close(torch.tensor(field["field"]).double(), expected, rtol=0, atol=1e-4)
        assert field["middle"] == {str(s): round(central_share(expected, s), 4) for s in (0.25, 0.5)}
    assert before["fields"] != after["fields"] and explain(saved, size=12) == result


def test_the_command_writes_a_page_and_pictures(saved, tmp_path):
    image = tmp_path / "photo.png"
    pytest.importorskip("PIL.Image").fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(image)
    for name in ("x.html", "x.svg", "x.png", "deep/x.json"):
        ran = invoke("explain", saved, image, "--out", tmp_path / name)
        assert f"wrote {tmp_path / name}" in ran.stderr.replace("\n", "") and "rows →" in ran.stdout
    result = json.loads((tmp_path / "deep/x.json").read_text())
    assert (result["images"], result["noise"], result["size"]) == (1, False, [9, 9])
    page = (tmp_path / "x.html").read_text()
    assert page == explained_page(result) and "Trained" in page and "columns ↑" in page
    assert "how much of it lies inside the middle half" in page
    assert (tmp_path / "x.svg").read_text() == explained_picture(result)
    ET.fromstring((tmp_path / "x.svg").read_text())
    assert (
        json.loads(invoke("explain", "vmamba-micro", "--json", "--out", tmp_path / "y.svg").stdout)["states"][0]["name"]
        == "untrained"
    )


def test_a_png_has_a_square_for_every_map(saved):
    image = pytest.importorskip("PIL.Image")
    result = explain("vmamba-micro", size=6)
    drawn = image.open(io.BytesIO(explained_png(result))).convert("RGB")
    for m, field in enumerate(result["states"][0]["fields"]):
        for i, j in np.ndindex(6, 6):
            at = 16 + 216 * m + int((j + 0.5) * 200 / 6), 44 + 30 + int((i + 0.5) * 200 / 6)
            share = round(SHADES * np.sqrt(field["field"][i][j])) / SHADES
            ground = np.array([243, 241, 237])
            assert drawn.getpixel(at) == tuple(np.round(ground + share * (np.array([0, 0x72, 0xB2]) - ground)))


def test_a_map_is_drawn_as_it_is():
    values = torch.rand(7, 9, generator=torch.Generator().manual_seed(1)).pow(3).tolist()
    drawn = np.zeros((7, 9))
    for opacity, way in re.findall(
        r'fill-opacity:([\d.]+)" d="([^"]+)"', heat_maps("label", [("a", "b", values)]).body
    ):
        for j, i, n in re.findall(r"M(\d+),(\d+)h(\d+)v1", way):
            assert (drawn[int(i), int(j) : int(j) + int(n)] == 0).all()
            drawn[int(i), int(j) : int(j) + int(n)] = float(opacity)
    np.testing.assert_allclose(drawn, np.sqrt(values), atol=0.5 / SHADES + 0.005)


def test_large_maps_are_drawn_as_means():
    field = torch.rand(10, 7)
    field[0, 0] = 1.0
    rows = np.array(pooled(field.tolist(), 5))
    mean = nn.functional.avg_pool2d(field[None, None], 2, ceil_mode=True, count_include_pad=False)[0, 0].numpy()
    np.testing.assert_allclose(rows, mean / mean.max(), rtol=1e-5)
    assert pooled(field.tolist(), 10) == field.tolist()


def test_the_picture_of_the_guide_is_kept_as_data_without_the_machines_paths(tmp_path, monkeypatch):
    from hybridzoo.eval.bench import fields

    monkeypatch.setattr(fields, "_SEEN", 2)
    result = fields.fields(tmp_path / "kept.json", steps=2)
    assert json.loads((tmp_path / "kept.json").read_text()) == json.loads(json.dumps(result))
    seen = result["explained"]
    assert (result["what"], seen["model"], seen["images"]) == ("fields", "vmamba-micro", 2)
    assert [s["name"] for s in seen["states"]] == ["untrained", "trained"] and "/tmp" not in json.dumps(result)


@pytest.mark.parametrize(
    ("walk", "name"),
    [
        (None, "all"),
        ("rows", "rows →"),
        ("columns-back", "columns ↑"),
        ("window7-rows-back", "7×7 ←"),
        ("window2-columns", "2×2 ↓"),
    ],
)
def test_an_arrow_says_where_a_walk_goes(walk, name):
    assert walk_name(walk) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mamba-tiny"], "mamba-tiny: is a model for causal_lm, and this is for images"),
        (["vmamba-micro", "--out", "x.gif"], "x.gif is no file that ends in .html, .svg, .png, .json"),
        (["vmamba-micro", "nowhere.png"], "nowhere.png: no such file or folder"),
        (["vmamba-mikro"], "Did you mean 'vmamba-micro'?"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_explained_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = invoke("explain", *arguments, status=1)
    assert message in ran.stderr and "Traceback" not in ran.stderr and not list(tmp_path.iterdir())
