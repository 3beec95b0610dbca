"""Which backend is taken, and what the others say."""

import subprocess
import sys
import types

import pytest
import torch

import hybridzoo.layers  # noqa: F401, registers the backends of attention and moe
from hybridzoo.kernels import BackendError, causal_conv1d, dispatch, selective_scan, ssd
from hybridzoo.kernels.dispatch import choose, explain
from hybridzoo.kernels.scan import library, reference
from hybridzoo.kernels.scan.inputs import ScanInputs

GPU = {"device": "cuda", "dtype": torch.bfloat16}
OPS = (
    "selective_scan",
    "ssd",
    "causal_conv1d",
    "attention",
    "moe",
    "update",
    "rms_norm",
    "layer_norm",
    "gated_rms_norm",
    "cross_entropy",
)


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch):
    monkeypatch.delenv(dispatch.ENV, raising=False)


@pytest.fixture
def installed(monkeypatch):
    """All optional libraries seem to be there and to import."""
    for name in dispatch.installed:
        monkeypatch.setitem(dispatch.installed, name, True)
        module = types.ModuleType(name)
        module.grouped_gemm_util = types.SimpleNamespace(
            backend=None, ops=None
        )  # of megablocks without its own library
        monkeypatch.setitem(dispatch._tried, name, module)


@pytest.fixture
def missing(monkeypatch):
    for name in dispatch.installed:
        monkeypatch.setitem(dispatch.installed, name, False)


@pytest.mark.parametrize("op", OPS[:3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunked_is_the_default(op, device, missing):
    assert choose(op, device=device).name == "chunked"


@pytest.mark.parametrize(("op", "name"), [("attention", "sdpa"), ("moe", "grouped_mm"), ("cross_entropy", "torch")])
def test_torch_is_the_default_of_layers(op, name, missing):
    assert choose(op).name == name


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("selective_scan", "mamba_ssm"),
        ("ssd", "mamba_ssm"),
        ("causal_conv1d", "causal_conv1d"),
        ("attention", "sdpa"),  # flash-attn pays for some shapes only
        ("moe", "grouped_mm"),  # no slower, and torch brings it
    ],
)
def test_an_able_library_comes_first_on_a_gpu(op, name, installed):
    assert choose(op, **GPU).name == name


def test_the_argument_beats_the_environment_beats_the_order(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "reference")
    assert choose("selective_scan").name == "reference"
    assert choose("selective_scan", backend="chunked").name == "chunked"
    monkeypatch.delenv(dispatch.ENV)
    assert choose("selective_scan").name == "chunked"


def test_the_environment_speaks_only_to_ops_that_have_the_backend(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "chunked")
    assert choose("attention").name == "sdpa"


@pytest.mark.parametrize("op", dispatch.TABLES)
def test_reference_is_the_one_plain_backend_of_every_op(op, monkeypatch):
    (plain,) = (name for name, backend in dispatch.TABLES[op].items() if backend.plain)
    assert choose(op, backend="reference").name == plain
    monkeypatch.setenv(dispatch.ENV, "reference")
    assert choose(op).name == plain and [name for name, chosen, _ in explain(op) if chosen] == [plain]


def test_the_environment_reaches_the_ops(monkeypatch):
    x, weight = torch.randn(1, 4, 3), torch.randn(3, 2)
    monkeypatch.setenv(dispatch.ENV, "cuda")
    with pytest.raises(
        BackendError, match=r"causal_conv1d \(HYBRIDZOO_BACKEND=cuda\): the CUDA kernels need CUDA tensors, got cpu"
    ):
        causal_conv1d(x, weight)


def test_unknown_names_suggest_the_nearest(monkeypatch):
    with pytest.raises(
        BackendError, match=r"selective_scan\(backend='chunkd'\): unknown backend 'chunkd'. Did you mean 'chunked'\?"
    ):
        choose("selective_scan", backend="chunkd")
    with pytest.raises(BackendError, match="Known: cuda, mamba_ssm, chunked, reference"):
        choose("ssd", backend="tpu")
    with pytest.raises(ValueError, match=r"op: unknown op 'scan'\. Known: selective_scan, paths, dt_weight, ssd"):
        choose("scan")
    monkeypatch.setenv(dispatch.ENV, "referense")
    with pytest.raises(
        BackendError, match=r"HYBRIDZOO_BACKEND=referense: unknown backend 'referense'. Did you mean 'reference'\?"
    ):
        choose("ssd")


def test_a_library_that_mixes_documents_is_taken_for_packed_rows_where_it_is_asked_for(installed):
    assert choose("ssd", **GPU).name == "mamba_ssm"
    assert choose("ssd", packed=True, **GPU).name == "chunked"
    assert choose("ssd", backend="mamba_ssm", packed=True, **GPU).name == "mamba_ssm"
    reasons = {name: reason for name, _, reason in explain("ssd", packed=True, **GPU)}
    assert "not finite in a packed document reach the others" in reasons["mamba_ssm"]


REFUSALS = [
    ("selective_scan", "cuda", {"device": "cpu"}, "the CUDA kernels need CUDA tensors, got cpu"),
    ("selective_scan", "cuda", GPU | {"dtype": torch.float64}, "take float32, float16 and bfloat16, got float64"),
    ("selective_scan", "cuda", GPU | {"d_state": 300}, "the CUDA kernels scan up to d_state = 256, got 300"),
    ("ssd", "cuda", {"d_state": 300, **GPU}, "up to d_state = 256, got 300"),
    ("selective_scan", "mamba_ssm", {"device": "cpu"}, "mamba_ssm needs CUDA tensors, got cpu"),
    (
        "selective_scan",
        "mamba_ssm",
        {"device": "cuda", "dtype": torch.float64},
        "takes float32, float16, bfloat16, got float64",
    ),
    ("selective_scan", "mamba_ssm", GPU | {"initial_state": True}, "mamba_ssm has no initial state"),
    ("selective_scan", "mamba_ssm", GPU | {"packed": True}, "mamba_ssm has no packing"),
    ("selective_scan", "mamba_ssm", GPU | {"padded": True}, "mamba_ssm has no padding"),
    (
        "selective_scan",
        "mamba_ssm",
        GPU | {"final_state_grad": True},
        "mamba_ssm drops the gradient of the final state",
    ),
    ("selective_scan", "mamba_ssm", GPU | {"d_state": 300}, "mamba_ssm scans up to d_state = 256, got 300"),
    (
        "ssd",
        "mamba_ssm",
        GPU | {"packed": True, "initial_state": True},
        "an initial state or packed documents, not both",
    ),
    ("ssd", "mamba_ssm", {"device": "cuda", "dtype": torch.float32}, "mamba_ssm rounds float32 matrices to TF32"),
    ("cross_entropy", "cuda", {"device": "cpu"}, "the CUDA kernels need CUDA tensors, got cpu"),
    ("cross_entropy", "cuda", GPU | {"subclass": "DTensor"}, "the CUDA kernels read plain tensors, got DTensor"),
    ("causal_conv1d", "cuda", GPU | {"width": 9}, "the CUDA kernels take widths 2 to 8, got 9"),
    ("causal_conv1d", "cuda", GPU | {"dtype": torch.float64}, "take float32, float16 and bfloat16, got float64"),
    ("causal_conv1d", "causal_conv1d", GPU | {"width": 5}, "causal_conv1d takes widths 2 to 4, got 5"),
    ("causal_conv1d", "causal_conv1d", GPU | {"d": 12}, "causal_conv1d needs a multiple of 8 channels, got 12"),
    (
        "causal_conv1d",
        "causal_conv1d",
        GPU | {"packed": True, "initial_state": True},
        "an initial state or packed documents, not both",
    ),
    ("attention", "flash_attn", {"device": "cpu"}, "flash_attn needs CUDA tensors, got cpu"),
    ("attention", "flash_attn", {"device": "cuda"}, "flash_attn takes float16, bfloat16, got float32"),
    ("attention", "flash_attn", GPU | {"headdim": 512}, "flash_attn takes headdim up to 256, got 512"),
    ("attention", "flash_attn", GPU | {"masked": True}, "flash_attn takes no mask"),
    ("moe", "megablocks", {"device": "cpu"}, "megablocks needs CUDA tensors, got cpu"),
    ("moe", "megablocks", GPU | {"dtype": torch.float16}, "megablocks takes bfloat16, got float16"),
    ("moe", "megablocks", GPU, "megablocks multiplies by grouped_gemm, which is not installed"),
    ("moe", "grouped_mm", {"dtype": torch.float64}, "grouped_mm takes float32, float16 or bfloat16, got float64"),
    (
        "moe",
        "grouped_mm",
        GPU | {"widths": (64, 12)},
        "grouped_mm needs rows of a multiple of 16 bytes, got 12 x 2 = 24",
    ),
]


@pytest.mark.parametrize(("op", "name", "facts", "reason"), REFUSALS)
def test_a_refusal_says_why_and_what_to_use_instead(op, name, facts, reason, installed):
    with pytest.raises(BackendError, match=reason) as error:
        choose(op, backend=name, **facts)
    assert "leave backend unset to choose it automatically" in str(error.value)
    assert choose(op, **facts).name != name
    row = next(row for row in explain(op, **facts) if row[0] == name)
    assert row[1] is False and (reason in row[2] or dispatch.TABLES[op][name].reserve(facts) == row[2])


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("ssd", "mamba_ssm"),
        ("causal_conv1d", "causal_conv1d"),
        ("attention", "flash_attn"),
        ("attention", "flash_attn_4"),
        ("moe", "megablocks"),
    ],
)
def test_a_missing_library_says_so(op, name, missing):
    with pytest.raises(BackendError, match=f"{name} is not installed"):
        choose(op, backend=name, **GPU)


def test_a_library_that_does_not_import_is_tried_once_and_its_reason_kept(monkeypatch):
    tries = []

    def fails(name):
        tries.append(name)
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setitem(dispatch.installed, "mamba_ssm", True)
    monkeypatch.delitem(dispatch._tried, "mamba_ssm", raising=False)
    monkeypatch.setattr(dispatch.importlib, "import_module", fails)
    for _ in range(2):
        with pytest.raises(
            BackendError, match=r"mamba_ssm is installed but does not import \(ImportError: undefined symbol"
        ):
            choose("ssd", backend="mamba_ssm", **GPU)
    assert tries == ["mamba_ssm"]
    dispatch._tried.pop("mamba_ssm")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("facts", [{}, GPU, GPU | {"packed": True}], ids=["cpu", "gpu", "gpu-packed"])
def test_explain_agrees_with_choose(op, facts, installed):
    rows = explain(op, **facts)
    assert [name for name, chosen, _ in rows if chosen] == [choose(op, **facts).name]
    assert all(reason for _, _, reason in rows)


def test_explain_says_what_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "reference")
    rows = {name: (chosen, reason) for name, chosen, reason in explain("ssd")}
    assert rows["reference"][0] is True
    assert rows["chunked"] == (False, "HYBRIDZOO_BACKEND=reference asks for another")


def test_an_op_asks_with_the_facts_of_its_call(installed):
    u, B = torch.randn(1, 3, 4), torch.randn(1, 3, 2)
    A = -torch.ones(4, 2)
    with pytest.raises(
        BackendError, match=r"selective_scan\(backend='mamba_ssm'\): mamba_ssm needs CUDA tensors, got cpu"
    ):
        selective_scan(u, u, A, B, B, backend="mamba_ssm")
    with pytest.raises(BackendError, match=r"ssd\(backend='mamba_ssm'\)"):
        ssd(u[..., None], u, A[:, 0], B[:, :, None], B[:, :, None], backend="mamba_ssm")


def test_the_scan_adapter_speaks_the_librarys_layout(monkeypatch):
    """mamba_ssm's function, stood in for by the loop behind channels-first shapes."""

    def fake(u, delta, A, B, C, D, z, bias, softplus, return_last_state):
        assert (u.shape, B.shape) == ((2, 6, 9), (2, 2, 3, 9)) and return_last_state
        wide = [x.transpose(1, 2) for x in (u, delta, z)]
        out, last = reference.selective_scan(
            ScanInputs(
                wide[0], wide[1], A, B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2), D, wide[2], bias, None, None, None
            ),
            softplus,
        )
        return out.transpose(1, 2), last

    module = types.SimpleNamespace(selective_scan_fn=fake)
    monkeypatch.setattr(library.importlib, "import_module", lambda name: module)
    u, dt, z = torch.randn(3, 2, 9, 6)
    B, C = torch.randn(2, 2, 9, 2, 3)
    i = ScanInputs(u, dt, -torch.rand(6, 3), B, C, torch.randn(6), z, torch.randn(6))
    for got, want in zip(library.selective_scan(i, True), reference.selective_scan(i, True), strict=True):
        torch.testing.assert_close(got, want)


def test_kernels_import_no_optional_library():
    code = "import sys, torch; old = set(sys.modules); import hybridzoo.kernels; print(sorted({m.split('.')[0] for m in set(sys.modules) - old}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    for name in ("mamba_ssm", "causal_conv1d", "flash_attn", "megablocks", "triton", "transformers"):
        assert f"'{name}'" not in done.stdout
