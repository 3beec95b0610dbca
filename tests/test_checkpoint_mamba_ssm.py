"""mamba-ssm's format against a small independent reading of its layout, in plain tensor arithmetic, one token after another."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError, convert, export

D, V = 24, 61
BASE = {
    "d_model": D, "n_layer": 3, "vocab_size": V, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}  # fmt: skip
ATTENTION = {
    "causal": True,
    "num_heads": 3,
    "head_dim": 16,
    "d_conv": 4,
    "out_proj_bias": False,
    "qkv_proj_bias": False,
    "rotary_emb_dim": 8,
}
MAMBA2 = {"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 2}
NEWER = BASE | {
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "tie_embeddings": True,
    "pad_vocab_size_multiple": 16,
}
CASES = {
    # as published: the older file lacks the newer fields
    "mamba": BASE | {"ssm_cfg": {}},
    "mamba-options": BASE | {"ssm_cfg": {"d_state": 5, "d_conv": 3, "expand": 1, "dt_rank": 4, "bias": True}, "tie_embeddings": False},
    "mamba2": NEWER | {"ssm_cfg": MAMBA2},
    "mamba2-mlp-in-d_ssm": NEWER | {"ssm_cfg": MAMBA2 | {"d_ssm": 32, "rmsnorm": False, "D_has_hdim": True}, "rms_norm": False},
    "mamba2attn": NEWER | {"ssm_cfg": MAMBA2, "attn_layer_idx": [1], "attn_cfg": ATTENTION},
    "mamba2attn-grouped": NEWER | {"ssm_cfg": MAMBA2 | {"norm_before_gate": True}, "attn_layer_idx": [0, 2], "d_intermediate": 100,
                                   "attn_cfg": ATTENTION | {"num_heads": 4, "num_heads_kv": 2, "d_conv": 0, "qkv_proj_bias": True}},
    "parallel-mlp": NEWER | {"ssm_cfg": MAMBA2, "attn_layer_idx": [2], "attn_cfg": ATTENTION | {"mlp_dim": 200}},
    "transformerpp": NEWER | {"ssm_cfg": {}, "attn_layer_idx": [0, 1, 2], "d_intermediate": 130, "attn_cfg": ATTENTION | {"d_conv": 0}},
}  # fmt: skip


def linear(w, key, x):
    return F.linear(x, w[f"{key}.weight"], w.get(f"{key}.bias"))


def norm(w, key, x, groups=1):
    if f"{key}.bias" in w:
        return F.layer_norm(x, x.shape[-1:], w[f"{key}.weight"], w[f"{key}.bias"], 1e-5)
    g = x.unflatten(-1, (groups, -1))
    return (g * (g.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * w[f"{key}.weight"]


def conv(w, key, x):
    k = w[f"{key}.weight"].shape[-1]
    return (
        sum(F.pad(x, (0, 0, k - 1 - j, 0))[:, : x.shape[1]] * w[f"{key}.weight"][:, 0, j] for j in range(k))
        + w[f"{key}.bias"]
    )


def scan(x, dt, A, B, C, D):
    # x (b, l, h, p), dt (b, l, h or h x p ones), A broadcasts over (h, p, n), B and C (b, l, h, n)
    h, ys = 0, []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, ..., None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1) + D * x[:, t])
    return torch.stack(ys, 1)


def mamba(w, key, x, cfg):
    u, z = linear(w, f"{key}.in_proj", x).chunk(2, -1)
    u = F.silu(conv(w, f"{key}.conv1d", u))
    n = w[f"{key}.A_log"].shape[1]
    dt, B, C = linear(w, f"{key}.x_proj", u).split([w[f"{key}.dt_proj.weight"].shape[1], n, n], -1)
    dt = F.softplus(linear(w, f"{key}.dt_proj", dt))[..., None]
    y = scan(u[..., None], dt, -w[f"{key}.A_log"].exp()[:, None], B[:, :, None], C[:, :, None], w[f"{key}.D"][:, None])
    return linear(w, f"{key}.out_proj", y.squeeze(-1) * F.silu(z))


def mamba2(w, key, x, cfg):
    s = cfg["ssm_cfg"]
    h, g, n, p = w[f"{key}.A_log"].shape[0], s["ngroups"], s["d_state"], s["headdim"]
    width, rest = h * p, 2 * D - h * p
    z0, x0, z, xBC, dt = linear(w, f"{key}.in_proj", x).split([rest, rest, width, width + 2 * g * n, h], -1)
    u, B, C = F.silu(conv(w, f"{key}.conv1d", xBC)).split([width, g * n, g * n], -1)
    B, C = (t.unflatten(-1, (g, n)).repeat_interleave(h // g, 2) for t in (B, C))
    dt = F.softplus(dt + w[f"{key}.dt_bias"])[..., None]
    skip = w[f"{key}.D"].view(h, p) if s.get("D_has_hdim") else w[f"{key}.D"][:, None]
    y = scan(u.unflatten(-1, (h, p)), dt, -w[f"{key}.A_log"].exp()[:, None, None], B, C, skip).flatten(-2)
    if f"{key}.norm.weight" not in w:
        y = y * F.silu(z)
    elif s.get("norm_before_gate"):
        y = norm(w, f"{key}.norm", y, g) * F.silu(z)
    else:
        y = norm(w, f"{key}.norm", y * F.silu(z), g)
    return linear(w, f"{key}.out_proj", torch.cat([F.silu(z0) * x0, y], -1))


def attention(w, key, x, cfg):
    a = cfg["attn_cfg"]
    h, p, kv = a["num_heads"], a["head_dim"], a.get("num_heads_kv", a["num_heads"])
    mlp = -(-a.get("mlp_dim", 0) // 256) * 256
    qkv, up, gate = linear(w, f"{key}.in_proj", x).split([(h + 2 * kv) * p, mlp // 2, mlp // 2], -1)
    qkv = conv(w, f"{key}.conv1d", qkv) if a["d_conv"] else qkv
    q, k, v = qkv.unflatten(-1, (-1, p)).split([h, kv, kv], 2)
    r, l = a["rotary_emb_dim"], x.shape[1]
    angle = torch.arange(l)[:, None] / 10000 ** (torch.arange(0, r, 2) / r)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(t):
        turned = torch.complex(t[..., : r // 2], t[..., r // 2 : r]) * turn
        return torch.cat([turned.real, turned.imag, t[..., r:]], -1)

    q, k, v = rotate(q), rotate(k).repeat_interleave(h // kv, 2), v.repeat_interleave(h // kv, 2)
    score = torch.einsum("bihp,bjhp->bhij", q, k) / math.sqrt(p)
    score = score.masked_fill(torch.ones(l, l).triu(1).bool(), -math.inf).softmax(-1)
    y = torch.einsum("bhij,bjhp->bihp", score, v).flatten(-2)
    return linear(w, f"{key}.out_proj", torch.cat([y, up * F.silu(gate)], -1))


def reading(cfg, w, ids):
    x = w["backbone.embedding.weight"][ids]
    ssm = mamba2 if cfg["ssm_cfg"].get("layer") == "Mamba2" else mamba
    for i in range(cfg["n_layer"]):
        key = f"backbone.layers.{i}"
        mixer = attention if i in cfg.get("attn_layer_idx", []) else ssm
        x = x + mixer(w, f"{key}.mixer", norm(w, f"{key}.norm", x), cfg)
        if cfg.get("d_intermediate"):
            up, gate = linear(w, f"{key}.mlp.fc1", norm(w, f"{key}.norm2", x)).chunk(2, -1)
            x = x + linear(w, f"{key}.mlp.fc2", up * F.silu(gate))
    return norm(w, "backbone.norm_f", x) @ w["lm_head.weight"].T


def shapes(cfg):
    """mamba-ssm's parameters, from the tables of its own documentation and not from our layers."""
    v = -(-V // cfg["pad_vocab_size_multiple"]) * cfg["pad_vocab_size_multiple"]
    s, norms = cfg["ssm_cfg"], ("weight",) if cfg["rms_norm"] else ("weight", "bias")
    out = {"backbone.embedding.weight": (v, D), "lm_head.weight": (v, D)} | {
        f"backbone.norm_f.{k}": (D,) for k in norms
    }
    for i in range(cfg["n_layer"]):
        key, parts = f"backbone.layers.{i}", {}
        if i in cfg.get("attn_layer_idx", []):
            a = cfg["attn_cfg"]
            h, mlp = a["num_heads"] * a["head_dim"], -(-a.get("mlp_dim", 0) // 256) * 256
            qkv = h + 2 * a.get("num_heads_kv", a["num_heads"]) * a["head_dim"]
            parts = {"in_proj.weight": (qkv + mlp, D), "out_proj.weight": (D, h + mlp // 2)}
            parts |= {"in_proj.bias": (qkv + mlp,)} if a["qkv_proj_bias"] else {}
            parts |= {"conv1d.weight": (qkv, 1, a["d_conv"]), "conv1d.bias": (qkv,)} if a["d_conv"] else {}
        elif s.get("layer") == "Mamba2":
            width = s.get("d_ssm", 2 * D)
            h, c = width // s["headdim"], width + 2 * s["ngroups"] * s["d_state"]
            parts = {"in_proj.weight": (4 * D + 2 * s["ngroups"] * s["d_state"] + h, D), "conv1d.weight": (c, 1, 4), "conv1d.bias": (c,),
                     "dt_bias": (h,), "A_log": (h,), "D": (width if s.get("D_has_hdim") else h,), "out_proj.weight": (D, 2 * D)}  # fmt: skip
            parts |= {"norm.weight": (width,)} if s.get("rmsnorm", True) else {}
        else:
            di, n, r = s.get("expand", 2) * D, s.get("d_state", 16), s.get("dt_rank", math.ceil(D / 16))
            parts = {"in_proj.weight": (2 * di, D), "conv1d.weight": (di, 1, s.get("d_conv", 4)), "conv1d.bias": (di,), "x_proj.weight": (r + 2 * n, di),
                     "dt_proj.weight": (di, r), "dt_proj.bias": (di,), "A_log": (di, n), "D": (di,), "out_proj.weight": (D, di)}  # fmt: skip
            parts |= {"in_proj.bias": (2 * di,), "out_proj.bias": (D,)} if s.get("bias") else {}
        out |= {f"{key}.mixer.{k}": shape for k, shape in parts.items()} | {f"{key}.norm.{k}": (D,) for k in norms}
        if hidden := -(-cfg.get("d_intermediate", 0) // 128) * 128:
            out |= {f"{key}.mlp.fc1.weight": (2 * hidden, D), f"{key}.mlp.fc2.weight": (D, hidden)} | {
                f"{key}.norm2.{k}": (D,) for k in norms
            }
    return out


def write(cfg, folder):
    generator = torch.Generator().manual_seed(0)
    w = {}
    for name, shape in shapes(cfg).items():
        draw = torch.randn(shape, generator=generator)
        if name.endswith(("A_log", "norm.weight", "norm2.weight", "norm_f.weight", ".D")):
            w[name] = 1 + 0.3 * draw
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            w[name] = draw - 2
        else:
            w[name] = draw * (0.4 if len(shape) == 1 or "conv1d" in name else 1.5 * shape[-1] ** -0.5)
    if cfg.get("tie_embeddings", True):
        w["lm_head.weight"] = w["backbone.embedding.weight"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    torch.save(w, folder / "pytorch_model.bin")
    return w


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_decoding_and_the_way_back(case, tmp_path):
    cfg = CASES[case]
    w = write(cfg, tmp_path / "in")
    model = zoo.load(tmp_path / "in")
    ids = torch.randint(0, V, (2, 31), generator=torch.Generator().manual_seed(1))
    for t in {id(t): t for t in w.values()}.values():
        t.requires_grad_()
    expected = reading(cfg, w, ids)
    got = model(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)

    with torch.no_grad():
        out = model(ids[:, :11])
        steps = torch.stack([model.step(ids[:, t], out.state) for t in range(11, 31)], 1)
        torch.testing.assert_close(steps, expected[:, 11:], atol=1e-4, rtol=0)
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        padded = model(ids, attention_mask=mask).logits[1, 6:]
        torch.testing.assert_close(padded, reading(cfg, w, ids[1:, 6:])[0], atol=1e-4, rtol=0)

    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected) / expected.numel() ** 0.5
    (got * weight).sum().backward(), (expected * weight).sum().backward()
    assert export(model, tmp_path / "out", "mamba_ssm") == "mamba_ssm"
    back = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == w.keys() and all(torch.equal(back[k], w[k].detach()) for k in w)
    assert torch.equal(zoo.load(tmp_path / "out")(ids).logits, got)

    for p in model.parameters():
        p.data = p.grad
    export(model, tmp_path / "grads", "mamba_ssm")
    grads = torch.load(tmp_path / "grads" / "pytorch_model.bin", weights_only=True)
    for name, t in w.items():
        assert (grads[name] - t.grad).abs().max() < 1e-3 * t.grad.abs().max(), name


def test_the_formats_change_into_each_other(tmp_path):
    w = write(CASES["mamba2"], tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", "hf")
    assert (report.source, report.target, report.tensors) == ("mamba_ssm", "mamba2", len(w) - 1)
    assert report.left_out == ("lm_head.weight",) and "left out 1" in str(report)  # the format stores the tied head too
    assert "all" in str(report) and "config.json" in report.files
    assert json.loads((tmp_path / "b/config.json").read_text())["vocab_size"] == 64  # padded from 61
    assert convert(tmp_path / "b", tmp_path / "c", "hybridzoo").target == "hybridzoo"
    assert convert(tmp_path / "c", tmp_path / "d", "mamba_ssm").source == "hybridzoo"
    back = torch.load(tmp_path / "d" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == w.keys() and all(torch.equal(back[k], w[k]) for k in w)


def test_what_a_format_cannot_express_is_said_and_nothing_is_left_behind(tmp_path):
    write(CASES["mamba2attn"], tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"can express the layers 'mamba2 attention mamba2'"):
        convert(tmp_path / "a", tmp_path / "b", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(CheckpointError, match=r"unknown format 'gguf'"):
        convert(tmp_path / "a", tmp_path / "b", "gguf")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(tmp_path / "a", tmp_path / "a", "mamba_ssm")


@pytest.mark.parametrize("mimo", [{}, {"is_mimo": True, "mimo_rank": 4}])
def test_mamba3_is_recognised(tmp_path, mimo):
    write(CASES["mamba2"], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(NEWER | {"ssm_cfg": {"layer": "Mamba3", "d_state": 128, **mimo}}))
    with pytest.raises(CheckpointError, match=r"'Mamba3', whose mixer is not yet part"):
        zoo.load(tmp_path)
