"""Every registered mixer keeps every promise of the contract, and Mamba and Mamba-2 compute what others' code computes."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.kernels import Seq
from hybridzoo.layers import (
    MLP,
    Attention,
    GatedConv2d,
    Mamba,
    Mamba2,
    Mixer,
    MoE,
    OptionError,
    State,
    copy_state,
    map_state,
)
from hybridzoo.layers.testing import PROMISES, Case, check_mixer, counted_flops
from hybridzoo.zoo.registry import build_mixer, check_mixer_options, get_mixer, list_mixers

MAMBA2 = {"d_state": 8, "headdim": 16, "chunk_size": 4}
HEADS = {"nheads": 4, "nheads_kv": 2}
EXPERTS = {"d_intermediate": 48, "num_experts": 4}
# options that change what is computed; the first of each mixer goes through torch.compile as well
VARIANTS = {
    "mamba": {
        "default": {"d_state": 8},
        "jamba": {"d_state": 4, "bcdt_norm": True, "dt_rank": 5},
        "falcon": {"d_state": 4, "bcdt_norm": True, "bcdt_norm_affine": False, "d_conv": 2, "expand": 1},
        "biases": {"d_state": 1, "bias": True, "conv_bias": False, "d_conv": 1},
        "offset": {"d_state": 4, "x_proj_bias": True, "dt_offset": 0.02},
        "time-invariant": {"d_state": 4, "selective": False},
        "no-gate": {"d_state": 4, "gate": False},
        "vim": {"d_state": 4, "directions": 2, "combine_directions": "mean"},
        "one-set": {"d_state": 4, "directions": 2, "tie_directions": "all", "bcdt_norm": True, "bias": True},
        "typeseg": {
            "d_state": 4,
            "expand": 1,
            "bias": True,
            "x_proj_bias": True,
            "dt_offset": 1e-4,
            "directions": 2,
            "tie_directions": "all",
            "conv_padding": "same",
        },
        "around": {"d_state": 4, "d_conv": 5, "directions": 2, "conv_padding": "same", "conv_bias": False},
        "strands": {"d_state": 4, "reverse_complement": True},
        "caduceus": {"d_state": 4, "directions": 2, "reverse_complement": True},
    },
    "mamba2": {
        "default": MAMBA2,
        "groups": MAMBA2 | {"ngroups": 2, "D_has_hdim": True, "bias": True},
        "d-ssm": MAMBA2 | {"d_ssm": 32, "dt_limit": (0.01, 0.05), "conv_bias": False},
        "norm-first": MAMBA2 | {"ngroups": 4, "norm_before_gate": True, "d_conv": 2},
        "mup": MAMBA2
        | {"d_inner": 48, "in_multiplier": 1.5, "multipliers": (0.5, 1.5, 0.8, 1.2, 0.7), "out_multiplier": 0.6},
        "both-ways": MAMBA2 | {"directions": 2},
        "one-set": MAMBA2 | {"directions": 2, "tie_directions": "all", "combine_directions": "mean", "rmsnorm": False},
        "around": MAMBA2 | {"directions": 2, "tie_directions": "all", "conv_padding": "same", "D_has_hdim": True},
        "around-each": MAMBA2 | {"directions": 2, "conv_padding": "same", "d_conv": 3, "bias": True, "d_ssm": 48},
        "strands": MAMBA2 | {"reverse_complement": True, "expand": 1},
        "caduceus": MAMBA2 | {"directions": 2, "reverse_complement": True},
        "gate-only": MAMBA2 | {"rmsnorm": False, "D_has_hdim": True, "d_ssm": 48, "chunk_size": 64},
    },
    "attention": {
        "default": {"nheads": 4},
        "gqa": HEADS,
        "mqa-nope": {"nheads": 4, "nheads_kv": 1, "rope": None, "qkv_bias": True, "out_bias": True},
        "window": HEADS | {"window": 5, "rope_interleaved": True},
        "window-1": HEADS | {"window": 1},
        "conv": HEADS | {"d_conv": 4, "rotary_dim": 4, "headdim": 12, "softmax_scale": 0.5},
        "stretched": HEADS | {"rope": 100.0, "rope_scaling": (4.0, 1.0, 3.0, 16.0)},
        "mup": HEADS | {"in_multiplier": 1.5, "key_multiplier": 0.7, "out_multiplier": 0.8},
        "adapter": HEADS | {"adapter_rank": 3},
        "around": HEADS | {"causal": False, "qkv_bias": True, "out_bias": True},
        "around-window": HEADS | {"causal": False, "window": 4, "qk_norm": True},
        "conv-window": HEADS | {"d_conv": 3, "window": 3, "qk_norm": True},
    },
    "conv2d": {
        "default": {"kernel_size": 3},
        "some": {"conv_ratio": 0.4, "expand": 1.3, "activation": "silu", "bias": False},
        "like-mamba": {"kernel_size": 5, "expand": 2.0, "conv_ratio": 2.0, "activation": "silu", "init_std": None},
    },
    "mlp": {
        "default": {},
        "plain": {"gated": False, "activation": "relu2", "bias": True},
        "gelu": {"d_intermediate": 24, "activation": "gelu", "adapter_rank": 3},
        "mup": {"d_intermediate": 24, "gate_multiplier": 0.9, "out_multiplier": 0.5},
    },
    "moe": {
        "default": EXPERTS,
        "mixtral": EXPERTS | {"router": "topk_softmax", "top_k": 3, "z_loss_coef": 0.1},
        "shared": EXPERTS | {"num_shared_experts": 2, "renormalize": True, "gated": False, "activation": "relu"},
        "sigmoid": EXPERTS
        | {
            "num_experts": 6,
            "router": "sigmoid",
            "renormalize": True,
            "routed_scale": 2.5,
            "num_groups": 3,
            "top_groups": 2,
        },
        "latent": EXPERTS
        | {"d_latent": 16, "router": "sigmoid", "num_shared_experts": 1, "gated": False, "activation": "relu2"},
        "one-of-one": {"d_intermediate": 16, "num_experts": 1, "top_k": 1, "aux_loss_coef": 0.0},
    },
    "ss2d": {
        "default": {},
        "vanilla": {"ssm_ratio": 2.0, "d_state": 16, "gate": True, "conv_bias": True},
        "one-way": {"directions": 1, "d_state": 3, "gate": True, "gate_activation": None},
        "there-and-back": {"directions": 2, "dt_rank": 5, "d_conv": 5, "out_activation": "gelu"},
        "windows": {"directions": ["window2-rows", "columns", "window3-columns-back"], "out_norm": None},
        "scan-alone": {"d_conv": 0, "d_state": 4},
    },
    "ss2d2": {
        "default": {"d_state": 8, "chunk_size": 4},
        "gated": {"d_state": 4, "ssm_ratio": 2.0, "nheads": 8, "gate": True, "conv_bias": True},
        "there-and-back": {"d_state": 3, "directions": 2, "d_conv": 5, "out_activation": "gelu"},
        "windows": {"d_state": 4, "directions": ["window2-rows", "columns-back"], "out_norm": None, "d_conv": 0},
    },
}


def cases():
    for name in list_mixers():
        for variant, options in VARIANTS.get(name, {"default": {}}).items():
            for promise in PROMISES:
                if promise != "compiles" or variant == "default":
                    yield pytest.param(name, options, promise, id=f"{name}-{variant}-{promise}")


def make(name, d_model, **options):
    return build_mixer(check_mixer_options({"type": name, **options}, "mixer"), "mixer", d_model=d_model)


@pytest.mark.parametrize(("name", "options", "promise"), list(cases()))
def test_mixer_keeps_its_promise(name, options, promise):
    PROMISES[promise](Case(functools.partial(make, name), options=options, name=name))


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, each in VARIANTS.items() for o in each.values()], ids=str)
def test_effective_options_are_what_the_constructor_makes_of_the_given_ones(name, options):
    given = check_mixer_options({"type": name, **options}, "mixer")
    effective = get_mixer(name, "mixer").cls.effective_options(given, 32)
    same = {
        key: value if effective.get(key) is None else effective[key] for key, value in given.items() if key != "type"
    }
    mixer, twin = (Case(functools.partial(make, name), options=o).new().double() for o in (options, same))
    twin.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 9, 32).double()
    assert worst(twin(x), mixer(x)) < 1e-12 and twin.flops(64) == mixer.flops(64)


def test_every_mixer_of_ours_but_those_of_maps_takes_a_map_for_a_row_and_is_causal_unless_it_reads_both_ways():
    for name, variants in VARIANTS.items():
        if name in ("conv2d", "ss2d", "ss2d2"):
            continue
        for options in variants.values():
            mixer = make(name, 32, **options)
            around = not options.get("causal", True)
            both_ways = around or options.get("directions") == 2 or options.get("reverse_complement", False)
            assert ("causal" in mixer.capabilities) is ("state" in mixer.capabilities) is not both_ways
            sees_all = not (around and "window" in options)
            assert "grid" not in mixer.capabilities and (mixer.reach(8) is None) is sees_all


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, each in VARIANTS.items() for o in each.values()], ids=str)
def test_a_batch_of_no_rows(name, options):
    mixer, x = Case(functools.partial(make, name), options=options).new(), torch.randn(0, 5, 32, requires_grad=True)
    y = mixer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not any(p.grad.any() for p in mixer.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------ the checker itself


class Decay(Mixer):
    """An exponential moving average: the smallest mixer with a state."""

    capabilities = frozenset({"state"})

    def __init__(self, d_model: int):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1):
        torch.nn.init.uniform_(self.rate, 0.1, 0.9)

    def init_state(self, batch, max_len=0, device=None, dtype=None):
        dtype = torch.promote_types(dtype or self._dtype, torch.float32)
        return Average(torch.zeros(batch, self.rate.numel(), device=device or self._device, dtype=dtype))

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        if seq is not None:
            self.require("packing" if seq.packed else "padding")
        h = self.init_state(len(x)).h if state is None else state.h
        rate, ys = self.rate.to(h.dtype), []
        for u in x.unbind(1):
            h = rate * h + (1 - rate) * u
            ys.append(h)
        y = torch.stack(ys, 1).to(x.dtype)
        return (y, Average(h)) if return_state else y

    def flops(self, seq_len):
        return 4 * self.rate.numel()


@dataclasses.dataclass
class Average(State):
    h: torch.Tensor


class Acausal(Decay):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        out = super().forward(x, state, seq, aux, return_state=return_state)
        y, state = out if return_state else (out, None)
        y = y + x.mean(1, keepdim=True)
        return (y, state) if return_state else y


class Forgetful(Decay):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(x, None, seq, aux, return_state=return_state)


class Detached(Decay):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        out = super().forward(x, state, seq, aux, return_state=return_state)
        return (out[0], map_state(out[1], torch.detach)) if return_state else out


class Overwriting(Decay):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y, new = super().forward(x, state, seq, aux, return_state=True)
        if state is not None:
            copy_state(state, new)
        return (y, new) if return_state else y


class Leaky(Decay):
    capabilities = frozenset({"state", "packing", "padding"})

    def require(self, capability):
        pass


class Silent(Leaky):
    capabilities = frozenset({"state"})


class Cheap(Decay):
    def __init__(self, d_model: int):
        super().__init__(d_model)
        self.mix = torch.nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        return super().forward(self.mix(x), state, seq, aux, return_state=return_state)


class Unset(Decay):
    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1):
        pass


class Batchy(Decay):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        out = super().forward(x, state, seq, aux, return_state=return_state)
        return out if return_state else out + x.mean(0)


class Coarse(Decay):
    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        out = super().forward(x, state, seq, aux, return_state=return_state)
        return out if return_state or x.dtype != torch.bfloat16 else (out * 8).round() / 8


def keeping(kind):
    """A Decay whose state is of another kind."""

    class Keeping(Decay):
        def init_state(self, *args, **kwargs):
            return kind(super().init_state(*args, **kwargs).h)

        def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
            out = super().forward(x, state, seq, aux, return_state=return_state)
            return (out[0], kind(out[1].h)) if return_state else out

    Keeping.__name__ = kind.__name__
    return Keeping


class MarkedByItself(Average):
    def mark(self):
        return self


class AllRowsBack(Average):
    def back(self, mark, rows=None):
        super().back(mark)


@dataclasses.dataclass
class Shared(State):
    h: torch.Tensor

    def map(self, fn):
        fn(self.h)
        return self


class FirstSlot(Average):
    def put(self, rows, other):
        super().put(rows * 0, other)


@dataclasses.dataclass
class Hidden(State):
    h: torch.Tensor
    kept: list = dataclasses.field(default_factory=lambda: [torch.zeros(1)])


def test_a_third_party_mixer_passes():
    check_mixer(Decay, d_model=8)


@pytest.mark.parametrize(
    ("mixer", "promise"),
    [
        (Acausal, "causality"),
        (Batchy, "batch_invariance"),
        (Forgetful, "steps_equal_forward"),
        (Detached, "state_gradient"),
        (Overwriting, "chunks_equal_whole"),
        (Leaky, "packing"),
        (Leaky, "padding"),
        (Silent, "packing"),
        (Cheap, "flops_cover_matmuls"),
        (Unset, "initialisation"),
        (Unset, "poisoned_memory"),
        (Coarse, "half_precision"),
        (keeping(MarkedByItself), "marks"),
        (keeping(AllRowsBack), "marks_of_rows"),
        (keeping(Shared), "forks"),
        (keeping(FirstSlot), "slots"),
        (keeping(Hidden), "saved"),
    ],
)
def test_a_broken_mixer_is_caught(mixer, promise):
    with pytest.raises(AssertionError, match=f"{mixer.__name__} breaks the promise '{promise}'"):
        check_mixer(mixer, d_model=8, skip=set(PROMISES) - {promise})


def test_skipping_an_unknown_promise_is_an_error():
    with pytest.raises(ValueError, match="causalty"):
        check_mixer(Decay, skip={"causalty"})


# ------------------------------------------------------------------------------------------------ independent judges


def load(ours, theirs, rename=()):
    """Copy random weights into both, so that nothing is at a value that hides its use."""
    weights = {}
    for name, p in ours.named_parameters():
        weights[name] = (p + 0.2 * torch.randn_like(p)).detach()
    ours.load_state_dict(weights)
    for old, new in rename:
        weights = {name.replace(old, new): w for name, w in weights.items()}
    theirs.load_state_dict(weights)
    return ours, theirs.eval()


def worst(a, b):
    return (a - b).abs().max().item() / b.abs().max().item()


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 8}


def test_mamba_equals_transformers_mamba():
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    config = MambaConfig(**SIZES, state_size=8, use_bias=True)
    ours, theirs = load(Mamba(32, d_state=8, bias=True), MambaMixer(config, 0))
    x = torch.randn(2, 19, 32)
    assert worst(ours(x), theirs(x)) < 1e-5


def test_mamba_with_learned_norms_equals_transformers_jamba():
    from transformers.models.jamba.modeling_jamba import JambaConfig, JambaMambaMixer

    config = JambaConfig(
        **SIZES, mamba_d_state=8, mamba_dt_rank=4, num_attention_heads=4, num_key_value_heads=2, attn_layer_offset=1,
        attn_layer_period=2, expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    rename = [("dt_norm", "dt_layernorm"), ("b_norm", "b_layernorm"), ("c_norm", "c_layernorm")]
    ours, theirs = load(Mamba(32, d_state=8, dt_rank=4, bcdt_norm=True), JambaMambaMixer(config, 0), rename)
    x = torch.randn(2, 19, 32)
    assert worst(ours(x), theirs(x)) < 1e-5


def test_mamba_with_weightless_norms_equals_transformers_falcon_mamba():
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaConfig, FalconMambaMixer

    ours = Mamba(32, d_state=8, bcdt_norm=True, bcdt_norm_affine=False)
    ours, theirs = load(ours, FalconMambaMixer(FalconMambaConfig(**SIZES, state_size=8), 0, False))
    x = torch.randn(2, 19, 32)
    assert worst(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("length", [5, 37])
def test_mamba2_equals_transformers_mamba2(length):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        **SIZES,
        state_size=16,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=16,
        use_bias=True,
        time_step_limit=(0.01, 0.1),
    )
    ours = Mamba2(32, d_state=16, headdim=8, ngroups=2, bias=True, dt_limit=(0.01, 0.1), chunk_size=8)
    ours, theirs = load(ours, Mamba2Mixer(config, 0))
    x = torch.randn(2, length, 32)
    assert worst(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize(("rmsnorm", "first"), [(True, True), (True, False), (False, False)])
def test_mamba2_norms_equal_transformers_falcon_h1(rmsnorm, first):
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Config, FalconH1Mixer, compute_mup_vector

    config = FalconH1Config(
        **SIZES, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=16, mamba_chunk_size=16,
        mamba_rms_norm=rmsnorm, mamba_norm_before_gate=first, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    ours = Mamba2(32, d_state=16, headdim=8, ngroups=2, rmsnorm=rmsnorm, norm_before_gate=first)
    ours, theirs = load(ours, FalconH1Mixer(config, 0))
    theirs.mup_vector = compute_mup_vector(config)
    x = torch.randn(2, 21, 32)
    assert worst(ours(x), theirs(x)) < 1e-5


def test_mamba2_with_d_ssm_is_a_gated_mlp_beside_a_narrower_mamba2():
    wide = Mamba2(32, d_state=8, headdim=8, d_ssm=32, rmsnorm=False).double()
    narrow = Mamba2(32, d_state=8, headdim=8, expand=1, rmsnorm=False).double()
    gate, value, rest = wide.in_proj.weight.split([32, 32, len(wide.in_proj.weight) - 64])
    weights = {name: w for name, w in wide.state_dict().items() if "proj" not in name}
    weights |= {"in_proj.weight": rest, "out_proj.weight": wide.out_proj.weight[:, 32:]}
    narrow.load_state_dict(weights)
    x = torch.randn(2, 9, 32).double()
    mlp = F.linear(F.silu(x @ gate.t()) * (x @ value.t()), wide.out_proj.weight[:, :32])
    assert worst(wide(x), narrow(x) + mlp) < 1e-12


def test_mamba2_skip_per_channel_is_the_skip_per_head_repeated():
    channel, head = (Mamba2(32, d_state=8, headdim=8, D_has_hdim=has).double() for has in (True, False))
    weights = head.state_dict()
    weights["D"] = torch.randn(8).double()
    head.load_state_dict(weights)
    channel.load_state_dict(weights | {"D": weights["D"].repeat_interleave(8)})
    x = torch.randn(2, 9, 32).double()
    assert worst(channel(x), head(x)) < 1e-12


def test_mlp_equals_transformers_llama():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    theirs, ours = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)), MLP(32, 48)
    ours.fc1.weight.data = torch.cat([theirs.up_proj.weight, theirs.gate_proj.weight]).detach()
    ours.fc2.weight.data = theirs.down_proj.weight.detach()
    x = torch.randn(2, 5, 32)
    assert worst(ours(x), theirs(x)) < 1e-6


# ------------------------------------------------------------------------------------------------ what else is promised


@pytest.mark.parametrize(
    ("mixer", "rest"),
    [
        # what PyTorch does not count: the convolution, the scan (9 n + 1 per channel) and the scores
        (Mamba(64, d_state=8), 128 * (2 * 4 + 9 * 8 + 1)),
        (Mamba2(64, d_state=8, headdim=16), 2 * 4 * (128 + 16) + 2 * 128 * (16 + 24) + 2 * 8 * 24),
        (Attention(64, 4, 2), 4 * 64 * 25 // 2),
        (Attention(64, 4, 2, window=5), int(4 * 64 * (15 + 19 * 5) / 24)),
        (Attention(64, 4, 2, causal=False), 4 * 64 * 24),
        # of 24 tokens, 16 see all 9 places, and 4 at each end 5 to 8
        (Attention(64, 4, 2, causal=False, window=5), int(4 * 64 * (16 * 9 + 2 * 26) / 24)),
        (Attention(64, 4, 2, d_conv=4), 4 * 64 * 25 // 2 + 2 * 4 * 128),
        (MLP(64), 0),
        (MoE(64, 96, num_experts=4), 0),
        (MoE(64, 96, num_experts=4, num_shared_experts=1, backend="loop"), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Mixer) else "",
)
def test_flops_are_the_counted_matmuls_and_the_stated_rest(mixer, rest):
    aten = torch.ops.aten
    matmuls = {aten.mm, aten.addmm, aten.bmm, torch.ops.hybridzoo.grouped_linear}
    total = sum(n for op, n in counted_flops(mixer, torch.randn(1, 24, 64)).items() if op in matmuls)
    assert mixer.flops(24) * 24 == total + rest * 24


@pytest.mark.parametrize(
    ("build", "field", "message"),
    [
        (lambda: Mamba2(96, headdim=50), "headdim", "expand * d_model = 192 is not a multiple of headdim = 50"),
        (lambda: Mamba2(96, headdim=32, ngroups=4), "ngroups", "6 heads"),
        (lambda: Mamba2(32, d_ssm=128, headdim=8), "d_ssm", "128 exceeds expand * d_model = 64"),
        (lambda: Mamba2(32, headdim=8, dt_limit=(0.1, 0.1)), "dt_limit", "(0.1, 0.1)"),
        (lambda: Mamba2(32, headdim=8, A_init_range=(0.0, 1.0)), "A_init_range", "(0.0, 1.0)"),
        (lambda: Mamba(32, d_state=0), "d_state", "0 is not a size"),
        (lambda: Mamba(32, dt_min=0.2), "dt_max", "0.1 is below dt_min = 0.2"),
        (lambda: Attention(100, 8), "nheads", "d_model = 100 is not a multiple of nheads = 8"),
        (lambda: Attention(64, 8, 3), "nheads_kv", "nheads = 8 is not a multiple of nheads_kv = 3"),
        (lambda: Attention(64, 8, rotary_dim=10), "rotary_dim", "headdim = 8"),
        (lambda: Attention(64, 8, rotary_dim=3), "rotary_dim", "3 is not an even number"),
        (lambda: Attention(72, 8), "headdim", "9 is odd"),
        (lambda: Attention(64, 8, window=0), "window", "0 is not a size"),
        (lambda: Attention(64, 8, d_conv=-1), "d_conv", "-1"),
        (lambda: Attention(64, 8, d_conv=4, causal=False), "d_conv", "4 is the width of a causal convolution"),
        (
            lambda: GatedConv2d(32, kernel_size=4),
            "kernel_size",
            "4 has no middle, or nothing around it. Use 3, 5, ....",
        ),
        (lambda: GatedConv2d(32, expand=0.01), "expand", "0.01 * d_model = 0.32 is no number of channels"),
        (lambda: GatedConv2d(32, conv_ratio=3.0), "conv_ratio", "= 96.0 is none of the 1 to 85 channels there are"),
        (lambda: MLP(32, activation="swish"), "activation", "Known: 'silu', 'gelu', 'relu', 'relu2'"),
        (lambda: MoE(32, 64, num_experts=2, top_k=3), "top_k", "3 exceeds num_experts = 2"),
        (lambda: MoE(32, 64, router="sinkhorn"), "router", "Known: 'softmax_topk', 'topk_softmax'"),
        (lambda: MoE(32, 64, num_shared_experts=-1), "num_shared_experts", "-1"),
    ],
)
def test_options_that_cannot_work_are_named(build, field, message):
    with pytest.raises(OptionError) as e:
        build()
    assert e.value.field == field
    assert message in e.value.message


@pytest.mark.parametrize(
    ("mixer", "last"),
    [
        (Mamba, "out_proj.weight"),
        (functools.partial(Mamba2, headdim=32), "out_proj.weight"),
        (functools.partial(Attention, nheads=4), "out_proj.weight"),
        (MLP, "fc2.weight"),
        (functools.partial(MoE, d_intermediate=128), "experts.w2"),
    ],
)
def test_deeper_models_start_with_smaller_output_projections(mixer, last):
    one, many = (mixer(d_model=128, n_layer=n).state_dict()[last] for n in (1, 64))
    bound = one.shape[-1] ** -0.5  # kaiming_uniform(a=sqrt(5))
    assert one.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert many.abs().max().item() == pytest.approx(bound / 8, rel=0.01)


@pytest.mark.parametrize(
    ("mixer", "keys"),
    [
        # shapes of mamba-ssm's checkpoints, 2 d = 128 inner channels
        (
            Mamba(64),
            {
                "in_proj.weight": (256, 64), "conv1d.weight": (128, 1, 4), "conv1d.bias": (128,), "x_proj.weight": (36, 128),
                "dt_proj.weight": (128, 4), "dt_proj.bias": (128,), "A_log": (128, 16), "D": (128,), "out_proj.weight": (64, 128),
            },
        ),
        (
            Mamba2(64, d_state=16, headdim=32),
            {
                "in_proj.weight": (292, 64), "conv1d.weight": (160, 1, 4), "conv1d.bias": (160,), "dt_bias": (4,), "A_log": (4,),
                "D": (4,), "norm.weight": (128,), "out_proj.weight": (64, 128),
            },
        ),
        (
            Attention(64, 6, 2, headdim=16, d_conv=4),
            {
                "in_proj.weight": (160, 64), "conv1d.weight": (160, 1, 4), "conv1d.bias": (160,), "out_proj.weight": (64, 96),
            },
        ),
        (MLP(64), {"fc1.weight": (512, 64), "fc2.weight": (64, 256)}),
        (
            MoE(64, 32, num_experts=4),
            {"router.weight": (4, 64), "experts.w1": (4, 64, 64), "experts.w2": (4, 64, 32)},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Mixer) else "",
)  # fmt: skip
def test_state_dict_keys_are_those_of_published_checkpoints(mixer, keys):
    assert {name: tuple(t.shape) for name, t in mixer.state_dict().items()} == keys


def test_step_sizes_start_log_uniform_between_the_limits():
    dt = F.softplus(Mamba(512, dt_min=0.01, dt_max=0.05).dt_proj.bias).detach()
    assert 0.01 <= dt.min() < 0.0105 and 0.0475 < dt.max() <= 0.0501
    assert dt.log().mean().item() == pytest.approx((math.log(0.01) + math.log(0.05)) / 2, abs=0.05)


@pytest.mark.parametrize("mixer", [Mamba(32), Mamba2(32, headdim=16), Attention(32, 4), MLP(32), MoE(32, 32)])
def test_lora_on_any_projection_learns(mixer):
    peft = pytest.importorskip("peft")
    linears = [name for name, module in mixer.named_modules() if isinstance(module, torch.nn.Linear)]
    model = peft.get_peft_model(mixer, peft.LoraConfig(target_modules=linears, init_lora_weights=False))
    model(torch.randn(2, 5, 32)).square().sum().backward()
    adapters = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
    assert len(adapters) >= 2 * len(linears)
    assert all(p.grad is not None and p.grad.any() for _, p in adapters)


def test_casting_keeps_float32_where_it_matters():
    mixer = Mamba(32)
    A_log = mixer.A_log.detach().clone()
    for move in (mixer.bfloat16, mixer.half, mixer.float, mixer.double):
        move()
        assert mixer.A_log.dtype == (torch.float64 if move == mixer.double else torch.float32)
        assert torch.equal(mixer.A_log.float(), A_log)
    assert mixer.float().A_log.dtype == torch.float32
    assert Mamba(32, dtype=torch.bfloat16).A_log.dtype == torch.float32
    assert Mamba(32, dtype=torch.bfloat16).init_state(1).ssm.dtype == torch.float32


def test_a_packed_row_refuses_a_state_and_says_so():
    seq = Seq.from_cu_seqlens(torch.tensor([0, 2, 5]), 1, 5)
    for mixer in (Mamba(32), Mamba2(32, headdim=16), Attention(32, 4)):
        with pytest.raises(ValueError, match=r"packed=True.*cannot continue a state"):
            mixer(torch.randn(1, 5, 32), mixer.init_state(1, 5), seq)
