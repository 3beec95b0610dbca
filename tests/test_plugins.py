"""Mixers of other people: installed plug-ins, broken ones, and files that the user imports by name."""

import importlib.metadata
import multiprocessing.spawn
import pickle
import sys
import warnings

import pytest
import torch
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.__main__ import app
from hybridzoo.zoo import importing, registry
from hybridzoo.zoo.config.resolve import validate

MINE = '''
from torch import nn
import hybridzoo
from {neighbour} import SCALE

@hybridzoo.register_mixer("{name}")
class {cls}(hybridzoo.Mixer):
    """A gate."""

    def __init__(self, d_model: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        y = SCALE * x * self.proj(x).sigmoid()
        return (y, ()) if return_state else y

    def step(self, x, state):
        return self.forward(x)

    def init_state(self, batch, max_len=0, device=None, dtype=None):
        return ()

    def flops(self, seq_len):
        return 2 * self.proj.weight.numel()

    def state_bytes(self, seq_len):
        return 0
'''


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Whatever a test imports and registers is forgotten."""
    modules, path = set(sys.modules), list(sys.path)
    registry.list_mixers()
    for name in ("_entries", "_broken"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(importing, "_imported", {})
    monkeypatch.setattr(registry, "_plugins_loaded", True)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and "pytest-of" in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def mine(tmp_path):
    """A file with a mixer ``gate_mine`` that imports its neighbour."""
    (tmp_path / "neighbour_of_mine.py").write_text("SCALE = 2.0\n")
    file = tmp_path / "gate_of_mine.py"
    file.write_text(MINE.format(name="gate_mine", cls="GateMine", neighbour="neighbour_of_mine"))
    return file


def plug_in(monkeypatch, *points):
    """As if packages with these entry points were installed, and nobody had asked for mixers yet."""
    found = [importlib.metadata.EntryPoint(name, value, "hybridzoo.mixers") for name, value in points]
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: found)
    monkeypatch.setattr(registry, "_plugins_loaded", False)


# --- plug-ins -----------------------------------------------------------------------------------------------------------

BROKEN = {
    "no such module": ("aaa", "nonexistent_pkg.mod:Cls", "ModuleNotFoundError: No module named 'nonexistent_pkg'"),
    "no such class": ("aaa", "hybridzoo.layers:Nothing", "AttributeError"),
    "no mixer": ("aaa", "collections:OrderedDict", "not a subclass of hybridzoo.Mixer"),
    "no class": ("aaa", "math:pi", "not a subclass of hybridzoo.Mixer"),
    "bad name": ("a-b", "hybridzoo.layers:MLP", "must be an identifier"),
    "our name": ("mamba", "hybridzoo.layers:MLP", "the name is taken by hybridzoo.layers.mamba.Mamba"),
    "raises": ("aaa", "raises_on_import:Cls", "RuntimeError: out of order"),
    "exits": ("aaa", "exits_on_import:Cls", "SystemExit: 3"),
    "no syntax": ("aaa", "no_syntax_in_it:Cls", "SyntaxError"),
    "registers and raises": ("aaa", "half_of_a_plug_in:Cls", "RuntimeError: half"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plug_in_is_named_and_others_work(name, value, reason, monkeypatch, tmp_path):
    (tmp_path / "raises_on_import.py").write_text("raise RuntimeError('out of order')\n")
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "no_syntax_in_it.py").write_text("class\n")
    (tmp_path / "half_of_a_plug_in.py").write_text(
        "import hybridzoo as z\n@z.register_mixer('half')\nclass Half(z.Mixer):\n    def __init__(self, d_model: int): ...\nraise RuntimeError('half')\n"
    )
    sys.path.append(str(tmp_path))
    before = registry.list_mixers()
    plug_in(monkeypatch, (name, value), ("fine", "hybridzoo.layers:MLP"))
    with pytest.warns(UserWarning) as seen:
        first = zoo.config("mamba-tiny")
    (warning,) = [str(w.message) for w in seen]
    assert f"mixer plug-in {name!r}: {value}" in warning and reason in warning and "Reinstall or remove" in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zoo.config("mamba-tiny") == first
        assert zoo.list_mixers() == sorted({*before, "fine"})
        if name == "aaa":
            for _ in range(2):
                with pytest.raises(zoo.ConfigError) as e:
                    zoo.config("mamba-tiny", ["mixers.x.type=aaa", "layers=x"])
                assert "mixers.x: mixer 'aaa' is a plug-in" in str(e.value) and reason in str(e.value)
                with pytest.raises(zoo.ConfigError, match=r"mixers\.aaa: mixer 'aaa' is a plug-in"):
                    zoo.config("mamba-tiny", ["mixers.aaa={}", "layers=aaa"])


def test_a_plug_in_that_registers_itself_when_imported_is_fine(monkeypatch, mine):
    sys.path.append(str(mine.parent))
    plug_in(monkeypatch, ("gate_mine", "gate_of_mine:GateMine"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "gate_mine" in zoo.list_mixers()
    assert zoo.config("mamba-tiny", layers="gate_mine", mixers={"gate_mine": {}}).imports == {
        "gate_mine": "gate_of_mine"
    }


def test_damaged_metadata_is_a_warning(monkeypatch):
    def fail(group):
        raise OSError("bad metadata")

    plug_in(monkeypatch)
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", fail)
    with pytest.warns(UserWarning, match="cannot be listed: OSError: bad metadata"):
        assert zoo.list_mixers() and zoo.config("mamba-tiny").d_model


def test_an_interrupt_while_a_plug_in_is_loaded_is_no_answer(monkeypatch, tmp_path):
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    sys.path.append(str(tmp_path))
    plug_in(monkeypatch, ("aaa", "interrupted:Cls"))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            zoo.list_mixers()


# --- one's own file -----------------------------------------------------------------------------------------------------


def test_a_file_is_imported_once_and_works_like_a_built_in(mine, tmp_path):
    assert zoo.import_mixers(mine) == zoo.import_mixers(str(mine)) == ["gate_mine"]
    model = zoo.build("mamba-tiny", d_model=16, layers="mamba gate_mine", mixers={"gate_mine": {"bias": True}})
    assert sys.modules["gate_of_mine"].GateMine is type(model.backbone.layers[1].mixer)
    zoo.save(model, tmp_path / "saved")
    loaded = zoo.load(tmp_path / "saved")
    ids = torch.randint(1, 256, (1, 9))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    # processes that this one starts by spawning have its sys.path, and find the module by its name
    assert str(tmp_path) in multiprocessing.spawn.get_preparation_data("x")["sys_path"]
    assert type(pickle.loads(pickle.dumps(model.backbone.layers[1].mixer))) is sys.modules["gate_of_mine"].GateMine
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1  # hides nothing that is installed


def test_a_saved_config_names_the_module_and_never_imports_it(mine, tmp_path):
    zoo.import_mixers(mine)
    cfg = zoo.config("mamba-tiny", d_model=16, layers="gate_mine", mixers={"x": {"type": "mlp"}, "gate_mine": {}})
    assert cfg.imports == {"gate_mine": "gate_of_mine"} and validate(cfg) == cfg
    assert "imports" not in zoo.config("mamba-tiny")
    zoo.save(zoo.build(cfg), tmp_path / "saved")
    # another process, in the same folder, where the module could be found
    del registry._entries["gate_mine"], sys.modules["gate_of_mine"]
    said = r"mixers\.gate_mine: its type 'gate_mine' is no mixer of hybridzoo; it came from the Python module 'gate_of_mine'.*zoo --import"
    for read in (zoo.load, zoo.config):
        for _ in range(2):
            with pytest.raises(zoo.ConfigError, match=said):
                read(tmp_path / "saved")
    assert "gate_of_mine" not in sys.modules
    (tmp_path / "saved" / "config.yaml").unlink()
    with pytest.raises(zoo.ConfigError, match=said):
        zoo.load(tmp_path / "saved")
    importing._imported.clear()
    zoo.import_mixers("gate_of_mine")  # by its name: the folder is known
    assert zoo.load(tmp_path / "saved").cfg == cfg


@pytest.mark.parametrize(
    "imports", [{"gate_mine": "os; x"}, {"gate_mine": 3}, {"gate_mine": "a/b"}, {"gate_mine": ""}, ["os"], "os"]
)
def test_what_is_no_name_of_a_module_is_refused(imports):
    with pytest.raises(zoo.ConfigError, match="imports"):
        zoo.config("mamba-tiny", imports=imports)


WRONG = {
    "missing": ("./missing_file.py", None, "there is no such file in"),
    "missing module": ("missing_module_x", None, "there is no such module, installed or in"),
    "inner module": ("wants_another.py", "import missing_module_y\n", "wants_another.py, line 1: ModuleNotFoundError: No module named 'missing_module_y'"),
    "no mixer": ("no_mixer_here.py", "x = 1\n", "registers no mixer. Put @hybridzoo.register_mixer"),
    "exception": ("raises_here.py", "import math\n\n\ndef f():\n    return math.nothing\n\n\nf()\n", "raises_here.py, line 5: AttributeError"),
    "syntax": ("syntax_here.py", "x = 1\nclass\n", "syntax_here.py, line 2: SyntaxError"),
    "exit": ("exits_here.py", "import sys\nsys.exit(3)\n", "exits_here.py, line 2: SystemExit: 3"),
    "name of another": ("json.py", "x = 1\n", "there is another module 'json'"),
    "name of an installed": ("this.py", "x = 1\n", "there is another module 'this'"),
    "no name": ("my-mixer.py", "x = 1\n", "is no name for a Python module"),
    "taken": ("takes_mamba.py", MINE.format(name="mamba", cls="M", neighbour="neighbour_of_mine"), "the name is taken by hybridzoo.layers.mamba.Mamba"),
    "half": ("half_a_file.py", MINE.format(name="half", cls="M", neighbour="neighbour_of_mine") + "\n1 / 0\n", "ZeroDivisionError: division by zero"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_file_that_cannot_be_used_says_why_each_time(name, text, message, mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    if text is not None:
        (mine.parent / name).write_text(text)
    before = zoo.list_mixers()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^import ") as e:
            zoo.import_mixers(name)
        assert message in str(e.value) and name in str(e.value)
    assert zoo.list_mixers() == before


def test_two_files_of_one_name_are_told_apart(mine, tmp_path):
    zoo.import_mixers(mine)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / mine.name
    other.write_text(mine.read_text())
    with pytest.raises(ValueError, match="there is another module 'gate_of_mine'"):
        zoo.import_mixers(other)


def test_a_module_of_the_working_folder(tmp_path, monkeypatch):
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scale.py").write_text("SCALE = 1.0\n")
    (package / "mixers.py").write_text(MINE.format(name="gate_deep", cls="Deep", neighbour="package_of_mine.scale"))
    monkeypatch.chdir(tmp_path)
    assert zoo.import_mixers("package_of_mine.mixers") == ["gate_deep"]
    assert zoo.config("mamba-tiny", layers="gate_deep", mixers={"gate_deep": {}}).imports == {
        "gate_deep": "package_of_mine.mixers"
    }


def test_the_command_line_imports_before_any_command(mine, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "vocab_size: 256\nd_model: 16\nlayers: (mamba gate_mine) * 2\nmixers: {mamba: {}, gate_mine: {}}\n"
    )

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "HYBRIDZOO_DEBUG": None})

    refused = run("show", config)
    assert (
        refused.exit_code == 1
        and "no mixer is called 'gate_mine'" in refused.stderr
        and "zoo --import mine.py" in refused.stderr
    )
    for arguments in (
        ["--import", mine, "show", config],
        ["show", config, "--import", mine],
        ["show", f"--import={mine}", config],
    ):
        result = run(*arguments)
        assert result.exit_code == 0 and "gate_mine" in result.stdout, result.stderr
    assert run("generate", config, "--max-new-tokens", 3, "--import", mine, "--device", "cpu").exit_code == 0
    (tmp_path / "text.txt").write_text("a text to train on. " * 200)
    out = tmp_path / "run"
    trained = run("train", config, "--data", tmp_path / "text.txt", "--out", out, "--steps", 1, "--batch-size", 2, "--length", 16, "--report-to", "none",
                  "--device", "cpu", "--import", mine)  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    assert f"next: zoo --import {mine} generate {out} --prompt 'The '" in trained.stderr
    assert "gate_mine: gate_of_mine" in (out / "config.yaml").read_text()
    assert run("convert", out, tmp_path / "converted", "--to", "hybridzoo", "--import", mine).exit_code == 0
    del registry._entries["gate_mine"], sys.modules["gate_of_mine"]
    importing._imported.clear()
    refused = run("show", out)
    assert refused.exit_code == 1 and "it came from the Python module 'gate_of_mine'" in refused.stderr
    assert run("generate", out, "--max-new-tokens", 3, "--device", "cpu", "--import", mine).exit_code == 0
    refused = run("show", config, "--import", tmp_path / "nothing.py")
    assert refused.exit_code == 1 and refused.stderr.startswith("error: import ") and "no such file" in refused.stderr
