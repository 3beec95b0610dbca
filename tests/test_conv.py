"""causal_conv1d: against torch's convolution, document by document, and its own loop."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils import deterministic

from hybridzoo.kernels import Seq, causal_conv1d, causal_conv1d_update
from hybridzoo.kernels.conv import chunked as conv

BACKENDS = ["chunked", "reference"]


def inputs(b=2, l=12, d=5, k=4, dtype=torch.float64, state=True):
    made = {
        "x": torch.randn(b, l, d, dtype=dtype),
        "weight": torch.randn(d, k, dtype=dtype),
        "bias": torch.randn(d, dtype=dtype),
    }
    if state:
        made["initial_state"] = torch.randn(b, k - 1, d, dtype=dtype)
    return {name: x.requires_grad_() for name, x in made.items()}


def by_torch(x, weight, bias, initial_state=None, activation=None):
    """torch's convolution of the row after its state."""
    k = weight.shape[1]
    before = x.new_zeros(x.shape[0], k - 1, x.shape[2]) if initial_state is None else initial_state
    row = torch.cat([before, x], 1)
    y = F.conv1d(row.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return F.silu(y) if activation else y, row[:, x.shape[1] :]


def grads(out, state, made, weights):
    leaves = [x for x in made.values() if x.numel()]
    return torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize("l", [1, 2, 3, 4, 63, 65])
def test_equals_torchs_convolution(l, k, state, activation, backend):
    made = inputs(l=l, k=k, state=state)
    weights = torch.randn(2, l, 5, dtype=torch.float64), torch.randn(2, k - 1, 5, dtype=torch.float64)
    got = causal_conv1d(**made, activation=activation, return_final_state=True, backend=backend)
    want = by_torch(**made, activation=activation)
    for a, b in zip([*got, *grads(*got, made, weights)], [*want, *grads(*want, made, weights)], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1, 1], [2, 9, 1], [9, 3, 2], [4, 3, 4]], ids=str)
def test_packed_documents_equal_separate_ones(lengths, pads, backend):
    total = sum(lengths)
    made = inputs(b=1, l=total + pads)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seq = Seq.from_documents(torch.cat([ids, torch.full((pads,), -1)])[None])
    out, state = causal_conv1d(**made, activation="silu", seq=seq, return_final_state=True, backend=backend)
    weights = torch.randn(1, total, 5, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64)
    outs, before = [], made["initial_state"]
    for part in made["x"][:, :total].split(lengths, 1):
        y, last = by_torch(part, made["weight"], made["bias"], before, "silu")
        outs.append(y)
        before = None  # the row's state belongs to its first document
    want = torch.cat(outs, 1)
    torch.testing.assert_close(out[:, :total], want)
    torch.testing.assert_close(state, last)
    for a, b in zip(grads(out[:, :total], state, made, weights), grads(want, last, made, weights), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend):
    made = inputs(b=4, l=8)
    lengths = [8, 5, 2, 0]
    seq = Seq.from_mask(torch.arange(8) < torch.tensor(lengths)[:, None])
    out, state = causal_conv1d(**made, seq=seq, return_final_state=True, backend=backend)
    torch.testing.assert_close(state[3], made["initial_state"][3])
    for row, length in enumerate(lengths[:3]):
        one = slice(row, row + 1)
        y, last = by_torch(made["x"][one, :length], made["weight"], made["bias"], made["initial_state"][one])
        torch.testing.assert_close(out[one, :length], y)
        torch.testing.assert_close(state[one], last)


@pytest.mark.parametrize("cuts", [[1, 11], [2, 1, 9], [6, 6]])
def test_a_row_in_parts_equals_the_whole_with_gradients_through_the_state(cuts):
    made = inputs()
    weights = torch.randn(2, 12, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    state, outs = made["initial_state"], []
    for part in made["x"].split(cuts, 1):
        y, state = causal_conv1d(part, made["weight"], made["bias"], initial_state=state, return_final_state=True)
        outs.append(y)
    out = torch.cat(outs, 1)
    want = by_torch(**made)
    for a, b in zip(
        [out, state, *grads(out, state, made, weights)], [*want, *grads(*want, made, weights)], strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 4])
def test_step_by_step_equals_the_whole(k, dtype):
    made = {name: x.detach() for name, x in inputs(k=k, dtype=dtype).items()}
    want, last = causal_conv1d(**made, activation="silu", return_final_state=True)
    state = made.pop("initial_state").clone()
    for t in range(12):
        got = causal_conv1d_update(made["x"][:, t], state, made["weight"], made["bias"], activation="silu")
        assert got.dtype == dtype
        torch.testing.assert_close(got, want[:, t])
    torch.testing.assert_close(state, last, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    made = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs(b=3, l=65).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in made.items()}
    weight = torch.randn(3, 65, 5)
    out, want = causal_conv1d(**made, activation="silu"), by_torch(**exact, activation="silu")[0]
    got = torch.autograd.grad((out.float() * weight).sum(), list(made.values()))
    exact_grads = torch.autograd.grad((want * weight).sum(), list(exact.values()))
    eps = torch.finfo(dtype).eps
    # the incoming gradient is itself rounded to the dtype of the output
    for a, b, slack in [(out, want, 1), *((a, b, 4) for a, b in zip(got, exact_grads, strict=True))]:
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= slack * max(eps, 1e-6) * b.abs().max()


def test_rows_may_be_convolved_in_several_groups(monkeypatch):
    made = inputs(b=5, l=20)
    want = by_torch(**made)
    monkeypatch.setitem(conv._GROUP, "cpu", 100)
    got = causal_conv1d(**made, return_final_state=True)
    weights = torch.randn(5, 20, 5, dtype=torch.float64), torch.randn(5, 3, 5, dtype=torch.float64)
    for a, b in zip([*got, *grads(*got, made, weights)], [*want, *grads(*want, made, weights)], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("silu", [True, False])
def test_gradients_of_the_gradient_formulas(silu):
    made = inputs(l=6, d=2, k=3)
    seq = Seq.from_documents(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 2, -1, -1]]))

    def f(x, weight, bias, state):
        return causal_conv1d(
            x, weight, bias, activation="silu" if silu else None, initial_state=state, seq=seq, return_final_state=True
        )

    assert torch.autograd.gradcheck(f, tuple(made.values()), fast_mode=False)


def test_inputs_need_not_be_contiguous():
    made = {name: x.detach() for name, x in inputs().items()}
    odd = made | {
        "x": made["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "weight": made["weight"].t().contiguous().t(),
    }
    odd["initial_state"] = torch.cat([made["initial_state"]] * 2, 1)[:, 3:]
    torch.testing.assert_close(causal_conv1d(**odd), causal_conv1d(**made), rtol=0, atol=0)


@pytest.mark.parametrize("optional", [True, False])
def test_op_registrations(optional):
    made = inputs(l=6, d=2)
    doc = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 2, -1, -1]])
    rest = (made["bias"], made["initial_state"], doc) if optional else (None, None, None)
    opcheck(torch.ops.hybridzoo.causal_conv1d, (made["x"], made["weight"], *rest, optional))


def test_uninitialised_memory_is_never_read():
    made = inputs()
    was = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = True  # every torch.empty is full of NaN
        out = causal_conv1d(**made, activation="silu")
        got = torch.autograd.grad(out.sum(), list(made.values()))
    finally:
        torch.use_deterministic_algorithms(was[0])
        deterministic.fill_uninitialized_memory = was[1]
    assert all(x.isfinite().all() for x in (out, *got))


def test_compiles_into_one_graph():
    made = inputs(dtype=torch.float32)
    leaves = tuple(made.values())

    def f(x, weight, bias, state):
        y, last = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, return_final_state=True)
        return y.sin().sum() + last.sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(f(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(12, 5)}, "causal_conv1d: x has 2 dimensions, expected 3"),
        ({"weight": torch.zeros(4, 4)}, r"weight has shape \(4, 4\), expected \(5, 4\)"),
        ({"weight": torch.zeros(5, 1, 4)}, "weight has 3 dimensions, expected 2"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\), expected \(5,\)"),
        ({"initial_state": torch.zeros(2, 4, 5)}, r"initial_state has shape \(2, 4, 5\), expected \(2, 3, 5\)"),
        ({"activation": "gelu"}, "activation is 'gelu', expected 'silu' or None"),
        ({"seq": Seq.from_documents(torch.zeros(2, 13))}, r"seq describes \(2, 13\) tokens, the input has \(2, 12\)"),
    ],
)
def test_wrong_arguments_name_both_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**({name: x.detach() for name, x in inputs().items()} | change))
