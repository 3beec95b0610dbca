"""SS2D on Mamba-2's scan: what SS2D computes with one decay rate and one step size per head, on any map and any walks."""

import pytest
import torch

from hybridzoo.layers import SS2D, SS2D2, OptionError, Seq

D, N = 32, 5


def drawn(**options):
    layer = SS2D2(D, d_state=N, chunk_size=4, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def as_ss2d(layer, p, **options):
    """SS2D with the parameters of every channel, from those of its head: differentiable functions of ``p``."""
    k, h = layer.A_logs.shape
    width = layer.d_inner // h
    spread = torch.eye(h, dtype=torch.float64).repeat_interleave(width, 0)
    weights = {name: p[name] for name in p if "_projs" not in name and name not in ("A_logs", "Ds")}
    weights |= {
        "dt_projs_weight": spread.expand(k, -1, -1),
        "dt_projs_bias": p["dt_projs_bias"].repeat_interleave(width, 1),
        "A_logs": p["A_logs"].repeat_interleave(width, 1).flatten()[:, None].expand(-1, N),
        "Ds": p["Ds"].flatten(),
    }
    twin = SS2D(D, d_state=N, dt_rank=h, **options).double()
    return lambda x, seq: torch.func.functional_call(twin, weights, (x,), {"seq": seq})


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (3, 5), (6, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": 1, "gate": True, "conv_bias": True},
        {"directions": 2, "ssm_ratio": 2.0, "nheads": 4},
        {"directions": ["columns", "window2-rows-back"], "d_conv": 0, "out_norm": None},
    ],
    ids=str,
)
def test_it_is_ss2d_with_one_rate_per_head(options, grid):
    layer = drawn(**options)
    p = dict(layer.named_parameters())
    twin = as_ss2d(layer, p, **{name: value for name, value in options.items() if name != "nheads"})
    l = grid[0] * grid[1]
    x = torch.randn(2, l, D, dtype=torch.float64, requires_grad=True)
    seq, weight = Seq.from_grid(grid, 2, l), torch.randn(2, l, D, dtype=torch.float64)
    got, want = layer(x, seq=seq), twin(x, seq)
    assert (got - want).abs().max() < 1e-11
    grads = [torch.autograd.grad((y * weight).sum(), [x, *p.values()]) for y in (got, want)]
    for name, a, b in zip(["x", *p], *grads, strict=True):
        assert (a - b).abs().max() < 1e-9 * max(1, b.abs().max()), name


def test_a_transposed_map_exchanges_rows_and_columns_and_a_half_turn_the_ends():
    layer, twin, (h, w) = drawn(d_conv=0), drawn(d_conv=0), (3, 5)
    x = torch.randn(2, h * w, D, dtype=torch.float64)
    want = layer(x, seq=Seq.from_grid((h, w), 2, h * w)).unflatten(1, (h, w))
    for order, move in (([1, 0, 3, 2], lambda m: m.transpose(1, 2)), ([2, 3, 0, 1], lambda m: m.flip(1, 2))):
        # of every direction's parameters, those that it has then
        weights = {
            name: t[order] if name in ("x_proj_weight", "dt_projs_bias", "A_logs", "Ds") else t
            for name, t in layer.state_dict().items()
        }
        twin.load_state_dict(weights)
        moved = move(x.unflatten(1, (h, w)))
        got = twin(moved.flatten(1, 2), seq=Seq.from_grid(tuple(moved.shape[1:3]), 2, h * w))
        assert (move(got.unflatten(1, moved.shape[1:3])) - want).abs().max() < 1e-12


def test_names_and_shapes_are_vmambas():
    layer = SS2D2(96)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "in_proj.weight": (96, 96), "conv2d.weight": (96, 1, 3, 3), "x_proj_weight": (4, 6 + 128, 96), "dt_projs_bias": (4, 6),
        "A_logs": (4, 6), "Ds": (4, 6, 16), "out_norm.weight": (96,), "out_norm.bias": (96,), "out_proj.weight": (96, 96),
    }  # fmt: skip
    assert (
        not layer.A_logs.any()
        and (layer.Ds == 1).all()
        and 0 <= layer.dt_projs_bias.min() <= layer.dt_projs_bias.max() <= 0.1
    )
    assert SS2D2(96, dtype=torch.bfloat16).A_logs.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"nheads": 5}, "nheads", "ssm_ratio * d_model = 32 is not a multiple of nheads = 5"),
        ({"nheads": 0}, "nheads", "0 is not a size"),
        ({"chunk_size": 0}, "chunk_size", "0 is not a size"),
        ({"directions": 3}, "directions", "3 is none of 1, 2, 4"),
    ],
)
def test_options_that_cannot_work_are_named(options, field, message):
    with pytest.raises(OptionError) as e:
        SS2D2(32, **options)
    assert e.value.field == field and message in e.value.message
