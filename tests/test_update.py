"""Steps on an index of rows, and Mamba-2's convolution and state in one call, on the CPU."""

import pytest
import torch

from hybridzoo.kernels import causal_conv1d_update, conv_ssd_update, selective_state_update, ssd_state_update


def selective(b=3, total=5, d=6, n=4, g=2):
    return selective_state_update, {
        "state": torch.randn(total, d, n),
        "u": torch.randn(b, d),
        "dt": torch.randn(b, d),
        "A": -torch.rand(d, n),
        "B": torch.randn(b, g, n),
        "C": torch.randn(b, g, n),
        "D": torch.randn(d),
        "z": torch.randn(b, d),
        "dt_softplus": True,
    }


def ssd(b=3, total=5, h=4, p=3, n=4, g=2):
    return ssd_state_update, {
        "state": torch.randn(total, h, p, n),
        "x": torch.randn(b, h, p),
        "dt": torch.randn(b, h),
        "A": -torch.rand(h),
        "B": torch.randn(b, g, n),
        "C": torch.randn(b, g, n),
        "D": torch.randn(h, p),
        "dt_softplus": True,
        "dt_limit": (0.1, 1.0),
    }


def conv(b=3, total=5, d=6, k=4):
    return causal_conv1d_update, {
        "x": torch.randn(b, d),
        "state": torch.randn(total, k - 1, d),
        "weight": torch.randn(d, k),
        "bias": torch.randn(d),
        "activation": "silu",
    }


def conv_ssd(b=3, total=5, h=4, p=3, n=4, g=2, k=4):
    width = h * p + 2 * g * n
    return conv_ssd_update, {
        "xBC": torch.randn(b, width),
        "conv_state": torch.randn(total, k - 1, width),
        "weight": torch.randn(width, k),
        "bias": torch.randn(width),
        "state": torch.randn(total, h, p, n),
        "dt": torch.randn(b, h),
        "A": -torch.rand(h),
        "D": torch.randn(h),
        "z": torch.randn(b, h, p),
        "ngroups": g,
        "activation": "silu",
        "dt_bias": torch.randn(h),
        "dt_softplus": True,
    }


STATES = ("state", "conv_state")
PER_ENTRY = ("u", "x", "xBC", "dt", "B", "C", "z")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("make", [selective, ssd, conv, conv_ssd])
def test_rows_of_a_larger_state(make, dtype):
    op, made = make()
    states = {name: made[name].clone() for name in STATES if name in made}
    rows = torch.tensor([4, -1, 0], dtype=dtype)
    out = op(**made, rows=rows)
    untouched = torch.tensor([1, 2, 3])
    for name, before in states.items():
        assert torch.equal(made[name][untouched], before[untouched])
    assert not out[1].any()
    for entry, row in ((0, 4), (2, 0)):
        one = {name: m[entry : entry + 1] if name in PER_ENTRY else m for name, m in made.items()}
        one |= {name: before[row : row + 1].clone() for name, before in states.items()}
        torch.testing.assert_close(out[entry], op(**one)[0])
        for name in states:
            torch.testing.assert_close(made[name][row], one[name][0])


@pytest.mark.parametrize("make", [selective, ssd, conv, conv_ssd])
def test_entries_that_are_all_skipped(make):
    op, made = make()
    before = {name: made[name].clone() for name in STATES if name in made}
    assert not op(**made, rows=torch.tensor([-1, -3, -1])).any()
    assert all(torch.equal(made[name], x) for name, x in before.items())


def test_one_call_equals_two():
    op, made = conv_ssd(total=3)
    conv_state, state = made["conv_state"].clone(), made["state"].clone()
    got = op(**made)
    xBC = causal_conv1d_update(made["xBC"], conv_state, made["weight"], made["bias"], activation="silu")
    x, B, C = xBC.split([12, 8, 8], -1)
    options = {name: made[name] for name in ("D", "z", "dt_bias", "dt_softplus")}
    want = ssd_state_update(state, x.view(3, 4, 3), made["dt"], made["A"], B.view(3, 2, 4), C.view(3, 2, 4), **options)
    assert torch.equal(got, want)
    assert torch.equal(made["conv_state"], conv_state) and torch.equal(made["state"], state)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (
            selective,
            {"rows": torch.zeros(3)},
            r"rows has shape \(3,\) and dtype torch.float32, expected \(b,\) of int32",
        ),
        (ssd, {"rows": torch.zeros(3, 1, dtype=torch.int64)}, r"rows has shape \(3, 1\)"),
        (conv, {"rows": torch.zeros(2, dtype=torch.int64)}, r"rows has shape \(2,\), expected \(3,\) \(b,\)"),
        (conv, {}, r"conv state has shape \(5, 3, 6\), expected \(3, 3, 6\)"),
        (conv_ssd, {"rows": torch.zeros(2, dtype=torch.int64)}, r"xBC has shape \(3, 28\), expected \(2, 28\)"),
        (conv_ssd, {"ngroups": 3}, "h = 4 is not a multiple of the 3 groups"),
        (ssd, {"rows": torch.arange(3), "D": torch.zeros(3)}, r"D has shape \(3,\), expected \(4,\)"),
    ],
)
def test_wrong_arguments_name_both_sizes(make, change, message):
    op, made = make()
    with pytest.raises(ValueError, match=message):
        op(**made | change)


@pytest.mark.parametrize("made", [selective, ssd, conv_ssd])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_half_precision_state_is_rounded_once_a_step(made, indexed):
    op, operands = made()
    b = len(operands["dt"])
    rows = {"rows": torch.tensor([2, 0, 4])} if indexed else {}
    if not indexed:
        operands = operands | {name: operands[name][:b] for name in ("state", "conv_state") if name in operands}
    small = operands["state"].bfloat16()
    wide = small.float()
    others = [{name: x.clone() for name, x in operands.items() if name == "conv_state"} for _ in range(2)]
    got = op(**operands | {"state": small} | others[0], **rows)
    want = op(**operands | {"state": wide} | others[1], **rows)
    assert torch.equal(got, want) and torch.equal(small, wide.bfloat16()) and small.dtype == torch.bfloat16
