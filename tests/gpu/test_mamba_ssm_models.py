"""Models that mamba-ssm built and saved, read by us: the same logits, on the GPU where mamba-ssm runs."""

import pytest
import torch

import hybridzoo as zoo

pytestmark = pytest.mark.gpu

HYBRID = {"num_heads": 4, "head_dim": 16, "causal": True, "d_conv": 4, "rotary_emb_dim": 0}
# d_intermediate and the options of mamba_ssm's config; its Triton products of Mamba-2 round float32 to tf32 (10 bits)
MODELS = {
    "mamba": ({}, 1e-4),
    "mamba, untied": ({"tie_embeddings": False}, 1e-4),
    "mamba2": ({"ssm_cfg": {"layer": "Mamba2", "headdim": 32, "d_state": 32}}, 5e-3),
    "mamba2 in groups": ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 16, "ngroups": 2}}, 5e-3),
    "mamba2 with attention and MLPs": (
        {
            "ssm_cfg": {"layer": "Mamba2", "headdim": 32},
            "attn_layer_idx": [1],
            "attn_cfg": HYBRID,
            "d_intermediate": 128,
        },
        5e-3,
    ),
}


@pytest.mark.parametrize("options, tolerance", MODELS.values(), ids=MODELS)
def test_logits_of_a_saved_model(options, tolerance, tmp_path):
    models = pytest.importorskip("mamba_ssm.models.mixer_seq_simple")
    from mamba_ssm.models.config_mamba import MambaConfig

    torch.manual_seed(0)
    theirs = models.MambaLMHeadModel(
        MambaConfig(d_model=64, n_layer=3, vocab_size=250, **options), device="cuda", dtype=torch.float32
    )
    theirs.save_pretrained(str(tmp_path / "saved"))
    ids = torch.randint(0, 250, (2, 130), device="cuda")
    ours = zoo.load(str(tmp_path / "saved"), device="cuda")
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids).logits
    words = min(want.shape[-1], got.shape[-1])
    assert words >= 250
    error = (got[..., :words] - want[..., :words]).norm() / want[..., :words].norm()
    assert error < tolerance, error.item()
