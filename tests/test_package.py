"""What is installed: the wheel's contents, an empty environment, its neighbours, and what importing costs."""

import importlib
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import hybridzoo as zoo

ROOT = Path(zoo.__file__).resolve().parent


def run(*command, cwd=None, **env):
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # from a copy, so that no build leftovers of the checkout get in, and none are left there
    ignored = {".git", ".venv", "runs", "build", "dist", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    for file in ROOT.rglob("*"):
        parts = file.relative_to(ROOT).parts
        if ignored.isdisjoint(parts) and "__pycache__" not in parts and ".egg-info" not in parts[0] and file.is_file():
            target = source.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    pytest.importorskip("setuptools", "77", reason="building without a network needs setuptools >= 77 here")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        source,
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment of its own, outside the checkout: the wheel, a stand-in for Hugging Face's ``kernels``, and our dependencies."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("def get_kernel():\n    return 'theirs'\n")
    before = {f: f.read_bytes() for f in (site / "kernels").rglob("*") if f.is_file()}
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert all(f.read_bytes() == content for f, content in before.items())
    # the dependencies of this environment, behind the new one's own packages, and without the editable hybridzoo
    ours = Path(run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "dependencies.pth").write_text(f"import sys; sys.path.append({str(ours)!r})\n")
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"hybridzoo"}
    configs = [p for p in (ROOT / "configs").rglob("*") if p.suffix in (".yaml", ".json")]
    assert {p.stem for p in configs} >= set(zoo.list_models())
    assert {f"hybridzoo/{p.relative_to(ROOT)}" for p in configs} <= set(names)
    for file in (
        "py.typed",
        "zoo/report/chart.css",
        "zoo/report/page.html",
        "eval/tasks/_recall.yaml",
        "eval/tasks/hybridzoo_mqar.yaml",
        "zoo/commands.py",
    ):
        assert f"hybridzoo/{file}" in names
    modules = {
        str(f.relative_to(ROOT))
        for d in ("zoo", "layers", "kernels", "eval", "configs")
        for f in (ROOT / d).rglob("*.py")
    }
    assert {f"hybridzoo/{m}" for m in modules} <= set(names)
    assert not [n for n in names if re.search(r"(^|/)(tests|runs|\.git|\.ci)(/|$)|\.pyc$", n)]


def test_the_wheel_declares_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    core = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M))
    assert core == {"torch", "omegaconf", "safetensors", "typer", "rich", "numpy"}
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata
    points = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "zoo = hybridzoo.__main__:main" in points
    # what others load of their own accord must not be ours to break: torch loads its group at every `import torch`
    assert set(re.findall(r"^\[(.+)\]$", points, re.M)) == {"console_scripts", "lm_eval.models"}


def test_it_works_where_there_is_no_checkout(installed):
    listed = run(installed / "env" / "bin" / "zoo", "list", "--json", cwd=installed)
    assert all(f'"{name}"' in listed.stdout for name in zoo.list_models())
    code = (
        "import hybridzoo as zoo, torch\n"
        "model = zoo.build('jamba-tiny')\n"
        "assert model(torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, 256)\n"
        "print(zoo.__file__)"
    )
    assert "elsewhere" in run(installed / "env" / "bin" / "python", "-c", code, cwd=installed).stdout


def test_hugging_faces_kernels_stays_what_it_is(installed):
    code = "import hybridzoo, kernels, hybridzoo.kernels; assert kernels.get_kernel() == 'theirs'; assert kernels is not hybridzoo.kernels"
    run(installed / "env" / "bin" / "python", "-c", code, cwd=installed)


def test_training_and_evaluating_are_public_and_name_their_extra(monkeypatch):
    from hybridzoo.eval.evaluate import evaluate
    from hybridzoo.zoo.train.run import train

    assert zoo.train is train and zoo.evaluate is evaluate and {"train", "evaluate"} <= set(dir(zoo))
    for module, missing in (("hybridzoo.zoo.train.run", "transformers"), ("hybridzoo.eval.run", "lm_eval")):
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(vars(zoo), "train")
    with pytest.raises(ModuleNotFoundError, match=r"hybridzoo\.train needs .*pip install 'hybridzoo\[train\]'"):
        _ = zoo.train
    # images need nothing of it
    with pytest.raises(ModuleNotFoundError, match=r"tasks need lm_eval\. .*pip install 'hybridzoo\[eval\]'"):
        zoo.evaluate("mamba-tiny", ["hybridzoo_mqar"])


def test_importing_is_light():
    code = (
        "import sys, time, torch\n"
        "best = 9.9\n"
        "start = time.process_time()\n"
        "import hybridzoo\n"
        "print(time.process_time() - start)\n"
        "heavy = {'transformers', 'datasets', 'lm_eval', 'triton', 'matplotlib', 'accelerate', 'tokenizers', 'pandas', 'PIL', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    # processor time of the best of three: other processes must not decide
    runs = [run(sys.executable, "-c", code).stdout.split("\n") for _ in range(3)]
    assert {r[1] for r in runs} == {"[]"}
    assert min(float(r[0]) for r in runs) < 0.5


@pytest.mark.parametrize("command", [["--help"], ["list"], ["train", "--help"]], ids=" ".join)
def test_the_command_line_answers_without_torch(command):
    code = (
        "import sys\n"
        f"sys.argv = ['zoo', *{command!r}]\n"
        "from hybridzoo.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    run(sys.executable, "-c", code)


def test_generating_text_imports_neither_transformers_nor_the_compiler(tmp_path):
    folder = zoo.save(
        zoo.build("jamba-tiny", ["d_model=32", "layers=mamba moe mamba2 attention", "mixers.mamba2={headdim: 16}"]),
        tmp_path,
    )
    code = (
        "import sys\n"
        f"sys.argv = ['zoo', 'generate', {str(folder)!r}, '--prompt', 'a', '--max-new-tokens', '2']\n"
        "from hybridzoo.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "assert 'torch' in sys.modules\n"
        "print(sorted({'torch._dynamo', 'sympy', 'transformers', 'tokenizers', 'huggingface_hub', 'triton'} & set(sys.modules)))\n"
    )
    assert run(sys.executable, "-c", code).stdout.splitlines()[-1] == "[]"


def test_the_package_is_a_program_wherever_it_is_started(tmp_path):
    for folder in (ROOT, tmp_path):
        assert (
            run(sys.executable, "-m", "hybridzoo", "--version", cwd=folder).stdout == f"hybridzoo {zoo.__version__}\n"
        )
    # as from the root of the checkout, where the folder `kernels` would be found for Hugging Face's package of that name
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.argv = ['zoo', '--version']\n"
        "try:\n    runpy.run_module('hybridzoo', run_name='__main__')\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        f"assert {str(ROOT)!r} not in sys.path\n"
    )
    run(sys.executable, "-c", code, cwd=tmp_path)


# module: names that programs of others import from there; saved folders name zoo.hf
KEPT = {
    "zoo.hf": ["HybridZooConfig", "HybridZooForCausalLM", "byte_tokenizer"],
    "zoo.checkpoint": ["CheckpointError", "Report", "convert", "export", "load", "save"],
    "zoo.layout": ["BlockSpec", "allocate", "compress", "expand", "split_token"],
    "zoo.config": ["ConfigSchema", "block_specs", "find_config", "list_models", "load_config", "validate"],
    "zoo.train": ["DifferentRun", "Diverged", "Interrupted", "TrainOptions", "TrainResult", "train"],
    "zoo.data": ["Rows", "fingerprint", "mix", "pack", "read_documents", "rows_from", "rows_with_targets", "topics"],
    "zoo.autoregister": ["register_when_loaded"],
    "layers.testing": ["PROMISES", "Case", "Fault", "check_mixer", "counted_flops"],
    "eval.harness": ["HybridZooLM"],
}


@pytest.mark.parametrize("module", KEPT)
def test_names_stay_where_others_import_them(module):
    found = importlib.import_module(f"hybridzoo.{module}")
    assert all(callable(getattr(found, name)) or name == "PROMISES" for name in KEPT[module])
