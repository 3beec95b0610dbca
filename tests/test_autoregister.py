"""transformers' tables get the zoo's name whoever comes first, and whatever else waits in Python's import system. A stand-in imports faster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hybridzoo as zoo

ROOT = Path(zoo.__file__).resolve().parent
FILES = {
    "transformers/__init__.py": "",
    "transformers/models/__init__.py": "",
    "transformers/models/auto/__init__.py": "",
    "transformers/models/auto/auto_mappings.py": "CONFIG_MAPPING_NAMES = {'mamba': 'MambaConfig'}\n",
    "transformers/models/auto/configuration_auto.py": "from .auto_mappings import CONFIG_MAPPING_NAMES as old\n"
    "CONFIG_MAPPING_NAMES = dict(old)\n",
    "transformers/models/auto/modeling_auto.py": "from .configuration_auto import CONFIG_MAPPING_NAMES\n",
}
USE = "from transformers.models.auto.modeling_auto import CONFIG_MAPPING_NAMES as names\n"
KNOWN = "assert names == {'mamba': 'MambaConfig', 'hybridzoo': 'HybridZooConfig'}, names\n"
# put in front of everything after hybridzoo has been imported, or before
LEGACY = """
class Legacy:  # as six before 1.16 has it
    def find_module(self, name, path=None):
        return None
sys.meta_path.insert({at}, Legacy())
"""
LOADER = """
import importlib.machinery, importlib.util, types
real = importlib.machinery.PathFinder
class Old:
    def __init__(self, file):
        self.file = file
    def load_module(self, name):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.__file__, module.__loader__, module.__package__ = self.file, self, name.rpartition('.')[0]
        exec(open(self.file).read(), module.__dict__)
        return module
class Odd:  # gives loaders without exec_module and create_module, and namespaces, which have none
    def find_spec(self, name, path=None, target=None):
        if not name.startswith('transformers.models.auto.'):
            return None
        spec = real.find_spec(name, path, target)
        return importlib.util.spec_from_loader(name, Old(spec.origin), origin=spec.origin)
sys.meta_path.insert(0, Odd())
"""


@pytest.fixture
def python(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "hybridzoo").symlink_to(ROOT)

    def run(code):
        command = [sys.executable, "-S", "-W", "ignore", "-c", "import sys\n" + code + "\nprint('fine')"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}
        )
        assert done.stdout.strip() == "fine", done.stderr

    return run


@pytest.mark.parametrize(
    "code",
    {
        "before": "import hybridzoo\n" + USE,
        "after": USE + "import hybridzoo\n",
        "between": "import transformers.models.auto.auto_mappings, hybridzoo\n" + USE,
        "legacy finder in front": "import hybridzoo\n" + LEGACY.format(at=0) + USE,
        "legacy finder behind": LEGACY.format(at=0) + "import hybridzoo\n" + USE,
        "nothing at all as a finder": "import hybridzoo\nsys.meta_path.append(None)\n" + USE,
        "loader of the old kind": LOADER + "import hybridzoo\n" + USE,
        "imported twice": "import hybridzoo\nhybridzoo.register_when_loaded()\n" + USE,
        "reloaded": "import hybridzoo, importlib\nimport transformers.models.auto.configuration_auto as c\n"
        "del c.CONFIG_MAPPING_NAMES['hybridzoo'], sys.modules['transformers.models.auto.auto_mappings']\n"
        "importlib.reload(c)\n" + USE,
        "in threads": "import threading\nruns = [threading.Thread(target=__import__, args=[n]) for n in "
        "['transformers.models.auto.modeling_auto', 'hybridzoo', 'transformers.models.auto.auto_mappings'] * 3]\n"
        "[t.start() for t in runs]\n[t.join() for t in runs]\n" + USE,
    }.items(),
    ids=lambda c: c[0],
)
def test_the_name_is_entered(python, code):
    python(code[1] + KNOWN)


def test_a_finder_without_its_place_finds_nothing_and_breaks_nothing(python):
    # a tool took it out of sys.meta_path and asks it from elsewhere
    python(
        "import hybridzoo\nours = sys.meta_path.pop(0)\nassert type(ours).__module__ == 'hybridzoo.zoo.autoregister'\n"
        "assert ours.find_spec('transformers.models.auto.auto_mappings', []) is None\n"
        + USE
        + "assert names == {'mamba': 'MambaConfig'}\n"
    )


def test_modules_keep_their_own_loaders(python):
    python(
        "import hybridzoo, inspect\nfrom importlib.machinery import SourceFileLoader\n"
        "import transformers.models.auto.auto_mappings as m\n"
        "assert type(m.__loader__) is type(m.__spec__.loader) is SourceFileLoader\n"
        "assert 'MambaConfig' in inspect.getsource(m)\n"
    )


def test_a_table_that_takes_no_name_is_a_warning(python, tmp_path):
    table = "import types\nCONFIG_MAPPING_NAMES = types.MappingProxyType({'mamba': 'MambaConfig'})\n"
    (tmp_path / "transformers/models/auto/auto_mappings.py").write_text(table)
    python(
        "import hybridzoo, warnings\nwith warnings.catch_warnings(record=True) as said:\n    warnings.simplefilter('always')\n"
        "    import transformers.models.auto.auto_mappings\n"
        "assert 'Import hybridzoo.zoo.hf' in str(said[0].message), said\n"
    )
