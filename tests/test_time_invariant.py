"""Mamba without selection: judged by the convolution that a time-invariant layer is, and by a loop over its recurrence; and without gate."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hybridzoo
from hybridzoo.layers import Mamba
from hybridzoo.layers.options import OptionError
from hybridzoo.zoo.registry import check_mixer_options

D, N, L = 6, 5, 23


def layer(**options):
    torch.manual_seed(0)
    mixer = Mamba(D, d_state=N, **{"selective": False} | options).double()
    for p in mixer.parameters():
        p.data += 0.3 * torch.rand_like(p)
    return mixer


def weights(mixer):
    return {name: p.detach().numpy() for name, p in mixer.named_parameters()}


def filtered(p, x):
    """The filter's outputs and the gate, (l, d_inner) each, by numpy's convolution."""
    u, z = np.split(x @ p["in_proj.weight"].T, 2, axis=-1)
    taps = p["conv1d.weight"][:, 0, ::-1]
    u = np.stack([np.convolve(u[:, c], taps[c])[: len(u)] + p["conv1d.bias"][c] for c in range(u.shape[1])], 1)
    return u / (1 + np.exp(-u)), z / (1 + np.exp(-z))


def kernel(p, length):
    """The impulse response ``sum_n C_n B_n dt exp(-dt a_n t)`` of every channel, (length, d_inner)."""
    dt = np.log1p(np.exp(p["dt_bias"]))
    decays = np.exp(-dt[:, None] * np.exp(p["A_log"]))
    return np.stack([(p["C"] * p["B"] * dt[:, None] * decays**t).sum(1) for t in range(length)])


def test_it_is_the_convolution_with_its_impulse_response():
    mixer, x = layer(), torch.randn(L, D, dtype=torch.float64)
    p = weights(mixer)
    u, gate = filtered(p, x.numpy())
    K = kernel(p, L)
    y = np.stack([np.convolve(u[:, c], K[:, c])[:L] for c in range(u.shape[1])], 1) + p["D"] * u
    want = (y * gate) @ p["out_proj.weight"].T
    assert np.abs(mixer(x[None])[0].detach().numpy() - want).max() < 1e-12


def test_steps_are_the_recurrence_that_a_loop_computes():
    mixer, x = layer(), torch.randn(L, D, dtype=torch.float64)
    p, state = weights(mixer), mixer.init_state(1)
    u, gate = filtered(p, x.numpy())
    dt = np.log1p(np.exp(p["dt_bias"]))[:, None]
    h = np.zeros_like(p["B"])
    for t in range(L):
        h = np.exp(-dt * np.exp(p["A_log"])) * h + dt * p["B"] * u[t][:, None]
        want = (((h * p["C"]).sum(1) + p["D"] * u[t]) * gate[t]) @ p["out_proj.weight"].T
        assert np.abs(mixer.step(x[t][None], state)[0].detach().numpy() - want).max() < 1e-12
    assert np.abs(state.ssm[0].detach().numpy() - h).max() < 1e-12


def test_packed_documents_and_gradients_are_those_of_each_document_alone():
    mixer, x = layer(), torch.randn(1, 17, D, dtype=torch.float64, requires_grad=True)
    seq = hybridzoo.layers.base.Seq.from_cu_seqlens([0, 9, 17], 1, 17)
    (together,) = torch.autograd.grad(mixer(x, seq=seq).pow(2).sum(), mixer.B)
    apart = sum(torch.autograd.grad(mixer(part).pow(2).sum(), mixer.B)[0] for part in (x[:, :9], x[:, 9:]))
    assert (together - apart).abs().max() < 1e-12


def test_selection_is_what_differs():
    """The same parameters otherwise, and a selective layer whose projections are constant computes the same."""
    flat, mixer = layer(), Mamba(D, d_state=N, x_proj_bias=True).double()
    shared = {name: p for name, p in flat.state_dict().items() if name in mixer.state_dict()}
    mixer.load_state_dict(shared, strict=False)
    missing = set(dict(mixer.named_parameters())) - set(shared)
    assert missing == {"x_proj.weight", "x_proj.bias", "dt_proj.weight", "dt_proj.bias"}
    B, C = flat.B[0], flat.C[0]
    with torch.no_grad():
        flat.B.copy_(B.expand_as(flat.B))
        flat.C.copy_(C.expand_as(flat.C))
        for name in missing:
            mixer.get_parameter(name).zero_()
        mixer.x_proj.bias.copy_(torch.cat([torch.zeros(mixer.dt_rank), B, C]))
        mixer.dt_proj.bias.copy_(flat.dt_bias)
    x = torch.randn(2, L, D, dtype=torch.float64)
    assert (mixer(x) - flat(x)).abs().max() < 1e-12
    assert flat.state_bytes(10) == mixer.state_bytes(10) and flat.flops(10) < mixer.flops(10)


def test_without_a_gate_it_is_a_gate_of_one():
    for options in ({}, {"selective": True}, {"selective": True, "directions": 2}):
        bare = layer(gate=False, **options)
        gated = layer(**options)
        gated.load_state_dict(bare.state_dict() | {"in_proj.weight": gated.in_proj.weight.detach()})
        constant = torch.tensor(1.2784645427610738, dtype=torch.float64)  # silu of it is 1
        assert abs(F.silu(constant) - 1) < 1e-15
        gated.in_proj = nn.Linear(D, 2 * bare.d_inner).double()
        with torch.no_grad():
            gated.in_proj.weight.zero_()[: bare.d_inner] = bare.in_proj.weight
            gated.in_proj.bias.zero_()[bare.d_inner :] = constant
        x = torch.randn(2, L, D, dtype=torch.float64)
        assert (bare(x) - gated(x)).abs().max() < 1e-12
        assert sum(p.numel() for p in bare.in_proj.parameters()) == D * bare.d_inner


def test_initial_values_and_groups():
    mixer = Mamba(32, d_state=8, selective=False, dtype=torch.bfloat16)
    assert mixer.dt_bias.dtype == torch.float32 and mixer.B.dtype == mixer.C.dtype == torch.bfloat16
    assert bool((mixer.B == 1).all()) and 0.9 < Mamba(64, selective=False).C.std() < 1.1
    dt = F.softplus(mixer.dt_bias.detach())
    assert 1e-3 <= dt.min() and dt.max() <= 0.1 + 1e-6
    decaying, *rest = hybridzoo.param_groups(mixer, 0.1)
    kept = {id(p) for p in decaying["params"]}
    assert id(mixer.C) in kept and not {id(mixer.B), id(mixer.A_log), id(mixer.dt_bias)} & kept and rest


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"bcdt_norm": True}, "bcdt_norm"),
        ({"dt_rank": 4}, "dt_rank"),
        ({"x_proj_bias": True}, "x_proj_bias"),
        ({"dt_offset": 0.1}, "dt_offset"),
        ({"directions": 2}, "directions"),
    ],
)
def test_options_of_what_it_has_not_are_refused(options, field):
    with pytest.raises(OptionError, match="selective: false") as e:
        layer(**options)
    assert e.value.field == field
    assert check_mixer_options({"type": "mamba", "selective": False, "gate": False}, "mixer")["gate"] is False
