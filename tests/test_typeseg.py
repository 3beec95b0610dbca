"""typeseg's npz: read whole or not at all, and its logits against the formulas in float64 and against the wheel's own NumPy.

The wheel is Apache-2.0 and has dependencies that nothing here needs: ``pip install --no-deps typeseg==0.2.7``. Without it, the same
arrays are drawn, smaller.
"""

import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError, convert
from hybridzoo.zoo.models.token_classification import TokenClassifier

D, INNER, N, RANK, CLASSES, BLOCKS = 8, 16, 3, 2, 5, 3
BLOCK = "CheckpointMambaBlock1D_"
# a class of text in each, all of printable ASCII and not, and one that ends in half a line
TEXTS = [
    "a", "\n\n", "def f(x):\n\treturn x  # é\r\n", "naïve 漢字 🦓 \x00\x07", "SELECT * FROM t;\n<p class='b'>" * 4,
    '{"k": [1, 2.5, null]}\n#!/bin/sh\nset -e\n' * 3, "".join(map(chr, range(32, 127))),
]  # fmt: skip


def shapes():
    block = {
        "A_log": (INNER, N), "D": (INNER,), "Conv_0__kernel": (4, 1, INNER), "Conv_0__bias": (INNER,),
        "Dense_0__kernel": (D, 2 * INNER), "Dense_0__bias": (2 * INNER,), "Dense_1__kernel": (INNER, RANK + 2 * N),
        "Dense_1__bias": (RANK + 2 * N,), "Dense_2__kernel": (RANK, INNER), "Dense_2__bias": (INNER,),
        "Dense_3__kernel": (INNER, D), "Dense_3__bias": (D,), "LayerNorm_0__scale": (D,), "LayerNorm_0__bias": (D,),
    }  # fmt: skip
    ends = {
        "Embed_0__embedding": (130, D), "LayerNorm_0__scale": (D,), "LayerNorm_0__bias": (D,),
        "Dense_0__kernel": (D, CLASSES), "Dense_0__bias": (CLASSES,),
    }  # fmt: skip
    return {f"{BLOCK}{i}__{name}": shape for i in range(BLOCKS) for name, shape in block.items()} | ends


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes().items()}


@pytest.fixture
def folder(arrays, tmp_path):
    """The wheel's folder, in small."""
    np.savez_compressed(tmp_path / "mamba_al.npz", **arrays)
    write_manifest(tmp_path)
    return tmp_path


def write_manifest(folder, **changes):
    sizes = {"file": "mamba_al.npz", "n_layers": BLOCKS, "d_state": N, "dt_rank": RANK, "d_conv": 4}
    manifest = {"labels": list("vwxyz"), "num_classes": CLASSES, "unet": {"file": "unet_al.npz"}, "mamba": sizes}
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def scan(u, dt, A, B, C, D):
    state, y = np.zeros(A.shape), np.empty_like(u)
    for t in range(len(u)):
        state = np.exp(dt[t][:, None] * A) * state + (dt[t] * u[t])[:, None] * B[t]
        y[t] = state @ C[t] + D * u[t]
    return y


def by_formulas(arrays, text):
    """The logits (l, classes) in float64, as the wheel's ``_mamba_kernel.py`` has them, step by step."""
    w = {name: a.astype(np.float64) for name, a in arrays.items()}

    def dense(name, x):
        return x @ w[f"{name}__kernel"] + w[f"{name}__bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}__scale"] + w[f"{name}__bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    ids = [b if 32 <= b <= 126 or b in (9, 10, 13) else 128 for b in text.encode()]
    h = w["Embed_0__embedding"][ids]
    for i in range(len([name for name in w if name.endswith("A_log")])):
        p = f"{BLOCK}{i}__"
        n, rank = w[f"{p}A_log"].shape[1], w[f"{p}Dense_2__kernel"].shape[0]
        u, z = np.split(dense(f"{p}Dense_0", norm(f"{p}LayerNorm_0", h)), 2, axis=1)
        taps, around = w[f"{p}Conv_0__kernel"][:, 0], np.pad(u, ((1, 2), (0, 0)))
        u = silu(sum(taps[j] * around[j : j + len(u)] for j in range(4)) + w[f"{p}Conv_0__bias"])
        dt, B, C = np.split(dense(f"{p}Dense_1", u), [rank, rank + n], axis=1)
        dt, A, D = np.logaddexp(0, dense(f"{p}Dense_2", dt)) + 1e-4, -np.exp(w[f"{p}A_log"]), w[f"{p}D"]
        y = scan(u, dt, A, B, C, D) + scan(u[::-1], dt[::-1], A, B[::-1], C[::-1], D)[::-1]
        h = h + dense(f"{p}Dense_3", y * silu(z))
    return dense("Dense_0", norm("LayerNorm_0", h))


def logits(model, text, **more):
    with torch.no_grad():
        return model(torch.tensor([model.tokenizer.encode(text)]), **more).logits[0].numpy()


def error(ours, theirs):
    """The largest difference, as a share of the largest logit."""
    return np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())


# as it is drawn


@pytest.mark.parametrize("what", ["folder", "file", "file alone"])
def test_a_folder_and_a_file_are_read(folder, what, tmp_path_factory):
    source = folder if what == "folder" else folder / "mamba_al.npz"
    if what == "file alone":
        source = shutil.copy(source, tmp_path_factory.mktemp("alone") / "renamed.npz")
    model = zoo.load(source)
    assert type(model) is TokenClassifier and model.family == "typeseg" and not model.training
    assert model.cfg.labels == (None if what == "file alone" else list("vwxyz"))
    assert len(model.specs) == BLOCKS and model.num_params() == sum(np.prod(s) for s in shapes().values())
    assert model.cfg.mixers.mamba.expand == 2 and model.cfg.mixers.mamba.dt_rank == RANK


def test_its_logits_are_those_of_the_formulas(folder, arrays):
    exact, single = zoo.load(folder, dtype=torch.float64), zoo.load(folder)
    for text in TEXTS:
        expected = by_formulas(arrays, text)
        assert error(logits(exact, text), expected) < 1e-12
        assert error(logits(single, text), expected) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_packed_rows_are_as_they_are_alone(folder, side):
    check_rows(zoo.load(folder, dtype=torch.float64), side, 1e-12)


def check_rows(model, side, tolerance):
    ids = [torch.tensor(model.tokenizer.encode(text)) for text in TEXTS]
    alone = [logits(model, text) for text in TEXTS]
    most = max(map(len, ids))
    places = [slice(most - len(x), most) if side == "left" else slice(0, len(x)) for x in ids]
    rows, mask = torch.full((len(ids), most), 129), torch.zeros(len(ids), most, dtype=torch.long)
    for row, (x, place) in enumerate(zip(ids, places, strict=True)):
        rows[row, place], mask[row, place] = x, 1
    with torch.no_grad():
        padded = model(rows, attention_mask=mask).logits.numpy()
        ends = np.cumsum([0, *map(len, ids)])
        packed = model(torch.cat(ids)[None], cu_seqlens=ends).logits[0].numpy()
    for row, place in enumerate(places):
        assert error(padded[row, place], alone[row]) < tolerance
        assert error(packed[ends[row] : ends[row + 1]], alone[row]) < tolerance


def test_a_conversion_is_bit_for_bit_and_says_what_matched(folder, tmp_path):
    from hybridzoo.__main__ import app

    model = zoo.load(folder)
    for source in (folder, folder / "mamba_al.npz"):
        target = tmp_path / f"new-{source.name}"
        done = CliRunner().invoke(app, ["convert", str(source), str(target), "--to", "hybridzoo"])
        assert done.exit_code == 0, done.stderr
        n = len(shapes())
        assert f"typeseg -> hybridzoo: all {n} tensors matched, {model.num_params():,} parameters" in done.stdout
        again = zoo.load(target)
        assert again.cfg == model.cfg and type(again.tokenizer) is type(model.tokenizer)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="this one's task is 'token_classification'"):
        convert(folder, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()
    shown = CliRunner().invoke(app, ["show", str(folder / "mamba_al.npz"), "--json"])
    assert json.loads(shown.stdout)["params"] == model.num_params()
    said = CliRunner().invoke(app, ["generate", str(folder / "mamba_al.npz"), "--prompt", "x"])
    assert said.exit_code == 1 and "is no language model" in said.stderr


# broken and hostile


def refused(folder, match, arrays=None, save=np.savez):
    file = folder / "mamba_al.npz"
    if arrays is not None:
        save(file, **arrays)
    with pytest.raises(CheckpointError, match=match):
        zoo.load(folder)
    with pytest.raises(CheckpointError, match=match):
        zoo.load(file)


@pytest.mark.parametrize(
    "name", [f"{BLOCK}1__Dense_1__bias", "Dense_0__kernel", "Embed_0__embedding", f"{BLOCK}0__A_log"]
)
def test_an_array_that_is_missing_too_many_or_of_another_shape_is_named(folder, arrays, name):
    without = {key: a for key, a in arrays.items() if key != name}
    refused(folder, "are of no family" if name.endswith("A_log") else name, without)
    refused(folder, f"{name}_2", arrays | {f"{name}_2": arrays[name]})
    refused(folder, r"shape|dimensions", arrays | {name: arrays[name][..., None]})
    wrong = arrays[name][1:] if "Dense_1" in name else arrays[name].T
    refused(folder, "has shape|is missing|no multiple of|not one", arrays | {name: wrong})


def test_what_is_no_part_is_refused_under_whatever_name(folder, arrays):
    for name in ("lm_head.weight", "../../evil", "/etc/evil", f"{BLOCK}7__D", f"{BLOCK}00__D", "x" * 300):
        refused(folder, "is missing|is not part of the model|n_layers is 3", arrays | {name: np.zeros(3, np.float32)})
    apart = {key.replace(f"{BLOCK}2__", f"{BLOCK}9__"): a for key, a in arrays.items()}
    refused(folder, f"{BLOCK}2__.* is missing", apart)


def test_numbers_of_other_kinds_are_refused(folder, arrays):
    name = "Dense_0__bias"
    for kind in (np.int32, np.complex64, "S4", bool):
        refused(folder, "expected floating-point numbers", arrays | {name: arrays[name].astype(kind)})
    half = {key: a.astype(np.float16) for key, a in arrays.items()}
    np.savez(folder / "mamba_al.npz", **half)
    assert zoo.load(folder).head.weight.dtype == torch.float16
    big = {key: a.astype(">f4") for key, a in arrays.items()} | {
        "Dense_0__kernel": np.asfortranarray(arrays["Dense_0__kernel"])
    }
    np.savez(folder / "mamba_al.npz", **big)
    assert torch.equal(zoo.load(folder).head.weight, torch.from_numpy(arrays["Dense_0__kernel"].T.copy()))


def test_a_pickle_is_not_opened(folder, arrays, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    thing = np.empty(CLASSES, dtype=object)
    thing[:] = [Evil()] * CLASSES
    refused(folder, "is damaged", arrays | {"Dense_0__bias": thing})
    assert not (tmp_path / "evil").exists()


def test_cut_or_changed_bytes_are_found(folder):
    file = folder / "mamba_al.npz"
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    for cut in [0, 1, 100, *rng.integers(0, len(whole), 12)]:
        file.write_bytes(whole[:cut])
        refused(folder, "is damaged")
    starts = [i.header_offset + 30 + len(i.filename) for i in zipfile.ZipFile(io.BytesIO(whole)).infolist()]
    for start in starts[::9]:
        changed = bytearray(whole)
        changed[start + 60] ^= 0x40
        file.write_bytes(bytes(changed))
        refused(folder, "is damaged|has shape|is missing")
    file.write_bytes(b"no archive" * 99)
    refused(folder, "is damaged")


def test_a_small_file_cannot_ask_for_much_memory(folder, arrays):
    huge = arrays | {"Embed_0__embedding": np.zeros((10**6, D), np.float32)}
    refused(folder, r"take \d+ bytes, and it has \d+; at most 8 times", huge, np.savez_compressed)
    # a header that claims more than there is
    file = folder / "mamba_al.npz"
    with zipfile.ZipFile(file, "w") as archive:
        for name, a in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, a)
            content = buffer.getvalue()
            if name == "Dense_0__bias":
                content = content.replace(b"(5,)", b"(5000000000000,)").replace(b" " * 12 + b"\n", b"\n")
            archive.writestr(f"{name}.npy", content)
    refused(folder, "is damaged")
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(10_001):
            archive.writestr(f"{i}.npy", b"")
    refused(folder, "10001 entries")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_a_name_twice_or_no_arrays_is_refused(folder, arrays):
    with zipfile.ZipFile(folder / "mamba_al.npz", "a") as archive:
        archive.writestr("Dense_0__bias.npy", archive.read("Dense_0__bias.npy"))
    refused(folder, "Dense_0__bias.npy' is there twice")
    with zipfile.ZipFile(folder / "mamba_al.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(folder, "is no .npy file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(folder):
    (folder / "mamba_al.npz").unlink()
    os.mkfifo(folder / "mamba_al.npz")
    with pytest.raises(CheckpointError):
        zoo.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba": {"n_layers": 4}}, r"manifest.json: n_layers is 4, and the arrays of mamba_al.npz make it 3"),
        ({"num_classes": 6}, "manifest.json: num_classes is 6"),
        ({"labels": list("vwxy")}, "manifest.json: labels is .* expected a list of 5 names"),
        ({"labels": [1, 2, 3, 4, 5]}, "expected a list of 5 names"),
        ({"labels": "vwxyz"}, "expected a list of 5 names"),
    ],
)
def test_a_manifest_that_belongs_to_others_is_refused(folder, changes, message):
    write_manifest(folder, **changes)
    refused(folder, message)


def test_a_config_says_what_a_folder_holds_and_the_npz_is_then_a_bystander(folder):
    torch.manual_seed(0)
    model = zoo.build({"vocab_size": 20, "d_model": 8, "layers": "mamba", "mixers": {"mamba": {"d_state": 2}}})
    zoo.save(model, folder)
    assert zoo.load(folder).family is None
    assert zoo.load(folder / "mamba_al.npz").family == "typeseg"


# as it was trained


@pytest.fixture(scope="module")
def wheel():
    """The wheel's folder and its arrays."""
    typeseg = pytest.importorskip("typeseg", reason="pip install --no-deps typeseg==0.2.7")
    folder = os.path.join(os.path.dirname(typeseg.__file__), "data")
    with np.load(os.path.join(folder, "mamba_al.npz"), allow_pickle=False) as npz:
        return folder, dict(npz)


def test_the_trained_model_gives_the_logits_of_the_wheels_own_numpy(wheel):
    from typeseg._numpy_backend import Weights, mamba_forward
    from typeseg._tokenize import text_to_bytes

    folder, arrays = wheel
    theirs = Weights({name.replace("__", "/"): a for name, a in arrays.items()})
    single, exact = zoo.load(folder), zoo.load(folder, dtype=torch.float64)
    assert single.num_params() == 1_364_035 and len(single.cfg.labels) == 35
    for text in [*TEXTS, TEXTS[4] * 9]:
        given = mamba_forward(theirs, text_to_bytes(text))
        ours, expected = logits(single, text), by_formulas(arrays, text)
        assert error(logits(exact, text), expected) < 1e-12
        # the larger part of the difference is theirs, which sums in float32 too
        assert error(ours, given) < 1e-5 and error(ours, expected) < 1e-5
        assert (ours.argmax(-1) == given.argmax(-1)).all()


def test_the_trained_model_reads_padded_and_packed_rows(wheel):
    check_rows(zoo.load(wheel[0], dtype=torch.float64), "left", 1e-12)


def test_the_trained_model_knows_python_from_sql(wheel):
    model = zoo.load(wheel[0])
    text = "import os\n\ndef walk(root):\n    for name in os.listdir(root):\n        yield os.path.join(root, name)\n"
    classes = logits(model, text).argmax(-1)
    assert np.mean([model.cfg.labels[int(i)] == "python" for i in classes]) > 0.9
    classes = logits(model, "SELECT name, count(*) FROM users WHERE age > 30 GROUP BY name ORDER BY 2 DESC;\n").argmax(
        -1
    )
    assert np.mean([model.cfg.labels[int(i)] == "sql" for i in classes]) > 0.9


def test_the_shipped_config_is_the_wheels_model(wheel):
    assert OmegaConf.to_container(zoo.config("typeseg")) == OmegaConf.to_container(zoo.load(wheel[0]).cfg)
    assert zoo.build("typeseg", device="meta").num_params() == 1_364_035
    # who says the config, says the names; elsewhere they are the manifest's
    file, shipped = os.path.join(wheel[0], "mamba_al.npz"), zoo.config("typeseg")
    assert zoo.load(file, config="typeseg").cfg == shipped == zoo.load(file, config=shipped).cfg
